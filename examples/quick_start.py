"""Make a classifier in one call, score it, save it with its model card, and use it in a pipeline.

    python examples/quick_start.py

Needs no data: it reads the customer messages that come with the package (576 to train on, 144 to choose by, 144 to
test; praise, complaint, question or suggestion). A minute on one core. Seen: accuracy 0.861 on validation, where a
linear layer on the last layer's mean has 0.688, and 0.750 on test (standard error 0.036). The best of 85 candidates
flatters on the 144 messages that chose it.
"""

from __future__ import annotations

import rich
from common import load_demo, parser, save
from transformers import AutoTokenizer, pipeline

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import BACKBONE_ID, backbone_folder
from spin_hf.scoring import score_rows, shown_scores


def main() -> None:
    options = parser(__doc__, out="outputs/minilm-messages").parse_args()
    train, validation, test = load_demo(options.rows)

    backbone = backbone_folder() or BACKBONE_ID  # the copy that the demo extra installs, or the Hub's
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = SpinForSequenceClassification.from_backbone(backbone)
    result = spin_calibrate(model, tokenizer, train, validation)
    print(result)

    scores = score_rows(model, tokenizer, test)
    rich.print(*shown_scores(scores))

    save(model, tokenizer, options.out, result=result, test=scores, dataset="spin_hf demo messages")

    classify = pipeline("text-classification", str(options.out))
    for text in ("Lovely, the third parcel in a row that arrived empty.", "A dark mode would do my eyes a favour."):
        best = classify(text)[0]
        print(f"{best['label']:<11}{best['score']:.2f}  {text}")


if __name__ == "__main__":
    main()
