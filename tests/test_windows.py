"""Texts longer than the window: how they are cut, that the poolings are those of all tokens, and what reads them."""

import json
import random

import numpy as np
import pytest
import torch
from builders import BAD, CONFIGS, GOOD, NEUTRAL, POOLINGS, SIZE, calibrated, make_backbone, make_tokenizer
from census.checks import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import T5Model, pipeline
from typer.testing import CliRunner

from spin_hf import CheckpointError, SpinClassifier, SpinConfig, SpinForSequenceClassification, spin_calibrate
from spin_hf.attention import source
from spin_hf.calibration import CalibrationError
from spin_hf.calibration.errors import TextPairError
from spin_hf.calibration.extraction import encode, extract, fingerprint, plan_batches
from spin_hf.calibration.store import FeatureStore
from spin_hf.calibration.windowing import make_windows
from spin_hf.cli import app
from spin_hf.layout import PositionsError
from spin_hf.prediction import evaluate, predict
from spin_hf.taps import tap_width
from spin_hf.training import store_features
from spin_hf.windows import Windows, plan_windows

QUICK = {"progress": False, "poolings": ["mean", "max"], "validation_fraction": 0.2, "Cs": 3, "etas": (1.0,)}
LENGTHS = (5, 12, 13, 40, 97)  # of texts; the window below is one of 12


@st.composite
def cases(draw):
    before, after, room = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 9))
    windows = Windows(before + room + after, draw(st.integers(0, room - 1)), before, after)
    return windows, draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))


def right_padded(lengths):
    return (torch.arange(max(*lengths, 1)) < torch.tensor(lengths)[:, None]).long()


@given(cases())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_every_token_is_pooled_once(case):
    windows, lengths = case
    plan = plan_windows(right_padded(lengths), windows)
    pooled = [[] for _ in lengths]
    for text, place, own in zip(plan.text[:, 0].tolist(), plan.place, plan.pooled, strict=True):
        pooled[text] += place[own].tolist()
    assert pooled == [list(range(tokens)) for tokens in lengths]
    assert not plan.pooled[plan.mask == 0].any()
    shares = plan.share.split(plan.counts.tolist())
    assert [float(share.sum()) for share in shares] == pytest.approx([float(tokens > 0) for tokens in lengths])


@given(cases())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_every_window_is_a_piece_between_the_special_tokens(case):
    windows, lengths = case
    plan = plan_windows(right_padded(lengths), windows)
    rows = [(int(t), p[m == 1].tolist()) for t, p, m in zip(plan.text, plan.place, plan.mask, strict=True)]
    for text, tokens in enumerate(lengths):
        found = [places for number, places in rows if number == text]
        if tokens <= windows.size:
            assert found == [list(range(tokens))]
            continue
        inner = tokens - windows.after
        pieces = [places[windows.before : windows.size - windows.after] for places in found]
        for places, piece in zip(found, pieces, strict=True):
            assert len(places) == windows.size
            assert piece == list(range(piece[0], piece[0] + windows.room))
            assert places[: windows.before] == list(range(windows.before))
            assert places[windows.size - windows.after :] == list(range(inner, tokens))
        assert (pieces[0][0], pieces[-1][-1]) == (windows.before, inner - 1)
        shared = [len({*one} & {*other}) for one, other in zip(pieces, pieces[1:], strict=False)]
        assert windows.overlap <= min(shared) < windows.room
        assert max(shared) - min(shared) <= 1  # evenly spaced


def by_hand(spin, ids, windows):
    """For each tap and pooling the values of one text: a loop over windows, each alone, and over its tokens.

    A token is taken from the window where it stands farthest from a cut; of two equal ones from the later.
    """
    tokens, inner = len(ids), len(ids) - windows.after
    best = [(-1, None)] * tokens
    for start in windows.starts(tokens):
        end = min(start + windows.before + windows.room, inner)
        places = [*range(windows.before), *range(start + windows.before, end), *range(inner, tokens)]
        if tokens <= windows.size:
            places = [*range(tokens)]
        values = {}
        row, mask = torch.tensor([[ids[place] for place in places]]), torch.ones(1, len(places), dtype=torch.long)
        with torch.no_grad(), spin.hooked(spin.taps), spin.recording(spin.taps, values.__setitem__, mask):
            spin.run_backbone(row, mask)
        for column, place in enumerate(places):
            left = place - start - windows.before if start else 10**6
            right = end - 1 - place if end < inner else 10**6
            if place < windows.before:
                left = right = 10**6 if start == 0 else -2
            if place >= inner:
                left = right = 10**6 if end == inner else -2
            if min(left, right) >= best[place][0]:
                best[place] = (min(left, right), {tap: value[0, column] for tap, value in values.items()})
    rows = {tap: torch.stack([values[tap] for _, values in best]) for tap in spin.taps}
    pool = {"mean": lambda v: v.mean(0), "max": lambda v: v.amax(0), "first": lambda v: v[0], "last": lambda v: v[-1]}
    found = {(tap, pooling): pool[pooling](value) for tap, value in rows.items() for pooling in POOLINGS}
    for group in spin.feature_groups():
        if group.query is not None:
            weights = (rows[source(group.tap)] @ group.query).softmax(0)
            found[group.tap, group.pooling] = weights @ rows[group.tap]
    return found


def texts(lengths=LENGTHS, seed=0):
    choose = random.Random(seed)
    return [[2, *choose.choices(range(4, SIZE), k=length - 2), 3] for length in lengths]


def batch_of(ids, *, left=False):
    longest = max(map(len, ids))
    fill = [[0] * (longest - len(row)) for row in ids]
    ones = [[1] * len(row) for row in ids]
    rows, masks = (
        [more + row if left else row + more for row, more in zip(some, fill, strict=True)] for some in (ids, ones)
    )
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


@pytest.mark.parametrize("overlap", [0, 3, 8])
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "t5", "both"])
def test_the_features_are_those_of_a_loop_over_windows(name, overlap):
    if name == "both":
        model = calibrated(T5Model(CONFIGS["t5"]()).eval(), stacks="both")
    else:
        model = calibrated(make_backbone(name))
    windows = Windows(12, overlap, 1, 1)
    model.config.windows = windows.to_dict()
    ids = texts()
    features = model(**batch_of(ids), output_features=True).features
    found = features * model.spin.standardizer.scale + model.spin.standardizer.mean
    for row, text in zip(found, ids, strict=True):
        oracle = by_hand(model.spin, text, windows)
        wanted = [oracle[group.tap, group.pooling][group.neurons] for group in model.spin.feature_groups()]
        torch.testing.assert_close(row, torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.fixture
def model():
    made = calibrated(make_backbone("bert"))
    made.config.windows = Windows(12, 3, 1, 1).to_dict()
    return made


@pytest.mark.parametrize("batching", ["padded", "equal_length", "single"])
def test_a_text_gets_the_same_logits_in_any_batch(model, batching):
    model.config.batching = batching
    ids = texts([*LENGTHS, 40])
    alone = torch.cat([model(**batch_of([row])).logits for row in ids])
    for left in (False, True):
        torch.testing.assert_close(model(**batch_of(ids, left=left)).logits, alone, rtol=1e-4, atol=1e-4)
    embeds = model.get_input_embeddings()(batch_of(ids)["input_ids"])
    mask = batch_of(ids)["attention_mask"]
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batching", "most"), [("padded", 6), ("equal_length", 6), ("single", 1)])
def test_the_windows_that_run_together(model, batching, most, monkeypatch):
    """No more than there are texts, or fit into 4096 tokens."""
    monkeypatch.setattr("spin_hf.windows._TOKENS_AT_ONCE", 6 * 12)
    model.config.batching = batching
    shapes = []
    model.spin.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model(**batch_of(texts()))
    assert max(rows for rows, _ in shapes) == most
    assert max(tokens for _, tokens in shapes) == 12


def test_compiled_it_makes_no_graph_for_each_length(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = torch.compile(model, backend="eager"), []
    for lengths in ((5, 9), (14, 40), (30, 13, 50), (20, 45), (33, 60), (64, 12, 55)):
        with torch.no_grad():
            assert torch.equal(compiled(**batch_of(texts(lengths))).logits, model(**batch_of(texts(lengths))).logits)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1]


def test_texts_that_fit_are_read_as_without_windows(model):
    ids = texts([5, 9, 12])
    cut = [model(**batch_of([row])).logits for row in ids]
    beside_a_long_one = model(**batch_of([*ids, *texts([50])])).logits[:3]
    model.config.windows = None
    whole = [model(**batch_of([row])).logits for row in ids]
    assert all(torch.equal(one, other) for one, other in zip(cut, whole, strict=True))
    torch.testing.assert_close(beside_a_long_one, torch.cat(whole), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_token(model):
    model.unfreeze_backbone()
    embeds = model.get_input_embeddings()(torch.tensor(texts([40]))).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=torch.tensor([1])).loss.backward()
    assert (embeds.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is not None for p in model.spin.backbone.encoder.parameters())


def test_positions_of_ones_own(model):
    positions = torch.arange(40)[None]
    with pytest.raises(ValueError, match="Leave position_ids out"):
        model(**batch_of(texts([40])), position_ids=positions)
    model(**batch_of(texts([12])), position_ids=positions[:, :12])


def test_a_backbone_with_other_positions_than_tokens(rows):
    made = calibrated(make_model("canine"), poolings=("mean",))
    made.config.windows = Windows(12, 3, 1, 1).to_dict()
    with pytest.raises(PositionsError, match="Calibrate it without windows=True"):
        made(**batch_of(texts([40])))
    model = SpinForSequenceClassification.from_backbone(make_model("canine"))
    with pytest.raises(CalibrationError, match="CanineModel works on other positions than its tokens"):
        spin_calibrate(model, make_tokenizer(), rows, **QUICK, windows=True, max_length=16)


# -- calibration and use -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    """Texts of 70 to 120 words, whose label is told near the end alone, where cutting at 64 tokens loses it."""
    choose = random.Random(0)
    found = []
    for row in range(80):
        words = choose.choices(NEUTRAL, k=choose.randint(70, 120))
        found.append(" ".join([*words, *choose.choices(GOOD if row % 2 else BAD, k=14)]))
    return found, [row % 2 for row in range(80)]


def calibrate(rows, backbone="bert", tokenizer=None, **options):
    model = SpinForSequenceClassification.from_backbone(make_backbone(backbone), labels=["bad", "good"])
    tokenizer = tokenizer or make_tokenizer()
    train, held_out = (([*part[:52]] for part in rows), ([*part[52:]] for part in rows))
    result = spin_calibrate(model, tokenizer, tuple(train), tuple(held_out), **{**QUICK, **options})
    return model, tokenizer, result


@pytest.fixture(scope="module")
def made(rows):
    return calibrate(rows, windows=True)


def test_what_stands_beyond_the_window_is_read(made, rows):
    model, tokenizer, result = made
    _, _, cut = calibrate(rows)
    assert result.chosen.score >= 0.9 > cut.chosen.score
    assert (cut.data["truncated"], cut.data["windows"]) == (80, None)
    assert (result.data["truncated"], result.data["max_length"]) == (0, None)
    assert result.data["windows"] == {"size": 64, "overlap": 15, "before": 1, "after": 1, "texts": 80}
    assert "80 texts were read in windows of 64 tokens that share 15 or more." in str(result)
    assert model.config.windows == {"size": 64, "overlap": 15, "before": 1, "after": 1}
    prediction = predict(model, tokenizer, rows[0][52:])
    assert prediction.truncated == 0
    assert evaluate(prediction, np.array(rows[1][52:]))["accuracy"] == pytest.approx(result.chosen.score)


@pytest.mark.parametrize("batching", ["padded", "equal_length", "single"])
def test_calibration_reads_what_use_reads(made, rows, batching, tmp_path, monkeypatch):
    model, tokenizer, _ = made
    monkeypatch.setattr(model.config, "batching", batching)
    windows = Windows(**model.config.windows)
    encoded = encode(tokenizer, [*rows[0][:6], "a film"], None, 64, windows)
    widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in model.spin.taps}
    batches = plan_batches(encoded.lengths, 300, batching)
    store = FeatureStore(tmp_path, widths=widths, poolings=POOLINGS, batches=batches)
    store.create({})
    extract(model.spin, encoded, store, range(len(batches)), 0, lambda tokens: None)
    used = store_features(model, tokenizer, ([*rows[0][:6], "a film"], [0, 1] * 3 + [0]))["features"]
    kept = [store.read(g.tap, g.pooling, g.neurons.numpy()) for g in model.spin.feature_groups()]
    read = model.spin.standardizer(torch.from_numpy(np.concatenate(kept, 1)))
    torch.testing.assert_close(read, torch.as_tensor(used[:]), rtol=1e-4, atol=1e-4)


