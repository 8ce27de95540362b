"""Models of other sizes and architectures side by side, under the same settings: the defaults of ``spin_calibrate``.

Everything is chosen on validation, test is scored once. The solvers are deterministic; the error of a test score is
that of a bootstrap over its texts. Compute is counted as the parameters of the blocks that a token passes.

    python examples/studies/architectures.py --data DATA --models minilm PATH/TO/mpnet PATH/TO/SmolLM2-135M
"""

from __future__ import annotations

from typing import Any

import torch
from shared import METRICS, SINGLE, Source, Study, load, max_length, parser, sizes

from spin_hf import spin_calibrate
from spin_hf.calibration.resampling import bootstrap_interval
from spin_hf.calibration.task import METRICS as FUNCTIONS
from spin_hf.scoring import predict_rows


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


if __name__ == "__main__":
    run(parser(__doc__, sets=list(SINGLE), rows=4000).parse_args())
