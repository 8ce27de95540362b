"""Texts into features: batches, tokens, resumption, and what can go wrong on the way."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration import extraction
from spin_hf.calibration import store as store_module
from spin_hf.calibration.cache import clear_store, list_stores
from spin_hf.calibration.cache import open_store as open_store_of
from spin_hf.calibration.errors import (
    EmptyTextError,
    NonFiniteFeaturesError,
    OutputFolderError,
    PadTokenError,
    StoreInUseError,
    TokenizerMismatchError,
)
from spin_hf.calibration.extraction import check_tokenizer, encode, extract, fingerprint, plan_batches, window
from spin_hf.calibration.ranks import Ranks
from spin_hf.calibration.store import FeatureStore, recorded, required_bytes
from spin_hf.pooling import POOLINGS, pool
from spin_hf.taps import Tap, attach, record, tap_width

BUDGET = 40


@pytest.fixture
def model(bert_backbone):
    return SpinForSequenceClassification.from_backbone(bert_backbone)


@pytest.fixture
def encoded(tokenizer, sentiment_rows):
    return encode(tokenizer, sentiment_rows["text"][:20], None, 64)


@pytest.fixture
def open_store(tmp_path):
    @contextmanager
    def make(model, encoded, folder=tmp_path, key="key"):
        widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in model.spin.taps}
        batches = plan_batches(encoded.lengths, BUDGET)
        with open_store_of(
            folder, key=key, ranks=Ranks(), widths=widths, poolings=POOLINGS, batches=batches, about={"texts": 20}
        ) as (store, missing):
            store.missing = missing
            yield store

    return make


def fill(model, encoded, store, advance=lambda tokens: None):
    extract(model.spin, encoded, store, store.missing, 0, advance)


def everything(store):
    return {(tap, pooling): store.read(tap, pooling) for tap in store.widths for pooling in store.poolings}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
@settings(deadline=None)
def test_batches(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    in_order = [lengths[row] for rows in batches for row in rows]
    assert in_order == sorted(in_order, reverse=True)
    for rows, following in zip(batches, [*batches[1:], None], strict=True):
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * longest <= budget
        assert following is None or (len(rows) + 1) * longest > budget  # no room for one more
    assert plan_batches(tuple(lengths), budget) == batches
    tight = plan_batches(lengths, budget, most_padding=0.1)
    assert sorted(row for batch in tight for row in batch) == list(range(len(lengths)))
    for batch in tight:
        padded, real = len(batch) * max(lengths[row] for row in batch), sum(lengths[row] for row in batch)
        assert padded - real <= 0.1 * real
        assert len(batch) == 1 or padded <= budget


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_features_are_those_of_each_text_alone(name, make_backbone, tokenizer, encoded, open_store):
    model = SpinForSequenceClassification.from_backbone(make_backbone(name))
    taps = model.spin.taps
    if name != "bert":  # llama takes no token types
        encoded = extraction.Encoded(encoded.input_ids, None, 64, 0)
    with open_store(model, encoded) as store:
        fill(model, encoded, store)
        found = everything(store)
    hooks = attach(model.spin.backbone, model.spin.layout, taps)
    for row, ids in enumerate(encoded.input_ids):
        alone = {}
        with record(taps, lambda tap, values, alone=alone: alone.update({tap: values})), torch.no_grad():
            model.spin.backbone(input_ids=torch.tensor([ids]))
        for tap, values in alone.items():
            expected = pool(values, torch.ones(1, len(ids)), POOLINGS)[0].numpy()
            for pooling, one in zip(POOLINGS, expected, strict=True):
                np.testing.assert_allclose(found[tap, pooling][row], one, atol=1e-5 * max(1.0, np.abs(one).max()))
    for hook in hooks:
        hook.remove()


def test_pairs_keep_their_token_types(tokenizer):
    encoded = encode(tokenizer, ["a film", "plot"], ["good", "it was bad"], 64)
    assert list(encoded.token_type_ids) == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert encoded.lengths == [6, 7]


def test_long_texts_are_cut_and_counted(tokenizer):
    texts = ["film " * 3, "film " * 4, "film " * 30]
    encoded = encode(tokenizer, texts, None, 6)
    assert (encoded.lengths, encoded.truncated, encoded.max_length) == ([5, 6, 6], 1, 6)
    assert encoded.input_ids[2][-1] == tokenizer.sep_token_id
    assert encode(tokenizer, texts, None, None).lengths == [5, 6, 32]


def test_many_texts_are_as_each_alone(tokenizer):
    """They are read some at a time, of which only the last have a long one, or any token."""
    texts = [*["a film " * (1 + i % 7) for i in range(1500)], "plot " * 80]
    encoded = encode(tokenizer, texts, None, 40)
    assert (len(encoded.input_ids), encoded.truncated) == (1501, 1)
    expected = tokenizer(texts, truncation=True, max_length=40)
    assert list(encoded.input_ids) == expected["input_ids"]
    assert list(encoded.token_type_ids) == expected["token_type_ids"]
    assert encoded.lengths == list(map(len, expected["input_ids"]))
    assert encoded.samples(2) == [expected["input_ids"][i] for i in (1500, 6)]
    tokenizer._tokenizer.post_processor = None
    assert encode(tokenizer, [""] * 1200 + ["film"], None, 40).lengths == [1] * 1201


def test_texts_without_tokens(tokenizer):
    tokenizer._tokenizer.post_processor = None  # no special tokens, as many decoders' tokenizers have it
    encoded = encode(tokenizer, ["", "good film"], None, 64)
    assert list(encoded.input_ids) == [
        [tokenizer.pad_token_id],
        [tokenizer.convert_tokens_to_ids(w) for w in ("good", "film")],
    ]
    with pytest.raises(EmptyTextError, match="single token"):
        encode(tokenizer, ["", ""], None, 64)


@pytest.mark.parametrize(("name", "limit"), [("bert", 64), ("roberta", 64), ("t5", 64), ("llama", 64)])
def test_window(name, limit, make_backbone, tokenizer):
    """RoBERTa has a position more than it can use, T5 none at all."""
    model = SpinForSequenceClassification.from_backbone(make_backbone(name))
    assert window(tokenizer, model) == limit
    tokenizer.model_max_length = 16
    assert window(tokenizer, model) == 16
    tokenizer.model_max_length = 10**30
    assert window(tokenizer, model) == (None if name == "t5" else limit)


def test_a_tokenizer_without_padding(model, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(PadTokenError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        check_tokenizer(tokenizer, model)


def test_a_tokenizer_of_another_model(model, tokenizer):
    check_tokenizer(tokenizer, model)
    tokenizer.add_tokens([f"word{i}" for i in range(30)])
    with pytest.raises(TokenizerMismatchError, match=f"up to {len(tokenizer) - 1}.*embeds only 64"):
        check_tokenizer(tokenizer, model)


@pytest.mark.parametrize("place", [0, 6, 7, -8, -1])
def test_every_piece_of_a_weight_counts(place, model, encoded, monkeypatch):
    monkeypatch.setattr(extraction, "_PIECE", 7)
    weight = model.spin.backbone.get_submodule("encoder.layer.1.output.dense").weight
    before = fingerprint(model.spin, encoded, model.spin.taps, ["mean"], 100)
    with torch.no_grad():
        weight.view(-1)[place] += 1.0
    assert fingerprint(model.spin, encoded, model.spin.taps, ["mean"], 100) != before


@pytest.mark.parametrize("rows", [3, 4])
def test_batches_of_any_size_are_found_whole_unless_their_last_bit_changed(rows, tmp_path):
    tap, made = Tap("ffn", 1), np.random.default_rng(0).normal(size=(1, rows, 5)).astype(np.float32)
    store = FeatureStore(tmp_path, widths={tap: 5}, poolings=["mean"], batches=[range(rows)])
    store.create({})
    store.write(0, {tap: made})
    store.close()
    assert np.array_equal(store.read(tap, "mean").numpy(), made[0])
    assert store.whole([0], recorded(tmp_path, 1)) == [0]
    with (tmp_path / f"{tap}.f32").open("r+b") as file:
        file.seek(made.nbytes - 4)
        file.write(np.nextafter(made[0, -1, -1], np.float32(9)).tobytes())
    assert store.whole([0], recorded(tmp_path, 1)) == []


def test_fingerprint_tells_what_the_features_depend_on(model, make_backbone, tokenizer, sentiment_rows, encoded):
    def taken(spin=model.spin, encoded=encoded, taps=model.spin.taps, poolings=("mean", "max"), budget=BUDGET):
        return fingerprint(spin, encoded, taps, poolings, budget)

    other = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
    first = taken()
    assert first == taken(spin=other.spin) == taken(encoded=encode(tokenizer, sentiment_rows["text"][:20], None, 32))
    with torch.no_grad():
        other.spin.backbone.embeddings.word_embeddings.weight[63, 31] += 1e-6
    tokens = encode(tokenizer, [*sentiment_rows["text"][:19], "film"], None, 64)
    pairs = encode(tokenizer, sentiment_rows["text"][:20], ["film"] * 20, 64)
    elsewhere = SpinForSequenceClassification.from_backbone(make_backbone("bert"), ffn="attention.output.dense")
    relu = SpinForSequenceClassification.from_backbone(make_backbone("bert", hidden_act="relu"))
    others = [
        taken(spin=other.spin),
        taken(spin=elsewhere.spin),
        taken(spin=relu.spin),
        taken(encoded=tokens),
        taken(encoded=pairs),
        taken(encoded=extraction.Encoded(pairs.input_ids, encoded.token_type_ids, 64, 0)),
        taken(encoded=extraction.Encoded([[2, 0], [0, 0]], None, 64, 0)),
        taken(encoded=extraction.Encoded([[2, 0]], [[0, 0]], 64, 0)),
        taken(encoded=extraction.Encoded([[2], [0], [0, 0]], None, 64, 0)),
        taken(taps=model.spin.taps[1:]),
        taken(poolings=("max", "mean")),
        taken(budget=BUDGET + 1),
        taken(spin=model.spin.to(torch.bfloat16)),
    ]
    assert len({first, *others}) == len(others) + 1


@pytest.fixture
def forwards(model, monkeypatch):
    """Rows of each batch that the backbone was run on."""
    run, seen = model.spin.run_backbone, []

    def counted(ids, *arguments):
        seen.append(len(ids))
        return run(ids, *arguments)

    monkeypatch.setattr(model.spin, "run_backbone", counted)
    return seen


def test_a_killed_extraction_goes_on_where_it_stopped(model, encoded, open_store, forwards):
    with open_store(model, encoded, key="whole") as store:
        fill(model, encoded, store)
        whole = everything(store)
    batches = plan_batches(encoded.lengths, BUDGET)
    assert forwards == [len(rows) for rows in batches]
    forwards.clear()
    seen = []

    def killed(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_store(model, encoded) as store:
        fill(model, encoded, store, killed)
    torn = store.folder / "done.0"
    torn.write_text(torn.read_text()[:-5])  # killed in the middle of a line
    read = len(forwards)
    assert 3 <= read < len(batches)
    assert forwards == [len(rows) for rows in batches[:read]]
    forwards.clear()
    progress = []
    with open_store(model, encoded) as store:  # all that was read was written too, but for the torn one
        assert store.missing == list(range(read - 1, len(batches)))
        fill(model, encoded, store, progress.append)
        resumed = everything(store)
    assert forwards == [len(rows) for rows in batches[read - 1 :]]
    assert sum(progress) == sum(encoded.lengths[row] for rows in batches[read - 1 :] for row in rows)
    assert all(np.array_equal(resumed[key], whole[key]) for key in whole)
    with open_store(model, encoded) as store:
        assert not store.missing


@pytest.mark.parametrize("damage", ["bit", "page", "cut", "gone", "other"])
def test_what_the_disk_has_lost_is_computed_again(damage, model, encoded, open_store, forwards):
    with open_store(model, encoded) as store:
        fill(model, encoded, store)
        whole = everything(store)
    path, batches = store.folder / "hidden.1.f32", len(plan_batches(encoded.lengths, BUDGET))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-5000] ^= 16
    elif damage == "page":
        content[4096:8192] = bytes(4096)
    elif damage == "cut":
        del content[-4090:]
    elif damage == "other":
        content += bytes(9)
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    forwards.clear()
    with open_store(model, encoded) as store:
        lost = {"other": 0, "gone": batches}.get(damage, 1)
        assert len(store.missing) == lost
        fill(model, encoded, store)
        mended = everything(store)
    assert len(forwards) == lost
    assert all(np.array_equal(mended[key], whole[key]) for key in whole)


def test_some_columns_can_be_read(model, encoded, open_store):
    with open_store(model, encoded) as store:
        fill(model, encoded, store)
        tap = model.spin.taps[1]
        columns = np.array([3, 0, 7])
        assert np.array_equal(store.read(tap, "max", columns), store.read(tap, "max")[:, columns])
        values = sum(values.nbytes for values in everything(store).values())
        assert required_bytes(store.widths, POOLINGS, 20) == values
        filling = 4096 * len(store.widths) * len(store.batches)
        assert values <= store.bytes == sum(p.stat().st_size for p in store.folder.glob("*.f32")) <= values + filling


def test_a_small_batch_after_a_large_one_leaves_nothing_of_it(tmp_path):
    """Both are written from the same memory."""
    store, values = filled(tmp_path, [np.arange(7, 300), np.arange(2, 7), np.arange(2)])
    on_disk = np.fromfile(tmp_path / "ffn.1.f32", dtype=np.float32)
    assert np.count_nonzero(on_disk) == values.size
    assert sorted(store.whole(range(3), recorded(tmp_path, 3))) == [0, 1, 2]


@pytest.mark.parametrize("threads_from", [2**26, 0])
@pytest.mark.parametrize("at_once", [1, 3000, 2**23])  # bytes: a batch, some batches, all
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_what_is_read_in_groups_of_batches_and_by_threads_has_its_place(
    device, at_once, threads_from, tmp_path, monkeypatch
):
    sizes = [150, 3, 1, 40, 40, 40, 20, 2, 2, 2]
    store, values = filled(tmp_path, np.split(np.random.default_rng(1).permutation(300), np.cumsum(sizes)[:-1]))
    monkeypatch.setattr(store_module, "_AT_ONCE", at_once)
    monkeypatch.setattr(store_module, "_MUCH", threads_from)
    tap, there = Tap("ffn", 1), torch.device(device)
    for place, pooling in enumerate(store.poolings):
        assert np.array_equal(store.read(tap, pooling, device=there).cpu(), values[:, place])
        some = store.read(tap, pooling, np.array([4, 1]), device=there)
        assert some.device.type == device
        assert np.array_equal(some.cpu(), values[:, place, [4, 1]])


@pytest.mark.parametrize("most", [1, 300, 2**26])  # bytes for which one thread is enough: more threads than taps, some
def test_a_batch_is_the_same_by_however_many_threads_it_is_written(most, tmp_path, monkeypatch):
    widths = {Tap("hidden", 0): 3, Tap("ffn", 1): 7, Tap("hidden", 1): 3, Tap("ffn", 2): 7, Tap("hidden", 2): 3}
    draw, batches = np.random.default_rng(0), [np.array([2, 0]), np.array([1])]
    values = {tap: draw.normal(size=(2, 3, width)).astype(np.float32) for tap, width in widths.items()}
    for name, amount in (("one", 2**40), ("many", most)):
        monkeypatch.setattr(store_module, "_MUCH", amount)
        monkeypatch.setattr(store_module, "_THREADS", 8)
        store = FeatureStore(tmp_path / name, widths=widths, poolings=["mean", "max"], batches=batches)
        store.create({})
        for number, rows in enumerate(batches):
            store.write(number, {tap: own[:, rows] for tap, own in values.items()})
        store.close()
        for tap, own in values.items():
            assert np.array_equal(store.read(tap, "max"), own[1])
    assert recorded(tmp_path / "one", 2) == recorded(tmp_path / "many", 2)


def filled(folder, batches):
    """A store of a tap of five neurons and two poolings, and what it holds."""
    tap, rows = Tap("ffn", 1), sum(map(len, batches))
    values = np.random.default_rng(0).normal(size=(rows, 2, 5)).astype(np.float32)
    store = FeatureStore(folder, widths={tap: 5}, poolings=["mean", "max"], batches=batches)
    store.create({})
    for number, of_batch in enumerate(batches):
        store.write(number, {tap: values[of_batch].swapaxes(0, 1)})
    store.close()
    return store, values


@pytest.mark.parametrize(
    ("part", "tap"), [("embeddings.LayerNorm", r"hidden\.0"), ("encoder.layer.1.output.dense", r"hidden\.2")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_damaged_name_the_first_tap_that_shows_it(part, tap, value, model, encoded, open_store):
    with torch.no_grad():
        model.spin.backbone.get_submodule(part).bias[0] = value
    with pytest.raises(NonFiniteFeaturesError, match=f"Tap {tap} produced"), open_store(model, encoded) as store:
        fill(model, encoded, store)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_a_temporary_store_leaves_nothing_behind(fails, model, tokenizer, sentiment_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def watch(*arguments):
        seen.extend(tmp_path.glob("spin_hf_*/*.f32"))
        if fails:
            raise RuntimeError("out of memory")
        return extract(*arguments)

    monkeypatch.setattr("spin_hf.calibration.calibrate.extract", watch)
    data = sentiment_rows["text"][:40], sentiment_rows["label"][:40]
    options = {"progress": False, "kinds": ["hidden"], "poolings": ["mean"], "Cs": 2, "etas": [1.0]}
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            spin_calibrate(model, tokenizer, data, **options)
    else:
        spin_calibrate(model, tokenizer, data, **options)
    assert len(seen) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temporary", [False, True])
def test_a_disk_too_small_is_seen_before_the_work(temporary, model, encoded, open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    room = pytest.raises(OutputFolderError, match=r"0\.0 GB free, the features need .*cache_dir")
    with room, open_store(model, encoded, folder=None if temporary else tmp_path):
        pass
    assert not list(tmp_path.rglob("*.f32"))
    assert not list(tmp_path.glob("spin_hf_*"))


def test_a_folder_that_is_a_file(model, encoded, open_store, tmp_path):
    Path(tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputFolderError, match="cache_dir"),
        open_store(model, encoded, folder=tmp_path / "file"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_keeps_what_is_done(model, encoded, open_store, forwards):
    with open_store(model, encoded) as store:
        write = store.write

        def fills_up(number, *arguments, **more):
            if number == 2:
                store._files[model.spin.taps[0]] = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
            write(number, *arguments, **more)

        store.write = fills_up
        with pytest.raises(OutputFolderError, match="No space left.*goes on from what is there"):
            fill(model, encoded, store)
    assert len(forwards) < len(store.batches)  # it ended soon
    with open_store(model, encoded) as store:
        assert store.missing == list(range(2, len(store.batches)))


def test_a_store_that_is_being_filled_is_refused_and_a_whole_one_shared(model, encoded, open_store, run_python):
    other = """
