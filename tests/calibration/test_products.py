"""Products of features with few vectors, on a GPU by kernels of our own, against those in float64."""

import pytest
import torch

from spin_hf.calibration.products import times, transposed_times

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize(
    "shape", [(3, 1, 16), (2, 5, 16), (1, 2, 144), (2, 130, 80), (1, 3000, 528), (1, 300, 515), (5, 67, 384)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_they_are_those_of_float64(device, shape, count, monkeypatch):
    multiplied = []
    monkeypatch.setattr(torch, "bmm", lambda *pair, bmm=torch.bmm: multiplied.append(1) or bmm(*pair))
    random = torch.Generator().manual_seed(count)
    x = torch.randn(*shape, generator=random).to(device)
    right, left = (torch.randn(shape[0], size, count, generator=random).to(device) for size in shape[:0:-1])
    torch.testing.assert_close(times(x, right).double(), x.double() @ right.double(), atol=3e-4, rtol=1e-5)
    found = transposed_times(x, left)
    torch.testing.assert_close(found.double(), x.double().mT @ left.double(), atol=3e-4, rtol=1e-5)
    assert torch.equal(found, transposed_times(x, left))  # whatever ran first
    assert bool(multiplied) == (device == "cpu" or count not in range(2, 9) or shape[2] % 16 > 0)


@pytest.mark.parametrize("device", DEVICES)
def test_vectors_may_lie_anywhere_in_memory(device):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 80, 64, generator=random).to(device)
    right = torch.randn(2, 3, 64, generator=random).to(device).mT
    left = torch.randn(2, 81, 3, generator=random).to(device)[:, :-1]
    torch.testing.assert_close(times(x, right), x @ right)
    torch.testing.assert_close(transposed_times(x, left), x.mT @ left)
