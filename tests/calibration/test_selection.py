"""From probes to candidates, and the choice among candidates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.calibration.probes import Probe, ProbeFit
from spin_hf.calibration.selection import (
    Candidate,
    Columns,
    combinations,
    entry_shares,
    probe_candidate,
    smallest_within_error,
    widest,
    winner,
)
from spin_hf.taps import Tap


def make_probe(tap="ffn.1", pooling="mean", salience=(0.0, 4.0, 1.0, 0.0, 5.0), score=0.5):
    salience = torch.tensor(salience)
    weight = salience.sqrt()[None]
    fit = ProbeFit(torch.arange(len(salience)).float(), torch.ones(len(salience)), weight, torch.zeros(1), salience)
    return Probe(Tap.parse(tap), pooling, 0.1, score, np.zeros(4), (), (fit,), 0.0, 0)


def make_candidate(score, features, depth=1, predictions=(), **changes):
    given = {"kind": "ffn", "pooling": "mean", "eta": 0.5, "C": 1.0} | changes
    return Candidate(num_features=features, depth=depth, score=score, predictions=np.array(predictions), **given)


saliences = st.lists(st.sampled_from([0.0, 1e-8, 0.25, 1.0, 2.0, 1e6]), min_size=1, max_size=12).filter(any)


@given(saliences, st.floats(0.01, 1.0))
@settings(deadline=None)
def test_the_smallest_set_that_reaches_eta(salience, eta):
    values = torch.tensor(salience)
    kept = (entry_shares(values) < eta - 1e-9).numpy()
    values = values.double().numpy()
    largest_first = np.sort(values)[::-1]
    enough = 1 + int(np.argmax(np.cumsum(largest_first) >= (eta - 1e-9) * values.sum()))
    assert values[kept].sum() >= (eta - 2e-9) * values.sum()
    assert kept.sum() == enough
    assert not kept[values == 0].any()


def test_entry_shares_go_from_the_most_salient_down():
    shares = entry_shares(torch.tensor([1.0, 0.0, 5.0, 4.0, 0.0]))
    torch.testing.assert_close(shares, torch.tensor([0.9, 2.0, 0.0, 0.5, 2.0], dtype=torch.float64))


def test_kept_columns_are_nested_in_eta_and_depth():
    probes = [make_probe(tap) for tap in ("ffn.3", "hidden.0", "hidden.2", "ffn.2")]
    columns = Columns.of(probes, 0)
    masks = {(eta, depth): columns.kept(eta, depth) for eta in (0.3, 0.8, 1.0) for depth in (1, 2, 3)}
    for (eta, depth), mask in masks.items():
        for (other_eta, other_depth), other in masks.items():
            if eta <= other_eta and depth <= other_depth:
                assert (mask <= other).all()
    assert [int(masks[eta, 3].sum()) for eta in (0.3, 0.8, 1.0)] == [4, 8, 12]
    assert masks[1.0, 1].sum() == 3  # the embeddings alone


def test_groups_are_in_the_order_of_the_model():
    probes = [make_probe(*name) for name in (("hidden.2", "max"), ("ffn.2", "mean"), ("hidden.2", "mean"))]
    columns = Columns.of(probes, 0)
    groups = columns.groups()
    assert [(str(group.tap), group.pooling) for group in groups] == [
        ("ffn.2", "mean"),
        ("hidden.2", "max"),
        ("hidden.2", "mean"),
    ]
    assert all(group.neurons.tolist() == [1, 2, 4] for group in groups)
    half = columns.take(columns.kept(0.5, 2))
    assert [group.neurons.tolist() for group in half.groups()] == [[4]] * 3
    assert half.mean.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (False, {("hidden", "mean"): 2, ("hidden", "max"): 1, ("ffn", "mean"): 1}),
        (
            True,
            {
                ("hidden", "mean"): 2,
                ("hidden", "max"): 1,
                ("hidden", "all"): 3,
                ("ffn", "mean"): 1,
                ("ffn", "all"): 1,
                ("both", "mean"): 3,
                ("both", "max"): 1,
                ("both", "all"): 4,
            },
        ),
    ],
)
def test_combinations(combine, expected):
    """The final norm counts as hidden; a kind and pooling that have no probe are left out."""
    names = (("hidden.1", "mean"), ("norm.3", "mean"), ("hidden.1", "max"), ("ffn.1", "mean"))
    found = {
        (kind, pooling): len(probes)
        for kind, pooling, probes in combinations([make_probe(*name) for name in names], combine=combine)
    }
    assert found == expected


def test_one_kind_and_one_pooling_leave_nothing_to_combine():
    found = [(kind, pooling) for kind, pooling, _ in combinations([make_probe()], combine=True)]
    assert found == [("ffn", "mean")]


def test_a_single_probe_as_candidate():
    candidate = probe_candidate(make_probe("hidden.0", "max", score=0.7))
    assert (candidate.kind, candidate.depth, candidate.num_features, candidate.score) == ("hidden", 1, 3, 0.7)
    assert candidate.name == "probe on hidden.0, max"
    assert make_candidate(0.7, 5, depth=2).name == "ffn, mean, eta 0.5, 2 blocks"


def test_rank_prefers_score_then_fewer_features_then_less_depth():
    ordered = [make_candidate(*each) for each in ((0.9, 9, 9), (0.8, 3, 5), (0.8, 4, 1), (0.8, 4, 2))]
    assert sorted(reversed(ordered), key=lambda candidate: candidate.rank) == ordered


def accuracy(labels, predictions):
    return (labels == predictions).mean()


def wrong_on(count, labels):
    return np.where(np.arange(len(labels)) < count, 1 - labels, labels)


def test_compact_takes_the_smallest_within_one_paired_standard_error():
    labels = np.arange(100) % 2
    # Where k texts of 100 are right in one and wrong in the other, the difference has an error of about sqrt(k) / 100.
    best = make_candidate(0.98, 50, predictions=wrong_on(2, labels[::-1])[::-1])
    near = make_candidate(0.97, 20, predictions=wrong_on(3, labels))
    far = make_candidate(0.91, 10, predictions=wrong_on(9, labels))
    hopeless = make_candidate(0.4, 1, predictions=wrong_on(60, labels))
    for order in ([best, near, far, hopeless], [hopeless, far, near, best]):
        assert smallest_within_error(order, best, accuracy, labels) is near
    assert smallest_within_error([best, far, hopeless], best, accuracy, labels) is best


def test_the_error_is_that_of_the_difference_not_of_each_score():
    """Both scores err by 0.05, their difference by nothing: the same texts are wrong."""
    labels = np.arange(100) % 2
    best = make_candidate(0.6, 50, predictions=wrong_on(40, labels))
    behind = make_candidate(0.56, 10, predictions=wrong_on(44, labels))
    assert smallest_within_error([best, behind], best, accuracy, labels) is best
    equal = make_candidate(0.6, 10, predictions=wrong_on(40, labels))
    assert smallest_within_error([best, equal], best, accuracy, labels) is equal


def test_a_larger_candidate_is_never_more_compact():
    labels = np.arange(20) % 2
    best = make_candidate(1.0, 5, depth=3, predictions=labels)
    shallower = make_candidate(1.0, 6, depth=1, predictions=labels)
    assert smallest_within_error([shallower, best], best, accuracy, labels) is best


def test_near_ties_go_to_the_lower_loss():
    """Two texts of difference where each is wrong alone on one or three: an error of 0.02, of which half counts."""
    labels = np.arange(100) % 2
    best = make_candidate(0.98, 50, loss=0.4, predictions=wrong_on(2, labels[::-1])[::-1])
    near = make_candidate(0.97, 80, loss=0.3, predictions=wrong_on(3, labels))
    far = make_candidate(0.95, 10, loss=0.1, predictions=wrong_on(5, labels))
    for order in ([best, near, far], [far, near, best]):
        assert winner(order, accuracy, labels) is near
    assert winner([best, far], accuracy, labels) is best


def test_exact_ties_in_score_and_loss_go_to_fewer_features():
    labels = np.arange(20) % 2
    large, small = (make_candidate(1.0, size, loss=0.2, predictions=labels) for size in (9, 4))
    assert winner([large, small], accuracy, labels) is small


def test_the_widest_has_the_most_features_whatever_it_scores():
    best, wide = make_candidate(0.9, 5), make_candidate(0.6, 9)
    assert widest([best, wide]) is wide
    deeper = make_candidate(0.5, 9, depth=2)
    assert widest([best, wide, deeper]) is deeper
    assert widest([make_candidate(1.0, 20, probe="ffn.1"), wide]) is wide


def test_no_single_probe_scores_more_than_the_winner():
    labels = np.arange(100) % 2
    right = wrong_on(2, labels[::-1])[::-1]
    best = make_candidate(0.98, 50, loss=0.4, predictions=right)
    near = make_candidate(0.97, 80, loss=0.3, predictions=wrong_on(3, labels))
    probe = make_candidate(0.975, 5, probe="ffn.1", predictions=right)
    assert winner([best, near, probe], accuracy, labels) is best
    leading = make_candidate(0.99, 5, probe="ffn.1", predictions=wrong_on(1, labels))
    assert winner([best, near, leading], accuracy, labels) is leading


def test_a_metric_that_some_resamples_have_no_class_for():
    """One text of the rare class is missing from a third of the resamples."""
    labels = np.array([1] + [0] * 19)

    def picky(labels, predictions):
        if len(set(labels)) < 2:
            raise ValueError("one class")
        return accuracy(labels, predictions)

    best = make_candidate(1.0, 50, loss=0.4, predictions=labels)
    near = make_candidate(0.95, 80, loss=0.3, predictions=wrong_on(1, labels[::-1])[::-1])
    assert winner([best, near], picky, labels) in (best, near)
    alone = make_candidate(1.0, 50, loss=0.4, predictions=labels[1:])
    other = make_candidate(0.95, 80, loss=0.3, predictions=1 - labels[1:])
    assert winner([alone, other], picky, labels[1:]) is alone
