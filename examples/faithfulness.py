"""Whether the words and neurons that an explanation names are those that the answers rest on.

Words of test texts are erased in the order of SPIN's exact parts, of integrated gradients and at random, and the
classifier answers again: deletion and insertion curves, comprehensiveness and sufficiency (see
``spin_hf.explain.faithfulness``). Then the heaviest neurons of the head are held at zero inside the backbone, against
as many random ones of the same taps, and random ones that are as active. Two heads tell what that does: SPIN's own,
which reads those neurons, and a logistic regression on the mean of the last block's output, which was fitted on other
texts and knows of them only by what the blocks in between make of them.

    python examples/faithfulness.py FOLDER --data DATA --set sst2 --name minilm-sst2
    python examples/faithfulness.py --show
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import draw, load
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spin_hf.attention import pooling_title
from spin_hf.explain import (
    ablated,
    erasure,
    explain,
    integrated_gradients,
    random_neurons,
    salient_neurons,
    tap_means,
    word_scores,
)
from spin_hf.explain.charts import Chart, Series
from spin_hf.explain.faithfulness import ERASER
from spin_hf.explain.paper_figures import save_figures
from spin_hf.loading import load_classifier
from spin_hf.pooling import pool
from spin_hf.prediction import batches, encode_for

FOLDER = Path(__file__).parent / "findings"
SHARES = (*ERASER, 0.75)
MEASURES = ("comprehensiveness", "sufficiency", "deletion area", "insertion area")
WORDS = {"spin": "SPIN's parts", "gradients": "integrated gradients", "random": "random order"}
NEURONS = {"salient": "heaviest in the head", "random": "random, same taps", "active": "random, as active"}
READERS = {"spin": "SPIN's head", "last": "head on the last block"}
CS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error over texts."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


# -- words -------------------------------------------------------------------------------------------------------------


def words(model: Any, tokenizer: Any, texts: list[str], options: Any) -> dict[str, Any]:
    found = explain(model, tokenizer, texts)
    gradients = integrated_gradients(model, tokenizer, found, steps=options.steps)
    orders = {"spin": [word_scores(found)], "gradients": [gradients.scores]}
    rng = np.random.default_rng(options.seed)
    orders["random"] = [[rng.random(len(row.words)) for row in found] for _ in range(options.orders)]
    measured = {name: over_orders(model, tokenizer, found, scores) for name, scores in orders.items()}
    rows = {name: {m: mean_error(own[m]) for m in MEASURES} for name, own in measured.items()}
    against = {
        other: {m: mean_error(measured["spin"][m] - measured[other][m]) for m in MEASURES}
        for other in ("gradients", "random")
    }
    return {
        "texts": len(texts),
        "words": float(np.mean([sum(not word.special for word in row.words) for row in found])),
        "poolings": sorted({pooling_title(entry["pooling"]) for entry in model.config.features}),
        "steps": options.steps,
        "gap": float(np.median(gradients.gaps)),
        "random orders": options.orders,
        "shares": [0, *SHARES, 1],
        "measures": rows,
        "spin less": against,
        "curves": {
            name: {curve: [mean_error(column) for column in own[curve].T] for curve in ("deletion", "insertion")}
            for name, own in measured.items()
        },
    }


def over_orders(model: Any, tokenizer: Any, found: Any, orders: list[Any]) -> dict[str, np.ndarray]:
    """Each measure for each text, the mean over the orders."""
    erased = [erasure(model, tokenizer, found, scores, shares=SHARES) for scores in orders]
    usual = len(ERASER)
    own = [
        {
            "comprehensiveness": each.whole - each.without[:, :usual].mean(1),
            "sufficiency": each.whole - each.alone[:, :usual].mean(1),
            "deletion area": each.area(each.deletion),
            "insertion area": each.area(each.insertion),
            "deletion": each.deletion,
            "insertion": each.insertion,
        }
        for each in erased
    ]
    return {name: np.mean([each[name] for each in own], 0) for name in own[0]}


# -- neurons -----------------------------------------------------------------------------------------------------------


def read(model: Any, tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """From one pass: the classifier's logits, and the mean of the last block's output."""
    encoded = encode_for(model, tokenizer, texts, None)
    outputs: list[torch.Tensor] = []
    hook = model.spin.backbone.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    logits, last = [np.empty(0)] * len(texts), [np.empty(0)] * len(texts)
    try:
        for rows, batch in batches(model, tokenizer, encoded, 4096):
            with torch.no_grad():
                answers = model(**batch).logits.cpu().numpy()
            means = pool(outputs.pop(), batch["attention_mask"], ["mean"])[:, 0].cpu().numpy()
            for row, answer, mean in zip(rows, answers, means, strict=True):
                logits[row], last[row] = answer, mean
    finally:
        hook.remove()
    return np.stack(logits), np.stack(last)


def last_head(model: Any, tokenizer: Any, train: Any, validation: Any) -> Any:
    """A logistic regression on the last block; its C is chosen on the validation texts."""
    (x, y), (eval_x, eval_y) = ((read(model, tokenizer, texts)[1], labels) for texts, labels in (train, validation))
    heads = [make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000)).fit(x, y) for C in CS]
    return max(heads, key=lambda head: head.score(eval_x, eval_y))


def neurons(model: Any, tokenizer: Any, splits: Any, options: Any) -> dict[str, Any]:
    train, validation, (texts, labels) = splits
    head = last_head(model, tokenizer, train, validation)
    intact_logits, intact_last = read(model, tokenizer, texts)
    spread = np.linalg.norm(intact_last - intact_last.mean(0), axis=1).mean()
    intact = {"spin": intact_logits.argmax(1) == labels, "last": head.predict(intact_last) == labels}
    top = model.spin.depth
    every = salient_neurons(model, tokenizer, model.config.num_features)
    below = [neuron for neuron in every if int(neuron.tap.partition(".")[2]) < top]
    if not below:
        raise SystemExit("All neurons lie in the last block that runs. Calibrate with exits, which keep deeper ones.")
    taps = sorted({neuron.tap for neuron in below})
    sizes = {tap: own.mean(0) for tap, own in tap_means(model, tokenizer, train[0][:500], taps, sizes=True).items()}
    rows = []
    for count in options.neurons:
        salient = below[:count]
        drawn = {
            "salient": [salient],
            "random": [random_neurons(model, salient, seed) for seed in range(options.draws)],
            "active": [random_neurons(model, salient, seed, sizes=sizes) for seed in range(options.draws)],
        }
        for kind, groups in drawn.items():
            fell: dict[str, list[np.ndarray]] = {reader: [] for reader in READERS}
            moved = []
            for group in groups:
                with ablated(model, group):
                    logits, last = read(model, tokenizer, texts)
                right = {"spin": logits.argmax(1) == labels, "last": head.predict(last) == labels}
                for reader in READERS:
                    fell[reader].append(intact[reader].astype(float) - right[reader])
                moved.append(float(np.linalg.norm(last - intact_last, axis=1).mean() / spread))
            row = {"count": len(salient), "kind": kind, "draws": len(groups), "moved": float(np.mean(moved))}
            row["size"] = float(np.mean([sizes[tap][number] for group in groups for tap, number in group]))
            for reader in READERS:
                row[reader] = mean_error(np.mean(fell[reader], 0))
                row[f"{reader} by draw"] = [float(own.mean()) for own in fell[reader]]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {
        "texts": len(texts),
        "train texts": len(train[0]),
        "kept": len(every),
        "below": len(below),
        "taps": taps,
        "blocks": top,
        "intact": {reader: mean_error(own.astype(float)) for reader, own in intact.items()},
        "rows": rows,
    }


# -- what is shown -----------------------------------------------------------------------------------------------------


def percent(value: tuple[float, float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def tables(found: dict[str, Any]) -> str:
    """The results as Markdown: means and standard errors over texts, in points of 100."""
    own, cut = found["words"], found["neurons"]
    lines = [[title, *(percent(own["measures"][name][m]) for m in MEASURES)] for name, title in WORDS.items()]
    for other in ("gradients", "random"):
        lines.append([f"SPIN's less {WORDS[other]}", *(percent(own["spin less"][other][m]) for m in MEASURES)])
    cut_lines = [
        [str(row["count"]), NEURONS[row["kind"]], *(percent(row[reader]) for reader in READERS), f"{row['moved']:.2f}"]
        for row in cut["rows"]
    ]
    parts = [
        f"### {found['name']}",
        f"{own['texts']} texts of {own['words']:.0f} words:",
        table(["words erased by", *MEASURES], lines),
        f"Accuracy lost, of {percent(cut['intact']['spin'])} (SPIN's head) and {percent(cut['intact']['last'])} (head "
        f"on the last block), on {cut['texts']} texts:",
        table(["neurons", "which", *READERS.values(), "last block moved"], cut_lines),
    ]
    return "\n\n".join(parts)


def charts(found: dict[str, Any]) -> list[Chart]:
    name, own, cut = found["name"], found["words"], found["neurons"]
    made = []
    for curve, title in (("deletion", "without the first words"), ("insertion", "with the first words alone")):
        series = []
        for i, (kind, told) in enumerate(WORDS.items()):
            values = own["curves"][kind][curve]
            y = [mean for mean, _ in values]
            ends = [[mean + sign * error for mean, error in values] for sign in (-1, 1)]
            series.append(
                Series(told, tuple(own["shares"]), tuple(y), colour=i, style=i, low=tuple(ends[0]), high=tuple(ends[1]))
            )
        made.append(
            Chart(
                name=f"faithfulness-{name}-{curve}",
                title=f"The answer's probability {title}: {name}",
                about="Bars are standard errors over texts.",
                x_title="share of the words erased" if curve == "deletion" else "share of the words read",
                y_title=f"probability ({own['texts']} texts)",
                series=tuple(series),
            )
        )
    if len({row["count"] for row in cut["rows"]}) < 2:  # one number of neurons is no curve
        return made
    series = []
    for i, (kind, told) in enumerate(NEURONS.items()):
        for j, (reader, reads) in enumerate(READERS.items()):
            rows = [row for row in cut["rows"] if row["kind"] == kind]
            left = [(cut["intact"][reader][0] - row[reader][0], row[reader][1]) for row in rows]
            low, y, high = (tuple(mean + sign * error for mean, error in left) for sign in (-1, 0, 1))
            xs = tuple(row["count"] for row in rows)
            series.append(Series(f"{told}; {reads}", xs, y, colour=i, style=2 * j, low=low, high=high))
    made.append(
        Chart(
            name=f"faithfulness-{name}-neurons",
            title=f"Accuracy with neurons held at zero: {name}",
            about="Bars are standard errors over texts.",
            x_title="neurons held at zero",
            y_title=f"accuracy ({cut['texts']} texts)",
            series=tuple(series),
            log_x=True,
        )
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", nargs="?", help="folder of a classifier of one label per text")
    parser.add_argument("--data", type=Path, help="folder with NAME/{train,validation,test}.jsonl.gz")
    parser.add_argument("--set", default="sst2")
    parser.add_argument("--name", default="minilm-sst2", help="of the results")
    parser.add_argument("--texts", type=int, default=200, help="test texts whose words are erased")
    parser.add_argument("--ablated", type=int, default=400, help="test texts that are read without neurons")
    parser.add_argument("--train", type=int, default=1000, help="texts that the head on the last block is fitted on")
    parser.add_argument("--steps", type=int, default=16, help="of integrated gradients")
    parser.add_argument("--orders", type=int, default=3, help="random orders of each text's words")
    parser.add_argument("--neurons", type=int, nargs="+", default=[10, 100, 300])
    parser.add_argument("--draws", type=int, default=5, help="random groups of neurons")
    parser.add_argument("--seed", type=int, default=0, help="of the random orders")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--show", action="store_true", help="print the results so far, and draw them again")
    options = parser.parse_args()
    if not options.show:
        if options.classifier is None or options.data is None:
            parser.error("A classifier and --data are needed, or --show.")
        measure(options)
    for path in sorted(options.out.glob("faithfulness-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        print(tables(found) + "\n")
        save_figures(charts(found), options.out)


def measure(options: Any) -> None:
    model, tokenizer = load_classifier(options.classifier, "cpu", False)
    train, validation, test = load(options.data, options.set)
    splits = [
        ([row["text"] for row in rows], np.array([int(row["label"]) for row in rows]))
        for rows in (draw(train, options.train), draw(validation, options.train), draw(test, options.ablated))
    ]
    own = copy.deepcopy(model)
    if own.exits is not None:
        own.keep_exit(None)  # the blocks above its own head are not needed for its words
    texts = splits[2][0][: options.texts]
    found = {
        "name": options.name,
        "set": options.set,
        "seed": options.seed,
        "words": words(own, tokenizer, texts, options),
    }
    print(json.dumps(found["words"]["measures"]), flush=True)
    found["neurons"] = neurons(model, tokenizer, splits, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"faithfulness-{options.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
