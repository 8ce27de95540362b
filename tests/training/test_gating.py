"""Gates: what they do to the loss, how they close, through files, and what is left after pruning."""

import copy

import pytest
import torch
from builders import calibrated, make_backbone, make_batch, make_tokenizer
from test_trainer import same_weights, trainer
from transformers import Trainer, TrainingArguments

from spin_hf import NotCalibratedError, SpinForSequenceClassification, spin_calibrate
from spin_hf.calibration.errors import UnknownLabelError
from spin_hf.gates import SPEED
from spin_hf.prediction import predict
from spin_hf.training import add_gates, prune_gates, store_features

LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture
def model(bert_backbone):
    return calibrated(bert_backbone, poolings=("max", "mean"))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**make_batch()).logits


def close(model, taps, *, but=()):
    """Close the gates of some taps, and set the others to half and more."""
    with torch.no_grad():
        model.gates.weight.copy_(torch.linspace(0.5, 1.5, model.config.num_features))
        start = 0
        for group in model.spin.feature_groups():
            if str(group.tap) in taps:
                model.gates.weight[start : start + len(group.neurons)] = -0.1
            start += len(group.neurons)
        for index in but:
            model.gates.weight[index] = 0.7


def test_open_gates_change_nothing_but_the_training_loss(model):
    before = logits(model)
    loss = model(**make_batch(), labels=LABELS).loss
    add_gates(model, penalty=0.25)
    assert torch.equal(logits(model), before)
    assert torch.equal(model(**make_batch(), labels=LABELS).loss, loss)
    priced = model.train()(**make_batch(), labels=LABELS).loss
    torch.testing.assert_close(priced, loss + 0.25 * model.config.num_features)
    priced.backward()
    assert model.gates.weight.grad.shape == (model.config.num_features,)


def test_a_step_is_the_proximal_step_of_the_penalty():
    """The oracle: soft thresholding, written out."""
    model = calibrated(make_backbone("bert"), poolings=("mean",))
    add_gates(model, penalty=0.3)
    plain = copy.deepcopy(model)
    plain.gates.strength = 0.0
    plain.train()(**make_batch(), labels=LABELS).loss.backward()
    with torch.no_grad():
        model.gates.weight.copy_(torch.linspace(0, 0.2, model.config.num_features))
        plain.gates.weight.copy_(model.gates.weight)
    plain.zero_grad()
    plain(**make_batch(), labels=LABELS).loss.backward()
    moved = plain.gates.weight.detach() - 0.05 * plain.gates.weight.grad
    expected = SPEED * (moved - 0.05 * 0.3 * SPEED).clamp(min=0)
    optimizer = torch.optim.SGD([model.gates.weight], lr=0.05)
    model.train()(**make_batch(), labels=LABELS).loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.gates.values(), expected)
    assert 0 < int((expected == 0).sum()) < len(expected)


def test_a_closed_gate_can_open_again(model):
    add_gates(model)
    with torch.no_grad():
        model.gates.weight.fill_(-5.0)
    model.train()(**make_batch(), labels=LABELS).loss.backward()
    assert not model.gates.weight.any()  # put back to the border
    assert (model.gates.weight.grad < 0).any()


def test_pruning_predicts_as_before_and_cuts_the_backbone(model, tmp_path):
    add_gates(model)
    close(model, ["ffn.3", "hidden.2", "hidden.3"])
    expected, count = logits(model), int((model.gates.weight > 0).sum())
    assert prune_gates(model) == count == model.config.num_features == model.score.in_features
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert model.spin.depth == 2
    assert {entry["tap"] for entry in model.config.features} == {"hidden.0", "ffn.1", "hidden.1", "ffn.2"}
    assert model.gates is None
    model.save_pretrained(tmp_path)
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.gate_penalty is None
    assert same_weights(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_single_neurons_are_pruned(model):
    add_gates(model)
    close(model, {str(part.tap) for part in model.spin.groups}, but=[1, 4])
    before = model.spin.feature_groups()
    expected = logits(model)
    assert prune_gates(model) == 2
    (first, second) = model.spin.feature_groups()
    assert (first.tap, first.pooling, first.neurons.tolist()) == (*before[0][:2], [int(before[0].neurons[1])])
    assert (second.tap, second.pooling, second.neurons.tolist()) == (*before[1][:2], [int(before[1].neurons[1])])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert model.spin.depth == 1


@pytest.mark.parametrize("name", ["albert", "llama"])
def test_other_backbones_are_cut_where_they_can_be(name):
    """The final norm is read above the last block, so that it holds the blocks."""
    model = calibrated(make_backbone(name), poolings=("mean",))
    add_gates(model)
    close(model, {"ffn.2", "hidden.2", "ffn.3", "hidden.3"})
    expected = logits(model)
    prune_gates(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert model.spin.depth == (3 if name == "llama" else 1)


def test_a_gated_model_goes_through_files_in_full_precision(model, tmp_path, run_python):
    add_gates(model, penalty=0.02)
    close(model, ["ffn.3"])
    model.save_pretrained(tmp_path / "model")
    loaded = SpinForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.gates.weight.dtype == loaded.bfloat16().gates.weight.dtype == torch.float32
    assert torch.equal(loaded.gates.weight, model.gates.weight)
    assert (loaded.gates.strength, loaded.config.gate_penalty) == (0.02, 0.02)
    torch.save({**make_batch(), "expected": logits(model)}, tmp_path / "batch.pt")
    run_python(
        "import sys, torch, spin_hf, transformers;"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]);"
        "batch = torch.load(sys.argv[2]); expected = batch.pop('expected');"
        "assert torch.equal(model(**batch).logits, expected)",
        tmp_path / "model",
        tmp_path / "batch.pt",
    )


