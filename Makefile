PYTHON ?= python3
VENV ?= .venv
# The torch that `make lowest` tests with. The lower bound itself: make lowest TORCH=2.6.0
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
# More options for pytest: make test ARGS="-k probes"
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed-$(TORCH)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: setup demo test test-pages test-quantized census lint format lowest clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,onnx,test,dev]"
	@touch $@

demo: setup
	$(BIN)/spin-hf demo

# One thread per test process: two processes with a thread pool each take turns on the same cores.
test test-pages test-quantized lowest census: export OMP_NUM_THREADS ?= 1

test: setup
	$(BIN)/python $(PYTEST) $(ARGS)

# Report and app in a headless Chromium, and under axe. Skipped where there is no Chromium.
test-pages: setup
	$(BIN)/python -m pytest -rs tests/explain/test_report_page.py tests/explain/test_app_page.py $(ARGS)

# Beside the environment, not in it: transformers imports both at every start, which takes seconds and warns.
QUANTIZERS := $(abspath $(VENV))/quantizers

test-quantized: setup $(QUANTIZERS)
	PYTHONPATH=$(QUANTIZERS) $(BIN)/python $(PYTEST) tests/training/test_quantised.py tests/test_round_trips.py -k quantised $(ARGS)

$(QUANTIZERS): pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --upgrade --no-deps -c constraints.txt --target $@ bitsandbytes torchao
	@touch $@

# Every text architecture of transformers, from tiny random configs: about ten minutes. TYPES="bert llama" for a few.
census: setup
	$(BIN)/python tests/census/run.py $(if $(TYPES),$(TYPES),--out examples/ARCHITECTURES.md)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Old releases warn of their own age, so deprecations are no errors here.
lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python $(PYTEST) -W ignore::DeprecationWarning -W ignore::FutureWarning $(ARGS)

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt "torch==$(TORCH)" -e ".[demo,test]"
	@rm -f $(LOWEST)/.installed-*
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +
