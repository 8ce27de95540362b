import pytest
import torch

from spin_hf.modes import full_precision, is_exporting


class Told(torch.nn.Module):
    """Adds 1 where it takes itself to be exported."""

    def forward(self, values):
        return values + 1 if is_exporting() else values + 0


def test_export_is_told_from_compile():
    zero = torch.zeros(1)
    assert Told()(zero) == 0
    if hasattr(torch.compiler, "_is_exporting_flag"):  # older ones can't tell
        assert torch.compile(Told(), backend="eager", fullgraph=True)(zero) == 0
    for strict in (True, False):
        assert torch.export.export(Told(), (zero,), strict=strict).module()(zero) == 1


@pytest.mark.parametrize("on", [False, True])
def test_full_precision_ends_autocast_for_a_while(on):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
        with full_precision(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu") == on
