"""Whatever the options and the data: a classifier, or an error that says what to do."""

import copy
import re

import pytest
import torch
from builders import make_backbone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import batched
from spin_hf.calibration.errors import CalibrationError

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "poolings": st.lists(st.sampled_from(["mean", "max", "first", "attention"]), min_size=1, unique=True),
        "cv": st.integers(2, 4),
        "validation_fraction": st.sampled_from([0.1, 0.5]),
        "Cs": st.sampled_from([1, 3, [0.05, 0.5, 5.0]]),
        "kinds": st.sampled_from([["hidden"], ["ffn"]]),
        "class_weight": st.just("balanced"),
        "multiclass": st.just("ovr"),
        "max_features": st.sampled_from([3, 30]),
        "prefer": st.sampled_from(["score", "widest", "compact"]),
        "exits": st.just(True),
        "preset": st.just("paper"),
        "windows": st.just(True),
        "max_length": st.integers(6, 12),
    },
)
PROBLEMS = st.sampled_from(["single_label_classification", "multi_label_classification", "regression"])
EXPECTED = re.compile(
    "Token weights are learned once|paper's preset has one C|class_weight has no meaning for regression"
    "|single row|at least . rows of each class|row of each class|every probe is empty|No candidate has at most"
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.integers(6, 60), st.integers(2, 4), PROBLEMS, OPTIONS, st.integers(0, 70))
@example(0, 50, 2, "single_label_classification", {"Cs": 3}, 45)  # the folds are solved together, all rows are not
def test_a_classifier_or_what_to_do(tokenizer, seed, count, classes, problem, options, together):
    tokenizer = copy.deepcopy(tokenizer)  # a calibration leaves the length that it cuts at in it
    draw = torch.Generator().manual_seed(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())

    def number(most):
        return int(torch.randint(most, (), generator=draw))

    labels = [number(classes) for _ in range(count)]
    texts = [" ".join([words[number(len(words))] for _ in range(number(15))] + 2 * [words[own]]) for own in labels]
    of_texts = {
        "single_label_classification": labels,
        "multi_label_classification": [[int(own == k or number(8) == 0) for k in range(classes)] for own in labels],
        "regression": [own + number(10) / 10 for own in labels],
    }[problem]
    column = "labels" if problem == "multi_label_classification" else "label"
    outputs = 1 if problem == "regression" else classes
    model = SpinForSequenceClassification.from_backbone(
        make_backbone("bert", vocab_size=len(tokenizer)), num_labels=outputs, problem_type=problem
    )
    if "preset" in options:
        options = {"poolings": ["mean"], **options}  # its four take half a minute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "_SMALL", 32 * together)  # so many rows
        try:
            spin_calibrate(model, tokenizer, {"text": texts, column: of_texts}, progress=False, **options)
        except CalibrationError as error:
            if EXPECTED.search(str(error)):
                return
            raise
    model.eval()
    with torch.no_grad():
        logits = model(**tokenizer(texts[:3], padding=True, return_tensors="pt")).logits
    assert logits.shape == (3, outputs)
    assert logits.isfinite().all()
