"""The names of the labels of a new classifier."""

from __future__ import annotations

from collections.abc import Sequence


def label_names(labels: Sequence[str] | None, num_labels: int | None, problem_type: str) -> list[str]:
    """The names in the order of their ids, made up where only their number is given, or not even that.

    Raises:
        ValueError: for an unknown problem type, or labels that contradict their number, each other or the problem type.
    """
    known = ("single_label_classification", "multi_label_classification", "regression")
    if problem_type not in known:
        raise ValueError(f"problem_type must be one of {', '.join(known)}; got {problem_type!r}.")
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names; got {labels!r}.")
    if labels is not None and num_labels is not None and len(labels) != num_labels:
        raise ValueError(f"labels names {len(labels)} labels, num_labels says {num_labels}. Give one of them.")
    if labels is not None and len(set(labels)) != len(labels):
        raise ValueError(f"labels must differ from each other; got {list(labels)}.")
    count = len(labels) if labels is not None else num_labels
    if count is None:
        count = 1 if problem_type == "regression" else 2
    if problem_type == "regression" and count != 1:
        raise ValueError(f"Regression predicts one number; got {count} labels.")
    if problem_type == "single_label_classification" and count < 2:
        raise ValueError(f"Single-label classification needs at least two labels; got {count}.")
    return [str(name) for name in labels] if labels is not None else [f"LABEL_{i}" for i in range(count)]
