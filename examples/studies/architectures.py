"""Models of other sizes and architectures side by side, under the same settings: the defaults of ``spin_calibrate``.

Everything is chosen on validation, test is scored once. The solvers are deterministic; the error of a test score is
that of a bootstrap over its texts. Compute is counted as the parameters of the blocks that a token passes.

    python examples/studies/architectures.py --data DATA --models minilm PATH/TO/mpnet PATH/TO/SmolLM2-135M
"""

from __future__ import annotations

from typing import Any

import torch
from shared import METRICS, SINGLE, Source, Study, load, max_length, parser, sizes
from tables import Rows, of, points, table

from spin_hf import spin_calibrate
from spin_hf.calibration.resampling import bootstrap_interval
from spin_hf.calibration.task import METRICS as FUNCTIONS
from spin_hf.explain.charts import Chart, Series
from spin_hf.scoring import predict_rows

STAGES = ("token weights", "extract", "probe", "heads", "total")


def run(options: Any) -> None:
    study = Study("architectures", options.results)
    for name in options.sets:
        for given in options.models:
            source = Source.of(given)
            if study.done(model=source.name, set=name):
                continue
            parts = load(options, name)
            train, validation, test = parts
            model, tokenizer = source.model(parts, options.device), source.tokenizer()
            blocks = model.spin.layout.module_list(model.spin.backbone)
            parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
            result = spin_calibrate(
                model,
                tokenizer,
                train,
                validation,
                metric=METRICS[name],
                max_length=max_length(source, model),
                progress=False,
            )
            _, labels, prediction = predict_rows(model, tokenizer, test)
            metric = FUNCTIONS[METRICS[name]][0]
            interval = bootstrap_interval(metric, labels, prediction.labels)
            tried = {candidate.depth for candidate in result.candidates}
            by_depth = {
                depth: max(each.score for each in result.candidates if each.depth <= depth) for depth in sorted(tried)
            }
            study.add(
                model=source.name,
                set=name,
                rows=sizes(parts),
                metric=METRICS[name],
                validation=result.chosen.score,
                test=metric(labels, prediction.labels),
                interval=interval,
                baselines=dict(result.baselines),
                chosen=result.chosen.name,
                features=result.chosen.num_features,
                depth=result.blocks,
                blocks=len(parameters),
                parameters=parameters,
                by_depth=by_depth,
                seconds=dict(result.seconds),
                device=torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
            )


def shown(rows: Rows) -> tuple[list[str], list[Chart]]:
    """The tables and pictures of these rows."""
    lines, series = [], []
    models, sets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "set"))
    for row in sorted(rows, key=lambda row: (sets.index(row["set"]), models.index(row["model"]))):
        low, high = row["interval"]
        run = sum(row["parameters"][: row["depth"]])
        lines.append(
            [
                row["set"],
                row["model"],
                points(row["test"], (high - low) / 2 / 1.96),
                points(row["validation"]),
                f"{row['features']:,}",
                f"{row['depth']} of {row['blocks']}",
                f"{run / 1e6:.1f} of {sum(row['parameters']) / 1e6:.1f}",
                " / ".join(f"{row['seconds'].get(stage, 0):.0f}" for stage in STAGES),
            ]
        )
    for i, model in enumerate(models):
        own = sorted(of(rows, model=model), key=lambda row: sets.index(row["set"]))
        low, high = (tuple(100 * row["interval"][side] for row in own) for side in (0, 1))
        tests = tuple(100 * row["test"] for row in own)
        series.append(Series(model, tuple(row["set"] for row in own), tests, i, i, "points", low=low, high=high))
    by_depth: dict[str, list[Series]] = {name: [] for name in sets}
    for row in sorted(rows, key=lambda row: models.index(row["model"])):
        millions = tuple(sum(row["parameters"][: int(depth)]) / 1e6 for depth in row["by_depth"])
        scores = tuple(100 * score for score in row["by_depth"].values())
        look = models.index(row["model"])
        by_depth[row["set"]].append(Series(row["model"], millions, scores, look, look))
    chart = Chart(
        "studies-architectures",
        "Test score of each model",
        "Bars are intervals of 95% over texts.",
        "data set",
        "points",
        tuple(series),
    )
    deeper = [
        Chart(
            f"studies-depth-{name}",
            f"{name}: best classifier of so many blocks, on validation",
            "The best of all candidates that run no more than these blocks.",
            "million parameters of the blocks that run",
            "points",
            tuple(of_set),
            log_x=True,
        )
        for name, of_set in by_depth.items()
    ]
    head = ["set", "model", "test", "validation", "features", "blocks", "million parameters in them"]
    return [table([*head, f"{' / '.join(STAGES)}, s"], lines)], [chart, *deeper]


if __name__ == "__main__":
    run(parser(__doc__, sets=list(SINGLE), rows=4000).parse_args())
