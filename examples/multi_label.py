"""Several labels per text: the 28 emotions of GoEmotions (Demszky et al. 2020).

python examples/multi_label.py --data DATA
"""

from __future__ import annotations

import rich
from common import load, parser, save
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import BACKBONE_ID, backbone_folder
from spin_hf.prediction import predict
from spin_hf.scoring import score_rows, shown_scores


def main() -> None:
    options = parser(__doc__, data=True, rows=1500, out="outputs/minilm-goemotions").parse_args()
    train, validation, test = load(options.data, "go_emotions", options.rows)
    emotions = sorted({emotion for row in (*train, *validation, *test) for emotion in row["labels"]})

    backbone = backbone_folder() or BACKBONE_ID
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = SpinForSequenceClassification.from_backbone(
        backbone, labels=emotions, problem_type="multi_label_classification"
    )
    # 28 labels are 28 problems to solve, so fewer settings are tried. Micro F1 chooses; metric="macro_f1" would favour
    # the rare emotions.
    fewer = {"kinds": ["ffn"], "poolings": ["mean"], "Cs": 6, "etas": [0.6, 0.9]}
    result = spin_calibrate(model, tokenizer, train, validation, **fewer)
    print(result)

    scores = score_rows(model, tokenizer, test)
    rich.print(*shown_scores(scores))
    texts = ["Thank you so much, you made my day!", "I'm sorry for your loss.", "Why would anyone do that? Disgusting."]
    prediction = predict(model, tokenizer, texts)
    for i, text in enumerate(texts):
        likely = sorted(prediction.row(i)["scores"].items(), key=lambda item: -item[1])[:3]
        print(text, " ".join(f"{name} {probability:.2f}" for name, probability in likely), sep="  ")

    save(model, tokenizer, options.out, result=result, test=scores, dataset="GoEmotions")


if __name__ == "__main__":
    main()
