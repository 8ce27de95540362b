"""Token ids in a file behave as a list of lists."""

import numpy as np
import pytest

from spin_hf.calibration.tokens import Tokens


def test_it_is_a_sequence_of_lists():
    rows = [[1, 2, 3], [4], [5, 6]]
    tokens = Tokens(rows)
    assert list(tokens) == rows
    assert tokens[-1] == tokens[np.int64(2)] == [5, 6]
    assert tokens[1:] == rows[1:]
    assert tokens.lengths == [3, 1, 2]
    with pytest.raises(IndexError):
        tokens[3]


def test_without_rows_it_is_empty():
    assert list(Tokens()) == []
