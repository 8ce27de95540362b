"""Scores are products of the states with the queries, whichever way they are worked out."""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from spin_hf.token_scores import runs_triton, token_scores

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def made(device, dtype, rows=3, tokens=21, width=100, queries=2):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(rows, tokens, width, generator=draw).to(device, dtype)
    mask = torch.rand(rows, tokens, generator=draw) < 0.7
    return values, torch.randn(queries, width, generator=draw).to(device), mask.to(device)


def expected(values, queries):
    return (values.double() @ queries.double().T).movedim(2, 0)


def check(found, values, queries, real):
    assert found.dtype == torch.float32
    real = real.expand(found.shape)
    torch.testing.assert_close(found[real].double(), expected(values, queries)[real], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "queries"), [(1, 1, 1), (21, 100, 2), (64, 256, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_they_are_products(device, dtype, tokens, width, queries, compiled):
    values, queries, real = made(device, dtype, tokens=tokens, width=width, queries=queries)
    score = torch.compile(token_scores, fullgraph=True, backend="eager") if compiled else token_scores
    check(score(values, queries, real), values, queries, real)


@gpu
def test_the_compiler_is_given_sums_that_it_can_join():
    values, queries, real = made("cuda", torch.bfloat16, tokens=64, width=256)
    check(torch.compile(token_scores, fullgraph=True)(values, queries, real), values, queries, real)


@pytest.mark.parametrize("device", DEVICES)
def test_states_that_do_not_lie_side_by_side(device):
    values, queries, real = made(device, torch.float32)
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    check(token_scores(turned, queries, real), values, queries, real)
    part = torch.cat([values, values], 2)[..., : values.shape[2]]
    check(token_scores(part, queries, real), values, queries, real)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_come_back(device):
    values, queries, real = made(device, torch.float32)
    values.requires_grad_(), queries.requires_grad_()
    token_scores(values, queries, real).square().sum().backward()
    others = [each.detach().double().requires_grad_() for each in (values, queries)]
    expected(*others).square().sum().backward()
    for own, other in zip((values, queries), others, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trace_holds_them(device):
    """``torch.jit.trace`` records operations of torch alone: a kernel's result would be a constant."""
    values, queries, real = made(device, torch.float32)
    traced = torch.jit.trace(token_scores, (values, queries, real), check_trace=False)
    others = made(device, torch.float32)[0].flip(0)
    check(traced(others, queries, real), others, queries, real)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_differentiation_and_vmap_pass_through(device):
    values, queries, real = made(device, torch.float32)
    with torch.no_grad():
        for place, given in enumerate((values, queries)):
            tangent = torch.ones_like(given)

            def score(own, place=place):
                return token_scores(own, queries, real) if place == 0 else token_scores(values, own, real)

            _, found = torch.func.jvp(score, (given,), (tangent,))
            with forward_ad.dual_level():
                other = forward_ad.unpack_dual(score(forward_ad.make_dual(given, tangent))).tangent
            moved = expected(tangent, queries) if place == 0 else expected(values, tangent)
            for own in (found, other):
                torch.testing.assert_close(own.double(), moved, rtol=1e-4, atol=1e-4)
        by_row = torch.func.vmap(lambda own: token_scores(own[None], queries, real[:1])[:, 0])(values)
        by_query = torch.func.vmap(lambda own: token_scores(values, own[None], real)[0])(queries)
    for found in (by_row.movedim(0, 1), by_query):
        torch.testing.assert_close(found.double(), expected(values, queries), rtol=1e-4, atol=1e-4)


def test_kernels_run_on_no_cpu():
    assert not runs_triton(torch.device("cpu"))


@gpu
def test_kernels_run_here():
    """Else the other tests here would try nothing but plain operations."""
    assert runs_triton(torch.device("cuda", 0))


@gpu
def test_without_a_c_compiler_plain_operations_serve(tmp_path):
    """Slim images have none. Triton needs one where nothing is in its cache."""
    script = (
        "import torch, warnings\n"
        "from spin_hf.token_scores import runs_triton, token_scores\n"
        "ones = torch.ones(2, 3, 4, device='cuda')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert not runs_triton(ones.device) and not runs_triton(ones.device)\n"
        "assert len([each for each in seen if 'C compiler' in str(each.message)]) == 1, seen\n"
        "assert token_scores(ones, ones[0, :1], ones[..., 0] > 0).eq(4).all()\n"
    )
    environment = {**os.environ, "CC": str(tmp_path / "none"), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