def test_the_windows_are_part_of_what_features_depend_on(made, rows):
    model, tokenizer, _ = made
    keys = set()
    for windows in (None, Windows(64, 15, 1, 1), Windows(64, 16, 1, 1)):
        encoded = encode(tokenizer, rows[0][:4], None, None, windows)
        keys.add(fingerprint(model.spin, encoded, model.spin.taps, ["mean"], 100))
    assert len(keys) == 3


def test_a_pipeline_reads_whole_texts(made, rows):
    model, tokenizer, _ = made
    texts = [*rows[0][52:58], "a lovely film"]
    wanted = predict(model, tokenizer, texts)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    for options in ({}, {"truncation": True}, {"batch_size": 4}):
        for found, row in zip(classify(texts, **options), range(len(texts)), strict=True):
            scores = {entry["label"]: entry["score"] for entry in found}
            assert scores == pytest.approx(wanted.row(row)["scores"], abs=1e-5)


FRESH = """
import sys
place, folder = sys.argv[1:]
if place == "without":
    sys.modules["spin_hf"] = None  # importing it fails from here on
else:
    import spin_hf
import json
import torch, transformers

torch.set_num_threads(1)
options = {"trust_remote_code": True} if place == "without" else {}
text = open(folder + "/text.txt").read()
classify = transformers.pipeline("text-classification", folder, device="cpu", top_k=None, **options)
tokens = transformers.AutoTokenizer.from_pretrained(folder, **options)(text, truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = classify.model(**tokens).logits[0].tolist()
print(json.dumps([logits, {row["label"]: row["score"] for row in classify(text)[0]}]))
"""


@pytest.mark.parametrize(("place", "form"), [("fresh", "full"), ("without", "self_contained")])
def test_a_fresh_process(made, rows, place, form, tmp_path, run_python):
    model, tokenizer, _ = made
    model.save_pretrained(tmp_path, form=form)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(rows[0][60])
    wanted = predict(model, tokenizer, [rows[0][60]])
    logits, scores = json.loads(run_python(FRESH, place, tmp_path))
    assert logits == wanted.logits[0].tolist()
    assert scores == pytest.approx(wanted.row(0)["scores"], abs=1e-6)