import sys, pathlib
from contextlib import ExitStack
from spin_hf.calibration.cache import _hold
held = ExitStack()
_hold(pathlib.Path(sys.argv[1]), held)
print("held", flush=True)
sys.stdin.read()
"""
    with open_store(model, encoded) as store:
        pass  # nothing filled
    process = subprocess.Popen(
        [sys.executable, "-c", other, str(store.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StoreInUseError, match=f"process {process.pid} on .*Wait for it"), open_store(model, encoded):
        pass
    assert [found.in_use for found in list_stores(store.folder.parent)] == [True]
    with pytest.raises(StoreInUseError):
        clear_store(list_stores(store.folder.parent)[0])
    process.kill()  # a lock dies with its process
    process.communicate()
    with open_store(model, encoded) as store:
        fill(model, encoded, store)
        with open_store(model, encoded) as second:
            assert not second.missing
            assert np.array_equal(second.read(model.spin.taps[0], "mean"), store.read(model.spin.taps[0], "mean"))


def test_stores_are_listed_and_cleared(model, encoded, open_store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "store.json").write_text("[]")
    with open_store(model, encoded, key="first") as store:
        extract(model.spin, encoded, store, [0, 1], 0, lambda tokens: None)
    with open_store(model, encoded, key="second") as second:
        fill(model, encoded, second)
    found = {each.folder.name: each for each in list_stores(tmp_path)}
    assert set(found) == {"first", "second"}
    assert found["first"].done == 2 / len(store.batches)
    assert found["second"].done == 1.0
    assert found["second"].texts == 20
    assert found["second"].bytes >= second.bytes > found["first"].bytes
    assert not found["second"].in_use
    for each in found.values():
        clear_store(each)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
