import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.layout import PositionsError
from spin_hf.pooling import POOLINGS, PoolingTogether, align_left, pool


@st.composite
def texts(draw):
    """Token values ``(batch, tokens, 3)`` of texts of different lengths, with junk at the padding, and both masks."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    longest = max(lengths) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = [torch.randn(length, 3, generator=generator) for length in lengths]
    junk = draw(st.sampled_from([0.0, 7.0, 1e30, -1e30]))
    left, right = (torch.full((len(rows), longest, 3), junk) for _ in range(2))
    left_mask, right_mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, values in enumerate(rows):
        left[row, longest - len(values) :], right[row, : len(values)] = values, values
        left_mask[row, longest - len(values) :], right_mask[row, : len(values)] = 1, 1
    return rows, (left, left_mask), (right, right_mask)


masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4).map(torch.tensor)


@given(texts())
@settings(deadline=None, derandomize=True)
def test_padding_does_not_matter(example):
    rows, left, right = example
    for pooling in POOLINGS:
        alone = torch.cat([pool(row[None], torch.ones(1, len(row)), [pooling]) for row in rows])
        torch.testing.assert_close(pool(*left, [pooling]), alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool(*right, [pooling]), alone, rtol=1e-5, atol=1e-5)


@given(masks, st.integers(0, 2**31))
@settings(deadline=None, derandomize=True)
def test_against_numpy_under_any_mask(mask, seed):
    values = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(seed))
    found = pool(values, mask, POOLINGS).numpy()
    assert found.shape == (len(mask), len(POOLINGS), 3)
    for row in range(len(mask)):
        real = values[row][mask[row]].numpy()
        expected = (
            np.stack([real[0], real[-1], real.mean(0), real.max(0)]) if len(real) else np.zeros((4, 3), np.float32)
        )
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


@given(masks)
@settings(deadline=None, derandomize=True)
def test_align_left_is_a_stable_partition(mask):
    tokens = torch.arange(mask.numel()).reshape(mask.shape)
    vectors = tokens[..., None] * torch.ones(1, 1, 2)
    aligned, (ids, nothing, moved) = align_left(mask.long(), tokens, None, vectors)
    assert nothing is None
    for row in range(len(mask)):
        real, padding = tokens[row][mask[row]].tolist(), tokens[row][~mask[row]].tolist()
        assert ids[row].tolist() == real + padding
        assert aligned[row].tolist() == [1] * len(real) + [0] * len(padding)
    assert torch.equal(moved, ids[..., None] * torch.ones(1, 1, 2))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_is_float32(dtype, pooling):
    values = torch.full((1, 300, 2), 1.0, dtype=dtype)
    values[:, 1:, 1] = 1.5
    found = pool(values, torch.ones(1, 300), [pooling])[0, 0]
    exact = {"first": 1.0, "last": 1.5, "mean": 1 + 0.5 * 299 / 300, "max": 1.5}[pooling]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([1.0, exact]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_largest_and_smallest_values(dtype, pooling):
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    values = torch.tensor([[[low, high, -float("inf")]] * 2 + [[0.0, 0.0, 0.0]]], dtype=dtype)
    found = pool(values, torch.tensor([[1, 0, 0]]), [pooling])
    assert torch.equal(found[0, 0], values[0, 0].float())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("junk", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_padding_may_hold_anything(pooling, junk):
    values = torch.tensor([[[1.0], [2.0], [junk]]])
    expected = {"first": 1.0, "last": 2.0, "mean": 1.5, "max": 2.0}[pooling]
    assert pool(values, torch.tensor([[1, 1, 0]]), [pooling]).item() == expected


@pytest.mark.parametrize("junk", [5.0, float("nan"), float("inf")])
def test_a_row_without_tokens_pools_to_zero(junk):
    values = torch.tensor([[[1.0], [2.0]], [[junk], [junk]]])
    found = pool(values, torch.tensor([[1, 1], [0, 0]]), POOLINGS)
    assert found[0].flatten().tolist() == [1.0, 2.0, 1.5, 2.0]
    assert found[1].flatten().tolist() == [0.0] * 4


def test_gradients_reach_real_tokens_only():
    values = torch.randn(1, 4, 2, requires_grad=True)
    pool(values, torch.tensor([[0, 1, 1, 0]]), POOLINGS).sum().backward()
    assert (values.grad[0, [0, 3]] == 0).all()
    assert (values.grad[0, [1, 2]] != 0).all()


def test_unknown_pooling():
    with pytest.raises(ValueError, match="'median'. Choose from: first, last, mean, max"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), ["median"])


@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_pooling_together_is_pooling_each(monkeypatch, most):
    monkeypatch.setattr(PoolingTogether, "_MOST", {"cpu": most})
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    wanted = {
        "a": [("max", 3), ("mean", 2)],
        "b": [("mean", 1)],
        "c": [("first", 2), ("last", 2), ("max", 1), ("mean", 4)],
        "d": [("max", 2), ("max", 1)],
    }
    together, values = PoolingTogether(mask), {}
    for key, poolings in wanted.items():
        values[key] = torch.randn(3, 4, sum(count for _, count in poolings), generator=draw).to(
            torch.bfloat16 if key == "b" else torch.float32
        )
        together.add(key, values[key], poolings)
    found = together.finish()
    for key, poolings in wanted.items():
        parts = values[key].split([count for _, count in poolings], -1)
        for (pooling, _), part, own in zip(poolings, parts, found[key], strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own, pool(part, mask, [pooling])[:, 0], rtol=1e-6, atol=1e-6)


def test_pooling_together_of_other_positions():
    values = torch.arange(6.0).reshape(1, 6, 1)
    together = PoolingTogether(torch.ones(1, 4))
    together.add("tokens", values[:, :4], [("max", 1)])
    together.add("positions", values, [("max", 1)])
    found = together.finish()
    assert (found["tokens"][0].item(), found["positions"][0].item()) == (3, 5)
    together = PoolingTogether(torch.tensor([[1, 1, 1, 0]]))
    together.add("positions", values, [("max", 1)])
    with pytest.raises(PositionsError, match="4 tokens became 6 positions"):
        together.finish()