def test_a_checkpoint_from_before_windows(tmp_path):
    calibrated(make_backbone("bert")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("windows") is None
    path.write_text(json.dumps(values))
    assert SpinForSequenceClassification.from_pretrained(tmp_path).config.windows is None


def test_calibrating_again_without_windows(made, rows, tmp_path):
    model, tokenizer, _ = made
    model.save_pretrained(tmp_path)
    again = SpinForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    result = spin_calibrate(again, tokenizer, rows, **QUICK, recalibrate=True)
    assert again.config.windows is None
    assert (again.config.max_text_tokens, tokenizer.model_max_length, result.data["truncated"]) == (64, 64, 80)


def test_a_backbone_whose_batches_are_of_one_length(rows):
    model = SpinForSequenceClassification.from_backbone(make_model("fnet"))
    tokenizer = make_tokenizer()
    result = spin_calibrate(model, tokenizer, rows, **QUICK, windows=True, max_length=16, depths=[2])
    assert model.config.batching == "equal_length"
    assert result.data["windows"]["size"] == 16
    ids = tokenizer(rows[0][:3], padding=True, return_tensors="pt")
    together = model(**ids).logits.detach().numpy()
    np.testing.assert_allclose(predict(model, tokenizer, rows[0][:3]).logits, together, rtol=1e-4, atol=1e-4)


def test_the_estimator(rows):
    tokenizer = make_tokenizer()
    options = {"Cs": 3, "etas": (1.0,), "device": "cpu"}
    made = SpinClassifier(make_backbone("bert"), tokenizer=tokenizer, windows=True, overlap=30, **options)
    made.fit(*rows)
    assert made.model_.config.windows == {"size": 64, "overlap": 30, "before": 1, "after": 1}
    assert made.score(*rows) >= 0.9
    assert tokenizer.model_max_length == SIZE  # the next fit may be without windows


# -- what can't be cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 5}, r"overlap=5 is for texts in windows: pass windows=True too"),
        ({"windows": 128}, r"windows must be True or False; got 128. Their size is max_length="),
        ({"windows": True, "overlap": 62}, r"overlap=62 must be smaller than the 62 tokens that a window of 64 has"),
        ({"windows": True, "overlap": 10, "max_length": 12}, r"overlap=10 must be smaller than the 10 tokens"),
        ({"windows": True, "overlap": -1}, r"overlap must be at least 0; got -1"),
        ({"windows": True, "overlap": 0.5}, r"overlap must be a whole number; got 0.5"),
        ({"windows": True, "max_length": 65}, r"max_length=65 must be more than the 2 special tokens .* at most 64"),
    ],
)
def test_options_that_do_not_fit(rows, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(rows, **options)


def test_sentence_pairs(rows):
    pairs = {"text": rows[0], "text_pair": rows[0], "label": rows[1]}
    model = SpinForSequenceClassification.from_backbone(make_backbone("bert"))
    with pytest.raises(TextPairError, match="windows=True is for single texts"):
        spin_calibrate(model, make_tokenizer(), pairs, text_column=["text", "text_pair"], windows=True, **QUICK)


def test_models_without_a_limit(rows):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 10**30
    with pytest.raises(CalibrationError, match=r"needs the size of a window: .*windows=True, max_length=512"):
        calibrate(rows, "t5", tokenizer, windows=True)
    model, _, result = calibrate(rows, "t5", tokenizer, windows=True, max_length=32)
    assert result.data["windows"] == {"size": 32, "overlap": 7, "before": 1, "after": 1, "texts": 80}
    assert predict(model, tokenizer, rows[0][:2]).truncated == 0


@pytest.mark.parametrize(
    ("template", "found"),
    [("$A", (0, 0)), ("[CLS] $A", (1, 0)), ("$A [SEP] [CLS]", (0, 2)), ("[CLS] $A [SEP]", (1, 1))],
)
def test_special_tokens_are_found(tokenizer, template, found):
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    windows = make_windows(tokenizer, 10, None)
    assert (windows.before, windows.after) == found
    assert windows.overlap == (10 - sum(found)) // 4


def test_a_tokenizer_that_does_not_put_them_around():
    class Odd:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5, 9, 6] if add_special_tokens else [5, 6]}

    with pytest.raises(CalibrationError, match=r"Odd does not put its special tokens around the text"):
        make_windows(Odd(), 10, None)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 12, "overlap": 10, "before": 1, "after": 1},
        {"size": 12, "overlap": -1, "before": 1, "after": 1},
        {"size": 12.0, "overlap": 1, "before": 1, "after": 1},
        {"size": 12, "overlap": 1},
        12,
    ],
)
def test_a_config_by_which_no_text_could_be_cut(values):
    with pytest.raises(CheckpointError, match="`windows` should look like"):
        SpinConfig(windows=values)


def test_the_command_line(rows, tmp_path):
    make_backbone("bert").save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(*rows, strict=True))
    command = ["calibrate", str(tmp_path / "backbone"), "--train", str(tmp_path / "train.jsonl"), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--pooling", "mean"]
    failed = CliRunner().invoke(app, [*command, "--overlap", "4"])
    assert failed.exit_code == 2
    assert "--overlap 4 is for texts in windows: pass --windows too." in failed.stderr
    done = CliRunner().invoke(app, [*command, "--windows", "--overlap", "4"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["windows"]["overlap"] == 4
    assert (
        "Texts of more than 64 tokens are read in overlapping windows" in (tmp_path / "out" / "README.md").read_text()
    )
    found = CliRunner().invoke(app, ["predict", str(tmp_path / "out"), rows[0][0], "--device", "cpu"])
    wanted = predict(SpinForSequenceClassification.from_pretrained(tmp_path / "out"), make_tokenizer(), rows[0][:1])
    assert json.loads(found.stdout)["scores"] == pytest.approx(wanted.row(0)["scores"], abs=1e-5)
