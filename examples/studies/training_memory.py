"""Peak memory of a calibration against training, on IMDb texts of 150 words: by number of texts, and by batch.

Each measurement has a process of its own. Calibrations have the default settings, in float32; their batch is counted in
tokens. Training is that of ``adaptation_table.py``: ``Trainer`` with AdamW, on a GPU with bfloat16 autocast; four steps
for each size of batch, since more texts change nothing, and one epoch over more texts to show that.

    python examples/studies/training_memory.py --data DATA --models minilm PATH/TO/mpnet PATH/TO/SmolLM2-135M
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import memory_worker
from memory_worker import CALIBRATION, METHODS
from shared import Source, Study, parser

TEXTS = (500, 2000, 8000, 16000)
BATCHES = (8, 32, 128)
TOKENS = (1024, 4096, 16384)  # of a calibration's batch; 4096 is the default
MIDDLE = 1  # of each: the other axis keeps it
STEPS = 4


def jobs(methods: list[str], most: int) -> Iterator[dict[str, Any]]:
    """What to measure, with ``most`` texts at most."""
    for method in methods:
        if method == CALIBRATION:
            pairs = [(texts, TOKENS[MIDDLE]) for texts in TEXTS] + [(TEXTS[MIDDLE], tokens) for tokens in TOKENS]
        else:
            pairs = [(STEPS * batch, batch) for batch in BATCHES] + [(TEXTS[MIDDLE], BATCHES[MIDDLE])]
        for texts, batch in dict.fromkeys((min(texts, most), batch) for texts, batch in pairs):
            yield {"method": method, "texts": texts, "batch": batch}


def run(options: Any) -> None:
    study = Study("memory", options.results)
    for given in options.models:
        name = Source.of(given).name
        for job in jobs(options.methods, options.rows):
            if study.done(model=name, **job):
                continue
            found = memory_worker.start({**job, "model": given, "data": str(options.data), "device": options.device})
            study.add(model=name, **job, **found)


if __name__ == "__main__":
    made = parser(__doc__, sets=["imdb"], rows=TEXTS[-1])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    run(made.parse_args())