def test_trainer_closes_gates_and_resumes(model, sentiment_rows, tmp_path):
    add_gates(model, penalty=0.03)
    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    options = {"num_train_epochs": 10, "save_strategy": "steps", "save_steps": 20, "learning_rate": 0.02}
    trainer(whole, sentiment_rows, tmp_path, **options).train()
    trainer(resumed, sentiment_rows, tmp_path / "resumed", **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-20")
    )
    assert same_weights(resumed, whole)
    kept = int((whole.gates.values() > 0).sum())
    assert 0 < kept < whole.config.num_features
    tokenizer = make_tokenizer()
    expected = predict(whole, tokenizer, sentiment_rows["text"]).logits
    assert prune_gates(whole) == kept
    found = predict(whole, tokenizer, sentiment_rows["text"]).logits
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_misuse(bert_backbone, model):
    with pytest.raises(NotCalibratedError, match="spin_calibrate"):
        add_gates(SpinForSequenceClassification.from_backbone(make_backbone("bert")))
    with pytest.raises(ValueError, match="no gates"):
        prune_gates(model)
    for penalty in (0, -1.0, float("nan"), "high"):
        with pytest.raises(ValueError, match="penalty must be a positive number"):
            add_gates(model, penalty=penalty)
    add_gates(model)
    with pytest.raises(ValueError, match="has gates already"):
        add_gates(model)
    with torch.no_grad():
        model.gates.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="penalty=0.001 is too high"):
        prune_gates(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- stored features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_training_on_stored_features_is_training_on_texts(model, sentiment_rows, tmp_path, gated, monkeypatch):
    if gated:
        add_gates(model, penalty=0.01)
    other = copy.deepcopy(model)
    data = {name: values[:64] for name, values in sentiment_rows.items()}
    trainer(model, sentiment_rows, tmp_path, learning_rate=0.01).train()
    stored = store_features(other, make_tokenizer(), data)
    assert stored.column_names == ["features", "labels"]
    monkeypatch.setattr(other.spin, "run_backbone", lambda *args, **kwargs: pytest.fail("the backbone ran"))
    options = {"learning_rate": 0.01, "num_train_epochs": 2, "per_device_train_batch_size": 16}
    settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_strategy="no", **options)
    run = Trainer(other, settings, train_dataset=stored, eval_dataset=stored)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    torch.testing.assert_close(other.score.weight, model.score.weight, rtol=1e-3, atol=1e-4)


def test_stored_labels_are_the_models(tokenizer, sentiment_rows):
    model = SpinForSequenceClassification.from_backbone(
        make_backbone("bert"), problem_type="multi_label_classification"
    )
    texts = sentiment_rows["text"]
    rows = (texts, [[word for word in ("the", "a", "film") if word in text.split()] for text in texts])
    spin_calibrate(model, tokenizer, rows, progress=False, Cs=3, etas=(1.0,), poolings=["mean"])
    stored = store_features(model, tokenizer, rows)
    assert stored[0]["labels"].dtype == torch.float32
    named = [sorted(model.config.id2label[i] for i in row.nonzero()[:, 0].tolist()) for row in stored["labels"][:]]
    assert named == [sorted(row) for row in rows[1]]
    loss = model(features=stored["features"][:8], labels=stored["labels"][:8]).loss
    batch = tokenizer(texts[:8], padding=True, return_tensors="pt")
    torch.testing.assert_close(model(**batch, labels=stored["labels"][:8]).loss, loss, rtol=1e-4, atol=1e-5)


def test_features_that_can_not_be_used(model, tokenizer, sentiment_rows):
    with pytest.raises(ValueError, match=r"features should be \(batch, 42\), not \(2, 3\)"):
        model(features=torch.zeros(2, 3))
    with pytest.raises(UnknownLabelError):
        store_features(model, tokenizer, (sentiment_rows["text"][:2], ["ugly", "LABEL_0"]))
    model.unfreeze_backbone()
    with pytest.raises(ValueError, match="freeze_backbone"):
        store_features(model, tokenizer, sentiment_rows)
