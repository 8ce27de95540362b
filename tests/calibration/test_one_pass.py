"""Pooling in one pass gives what the plain pooling gives; the kernels themselves need a GPU."""

import pytest
import torch

from spin_hf.attention import Queries, TokenWeights
from spin_hf.calibration.one_pass import TokenWeightsInOnePass, pool_prefix
from spin_hf.pooling import POOLINGS, pool
from spin_hf.taps import Tap

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]

KINDS = (TokenWeightsInOnePass, TokenWeights)


def batch(device, dtype, neurons, lengths=(1, 37, 20)):
    random, tokens = torch.Generator().manual_seed(0), max(lengths)
    values = torch.randn(len(lengths), tokens, neurons, generator=random).to(device, dtype)
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long().to(device)
    return values, mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poolings", [["mean", "max"], ["max", "mean"], ["max"], ["first"], list(POOLINGS)])
@pytest.mark.parametrize("neurons", [1, 100, 300])
@pytest.mark.parametrize("lengths", [(1, 37, 20), (300, 65, 64)])
def test_it_is_the_plain_pooling(device, dtype, poolings, neurons, lengths):
    values, mask = batch(device, dtype, neurons, lengths)
    torch.testing.assert_close(pool_prefix(values, mask, poolings), pool(values, mask, poolings))


@pytest.mark.parametrize("device", DEVICES)
def test_padding_may_hold_nan_and_a_token_that_does_is_seen(device):
    values, mask = batch(device, torch.float32, 8)
    values[2, 30, 1] = float("nan")
    values[2, 5, 3] = float("nan")
    found = pool_prefix(values, mask, ["mean", "max"])[2]
    assert found[:, 3].isnan().all()
    assert not found[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "neurons"), [(1, 1), (100, 300), (128, 256)])
@pytest.mark.parametrize("lengths", [(1, 37, 20), (300, 65, 64)])
def test_token_weights_are_the_plain_ones(device, dtype, width, neurons, lengths):
    hidden, mask = batch(device, dtype, 2 * width, lengths)
    values, _ = batch(device, dtype, neurons, lengths)
    hidden, values = (part.masked_fill(~mask.bool()[..., None], float("nan")) for part in (hidden, values))
    hidden = hidden[..., :width]
    mask[1], mask[2, 3] = 0, 0  # a window may have no token to pool, and some in its middle that are not
    draw = torch.Generator().manual_seed(1)
    queries = {tap: torch.randn(width, generator=draw).to(device) for tap in (Tap("hidden", 0), Tap("ffn", 1))}
    found, plain = (kind(Queries(queries), mask) for kind in KINDS)
    for tap, own in ((Tap("hidden", 0), hidden), (Tap("ffn", 1), values)):
        for weights in (found, plain):
            weights.see(tap, own)
        torch.testing.assert_close(found.pool([tap], [own])[0], plain.pool([tap], [own])[0])


@pytest.mark.parametrize("device", DEVICES)
def test_token_weights_of_states_that_do_not_lie_side_by_side(device):
    """Their scores come from a matrix product, which has another order in memory."""
    hidden, mask = batch(device, torch.float32, 40)
    turned = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    taps, draw = (Tap("hidden", 0), Tap("ffn", 1)), torch.Generator().manual_seed(1)
    queries = {tap: torch.randn(40, generator=draw).to(device) for tap in taps}
    found, plain = (kind(Queries(queries), mask) for kind in KINDS)
    found.see(taps[0], turned)
    plain.see(taps[0], hidden)
    for tap in taps:
        torch.testing.assert_close(found.pool([tap], [hidden])[0], plain.pool([tap], [hidden])[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_no_number_is_seen_under_token_weights(device, wrong):
    states, mask = batch(device, torch.float32, 8)
    states[1, 3, 2] = wrong
    found, plain = (kind(Queries({Tap("hidden", 0): torch.ones(8, device=device)}), mask) for kind in KINDS)
    for weights in (found, plain):
        weights.see(Tap("hidden", 0), states)
    (pooled,) = found.pool([Tap("hidden", 0)], [states])
    torch.testing.assert_close(pooled, plain.pool([Tap("hidden", 0)], [states])[0], equal_nan=True)
    assert bool(pooled[1].isnan().any()) == (wrong != -float("inf"))  # by which a token has no weight
    assert pooled[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_part_of_a_larger_tensor_and_a_transposed_one(device):
    values, mask = batch(device, torch.float32, 64)
    part = values[:, :, 8:40]
    torch.testing.assert_close(pool_prefix(part, mask, ["mean", "max"]), pool(part, mask, ["mean", "max"]))
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(pool_prefix(turned, mask, ["mean", "max"]), pool(turned, mask, ["mean", "max"]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_waits_for_the_device_that_the_activations_are_on():
    """Where a backbone is spread by ``device_map``, the current device and that of the mask are the first."""
    values, mask = batch("cuda:1", torch.float32, 4096)
    expected = pool(values, mask, ["mean", "max"])
    late = torch.zeros_like(values)
    pool_prefix(late, mask.to("cuda:0"), ["mean", "max"])  # compiles the kernel
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.device(1):
        torch.cuda._sleep(10**9)
        late.copy_(values)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(pool_prefix(late, mask.to("cuda:0"), ["mean", "max"]), expected)
