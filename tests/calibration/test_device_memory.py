"""A device whose memory does not suffice for a batch, or not even for a text."""

import copy

import numpy as np
import pytest
import torch

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import heads, paths, probes
from spin_hf.calibration.errors import DeviceMemoryError
from spin_hf.taps import Tap

QUICK = {
    "progress": False,
    "validation_fraction": 0.2,
    "Cs": 2,
    "etas": (0.5, 1.0),
    "poolings": ["mean"],
    "batch_tokens": 128,
}
FULL = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    "python": MemoryError(),
}


@pytest.fixture
def wrap(bert_backbone):
    def make(most=10**9, error=FULL["device"], most_rows=80):
        """With room for so many padded tokens, or rows of long texts; ``model.sizes``: tokens of each forward."""
        model = SpinForSequenceClassification.from_backbone(copy.deepcopy(bert_backbone))
        model.sizes = []

        def forward(module, arguments, options):
            ids = options["input_ids"]
            model.sizes.append(ids.numel())
            if ids.numel() > most or (ids.shape[1] > 40 and len(ids) > most_rows):
                raise type(error)(*error.args)

        model.spin.backbone.register_forward_pre_hook(forward, with_kwargs=True)
        return model

    return make


@pytest.fixture
def rows(sentiment_rows):
    return sentiment_rows["text"], sentiment_rows["label"]


def features(folder):
    return {path.name: np.fromfile(path, np.float32) for path in folder.glob("*/*.f32")}


def same(made, expected):
    for name, value in made.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize("kind", FULL)
def test_a_batch_is_halved_until_it_fits(kind, wrap, tokenizer, rows, tmp_path):
    whole, halved = wrap(), wrap(40, FULL[kind])
    expected = spin_calibrate(whole, tokenizer, rows, cache_dir=tmp_path / "whole", **QUICK)
    result = spin_calibrate(halved, tokenizer, rows, cache_dir=tmp_path / "halved", **QUICK)
    assert expected.data["split_batches"] == 0
    assert 0 < result.data["split_batches"] <= result.data["batches"] == expected.data["batches"]
    assert f"{result.data['split_batches']} of {result.data['batches']} batches did not fit" in str(result)
    assert "did not fit" not in str(expected)
    ours, theirs = features(tmp_path / "halved"), features(tmp_path / "whole")
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-4, atol=1e-4 * np.abs(theirs[name]).max())
    assert result.chosen.score == pytest.approx(expected.chosen.score, abs=0.1)
    again = wrap(40)
    recorded = spin_calibrate(again, tokenizer, rows, cache_dir=tmp_path / "halved", **QUICK)
    assert not again.sizes  # nothing was read anew, and what was split is known
    assert recorded.data == result.data
    same(again, halved)


def test_a_batch_that_fits_is_read_whole_after_one_that_did_not(wrap, tokenizer, rows):
    texts, labels = rows
    model = wrap(most_rows=1)
    data = ["film " * 50 * (i < 4) + text for i, text in enumerate(texts)], labels
    assert spin_calibrate(model, tokenizer, data, **QUICK).data["split_batches"] == 2  # the long texts, two by two
    assert len([size for size in model.sizes if size > 100]) > 4


def test_a_split_does_not_stop_a_killed_run_from_going_on(wrap, tokenizer, rows, tmp_path):
    first = wrap(40)
    spin_calibrate(first, tokenizer, rows, **QUICK)
    model, calls = wrap(40), []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    model.spin.backbone.register_forward_hook(dying)
    with pytest.raises(KeyboardInterrupt):
        spin_calibrate(model, tokenizer, rows, cache_dir=tmp_path, **QUICK)
    again = wrap(40)
    spin_calibrate(again, tokenizer, rows, cache_dir=tmp_path, **QUICK)
    assert len(again.sizes) < len(first.sizes)
    same(again, first)


@pytest.mark.parametrize("most", [40, 3])
def test_a_text_that_does_not_fit_alone(most, wrap, tokenizer, rows, tmp_path):
    texts, labels = rows
    data = [("film " * 40 * (i == 3) + text) for i, text in enumerate(texts)], labels
    message = r"A text of \d+ tokens does not fit the memory of cpu, not even alone \(CUDA.*dtype=.*max_length"
    with pytest.raises(DeviceMemoryError, match=message):
        spin_calibrate(wrap(most), tokenizer, data, cache_dir=tmp_path, **QUICK)
    if most == 40:  # it says what helps
        result = spin_calibrate(wrap(most), tokenizer, data, cache_dir=tmp_path, max_length=20, **QUICK)
        assert result.data["split_batches"] > 0


