"""Two texts per row: does one sentence of a pair say what the other says (MRPC, Dolan and Brockett 2005)?

    python examples/sentence_pairs.py --data DATA

Columns named ``text`` and ``text_pair`` (or ``sentence1`` and ``sentence2``, ``premise`` and ``hypothesis`` ...) are
found; others are named with ``text_column=["first", "second"]``. The two texts go through the backbone together.

Seen on all rows: test accuracy 0.731, against 0.665 for always saying paraphrase; two minutes on one core. A frozen
encoder that was trained on single sentences compares two of them poorly: the second pair printed here goes wrong.
"""

from __future__ import annotations

from collections import Counter

import rich
from common import load, parser, save
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import BACKBONE_ID, backbone_folder
from spin_hf.prediction import predict
from spin_hf.scoring import score_rows, shown_scores


def main() -> None:
    options = parser(__doc__, data=True, out="outputs/minilm-mrpc").parse_args()
    train, validation, test = load(options.data, "mrpc", options.rows)

    backbone = backbone_folder() or BACKBONE_ID
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = SpinForSequenceClassification.from_backbone(backbone, labels=["different", "paraphrase"])
    result = spin_calibrate(model, tokenizer, train, validation, poolings=["mean"])
    print(result)

    scores = score_rows(model, tokenizer, test)
    rich.print(*shown_scores(scores))
    most, _ = Counter(row["label"] for row in train).most_common(1)[0]
    print(f"Always {model.config.id2label[most]!r}: accuracy {sum(r['label'] == most for r in test) / len(test):.4f}")

    firsts = ["The company cut 300 jobs on Monday.", "The company cut 300 jobs on Monday."]
    seconds = ["On Monday the firm laid off 300 people.", "The company hired 300 people in May."]
    prediction = predict(model, tokenizer, firsts, seconds)
    for i, second in enumerate(seconds):
        print(prediction.row(i)["label"], firsts[i], second, sep="  ")

    save(model, tokenizer, options.out, result=result, test=scores, dataset="MRPC")


if __name__ == "__main__":
    main()
