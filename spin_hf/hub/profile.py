"""A picture of where in the backbone the label can be read: the score of every probe, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration import CalibrationResult
from ..explain.paper_figures import draw
from ..explain.record_charts import by_block

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_profile(result: CalibrationResult) -> Figure:
    """The picture, with the scores of the last layer and of SPIN as lines.

    Args:
        result: the record of a calibration.

    Raises:
        ImportError: without matplotlib.
    """
    return draw(by_block(result))