def test_other_errors_are_left_alone(wrap, tokenizer, rows):
    model = wrap(3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        spin_calibrate(model, tokenizer, rows, **QUICK)


@pytest.fixture
def together(monkeypatch):
    """Solve as on a GPU, with room for so many taps and for so many penalties; what was tried of each."""
    tried = {"taps": [], "penalties": []}
    room = {"taps": 99, "penalties": 99}
    solve_paths, solve_together = paths.solve_paths, heads.solve_together
    for module in (probes, heads):
        monkeypatch.setattr(module, "pays", lambda *size: True)

    def taken(what, count):
        tried[what].append(count)
        if count > room[what]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def taps(x, *arguments, **options):
        taken("taps", len(x))
        return solve_paths(x, *arguments, **options)

    def columns(x, y, s, loss, penalty, count, **options):
        taken("penalties", count)
        return solve_together(x, y, s, loss, penalty, count, **options)

    monkeypatch.setattr(paths, "solve_paths", taps)
    monkeypatch.setattr(heads, "solve_together", columns)
    return room, tried


def close(found, expected):
    assert len(found.candidates) == len(expected.candidates)
    by_name = {candidate.name: candidate for candidate in expected.candidates}
    for candidate in found.candidates:
        other = by_name[candidate.name]
        assert candidate.num_features == pytest.approx(other.num_features, abs=3)
        assert candidate.score == pytest.approx(other.score, abs=0.1)


def test_models_are_solved_in_halves_where_a_device_has_no_room_for_all(wrap, tokenizer, rows, together):
    room, tried = together
    expected = spin_calibrate(wrap(), tokenizer, rows, **QUICK)
    assert max(tried["taps"]) > 1
    assert max(tried["penalties"]) > 5  # more than those of a single eta
    room.update(taps=1, penalties=5)
    close(spin_calibrate(wrap(), tokenizer, rows, **QUICK), expected)
    assert tried["taps"][-1] == 1


def test_no_more_is_solved_at_once_than_a_budget_of_bytes(wrap, tokenizer, rows, together, monkeypatch):
    _, tried = together
    expected = spin_calibrate(wrap(), tokenizer, rows, **QUICK)
    for counts in tried.values():
        counts.clear()
    monkeypatch.setattr(probes, "_BYTES_HELD", 1)
    close(spin_calibrate(wrap(), tokenizer, rows, **QUICK), expected)
    assert set(tried["taps"]) == {1}
    assert set(tried["penalties"]) == {5}  # of one eta


def test_the_budget_counts_scores_of_many_labels_and_all_folds():
    taps = [Tap("hidden", block) for block in range(1, 33)]
    widths, places, gpu = dict.fromkeys(taps, 1000), [(tap, "mean") for tap in taps], torch.device("cuda")

    def largest(rows, **options):
        return max(map(len, probes.in_groups(places, widths, rows, gpu, **{"fits": 1, "outputs": 1} | options)))

    assert largest(10_000) == 16
    assert largest(100_000, outputs=150) < largest(100_000, outputs=10) <= largest(100_000)
    assert largest(100_000, fits=11) < largest(100_000)
    assert largest(10**7) == 1


def test_a_cpu_solves_small_problems_together_and_large_ones_alone():
    taps, cpu = [Tap("hidden", block) for block in range(1, 21)], torch.device("cpu")
    places = [(tap, "mean") for tap in taps]

    def sizes(rows, width, outputs=1):
        widths = dict.fromkeys(taps, width)
        return [len(group) for group in probes.in_groups(places, widths, rows, cpu, fits=6, outputs=outputs)]

    assert sizes(300, 384) == [16, 4]
    assert sizes(3000, 384) == sizes(100, 768) == sizes(300, 384, outputs=77) == [1] * 20


@pytest.mark.parametrize(("what", "message"), [("taps", r"A probe of [\w.]+ on"), ("penalties", "A head on")])
def test_a_model_that_does_not_fit_alone(what, message, wrap, tokenizer, rows, together):
    room, _ = together
    room[what] = 0
    with pytest.raises(DeviceMemoryError, match=message + r" \d+ texts does not fit the memory of cpu, not even alone"):
        spin_calibrate(wrap(), tokenizer, rows, **QUICK)
