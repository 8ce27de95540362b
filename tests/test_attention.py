"""Token weights at run time; learning them is tested in calibration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.attention import Queries, TokenWeights, join, source
from spin_hf.layout import PositionsError
from spin_hf.pooling import pool
from spin_hf.taps import Tap

FFN, HIDDEN, EMBEDDINGS = Tap("ffn", 1), Tap("hidden", 1), Tap("hidden", 0)


def seen(queries, mask, values):
    weights = TokenWeights(Queries(queries), mask)
    for tap, own in values.items():
        weights.see(tap, own)
    return weights


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 7))
def test_weights_are_a_softmax_over_the_real_tokens(seed, rows, tokens):
    draw = torch.Generator().manual_seed(seed)
    states, neurons = torch.randn(rows, tokens, 5, generator=draw), torch.randn(rows, tokens, 3, generator=draw)
    query = torch.randn(5, generator=draw)
    mask = torch.rand(rows, tokens, generator=draw) < 0.6
    mask[:, 0] = True
    expected = []
    for row in range(rows):
        weight = (states[row, mask[row]] @ query).softmax(0)
        expected.append(weight @ neurons[row, mask[row]])
    states[~mask], neurons[~mask] = torch.nan, torch.nan  # padding may hold anything
    found = seen({FFN: query}, mask, {EMBEDDINGS: states}).pool([FFN], [neurons])[0][:, :-1]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 3, 5])
def test_tokens_that_are_no_positions_are_told(positions):
    """One position for all tokens would be spread over them in silence."""
    queries, mask = {FFN: torch.ones(5)}, torch.ones(2, 4)
    with pytest.raises(PositionsError, match=f"hidden.0 has {positions} positions for 4 tokens"):
        seen(queries, mask, {EMBEDDINGS: torch.randn(2, positions, 5)})
    with pytest.raises(PositionsError, match=f"ffn.1 has {positions} positions for 4 tokens"):
        seen(queries, mask, {EMBEDDINGS: torch.randn(2, 4, 5)}).pool([FFN], [torch.randn(2, positions, 3)])


def test_a_query_of_zeros_is_the_mean():
    values, mask = torch.randn(3, 6, 4), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    found = seen({HIDDEN: torch.zeros(4)}, mask, {HIDDEN: values}).pool([HIDDEN], [values])[0][:, :-1]
    torch.testing.assert_close(found, pool(values, mask, ["mean"])[:, 0])
    assert not found[2].any()  # no token at all


def test_windows_join_to_what_one_row_gives():
    values, query = torch.randn(1, 12, 4), 3 * torch.randn(4)
    whole = seen({HIDDEN: query}, torch.ones(1, 12), {HIDDEN: values}).pool([HIDDEN], [values])[0][:, :-1]
    windows, mask = values.reshape(3, 4, 4), torch.ones(3, 4)
    parts = seen({HIDDEN: query}, mask, {HIDDEN: windows}).pool([HIDDEN], [windows])[0]
    padded = torch.cat([parts, torch.full((1, 5), 9.0)])[None]
    torch.testing.assert_close(join(padded, torch.tensor([[True, True, True, False]])), whole, rtol=1e-5, atol=1e-5)


def test_ffn_neurons_take_the_input_of_their_block():
    assert [str(source(Tap.parse(name))) for name in ("ffn.1", "ffn.3", "hidden.0", "hidden.2", "norm.4")] == [
        *("hidden.0", "hidden.2", "hidden.0", "hidden.2", "norm.4")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taps_that_are_pooled_together_are_pooled_as_alone(dtype):
    taps, draw = [Tap("hidden", 0), Tap("ffn", 1), Tap("hidden", 1)], torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    values = {
        tap: torch.randn(3, 5, width, generator=draw).to(dtype) for tap, width in zip(taps, (4, 7, 4), strict=True)
    }
    for own in values.values():
        own[~mask.bool()] = float("nan")
    weights = TokenWeights(Queries({tap: torch.randn(4, generator=draw) for tap in taps}), mask)
    for tap in (taps[0], taps[2]):
        weights.see(tap, values[tap])
    together = weights.pool(taps, list(values.values()))
    for tap, found in zip(taps, together, strict=True):
        torch.testing.assert_close(found, weights.pool([tap], [values[tap]])[0])
        assert found.shape == (3, values[tap].shape[2] + 1)
        assert found.isfinite().all()


def test_gradients_of_taps_together_are_those_of_each_alone():
    taps, draw = [Tap("hidden", 0), Tap("hidden", 1)], torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6)
    queries = {tap: torch.randn(4, generator=draw) for tap in taps}
    grads = []
    for together in (True, False):
        values = [torch.randn(2, 6, 4, generator=draw.manual_seed(7 + i)).requires_grad_() for i in range(2)]
        weights = TokenWeights(Queries(queries), mask)
        for tap, own in zip(taps, values, strict=True):
            weights.see(tap, own)
        parts = zip(taps, values, strict=True)
        found = weights.pool(taps, values) if together else [weights.pool([tap], [own])[0] for tap, own in parts]
        sum(part.square().sum() for part in found).backward()
        grads.append([own.grad for own in values])
    torch.testing.assert_close(grads[0], grads[1])
