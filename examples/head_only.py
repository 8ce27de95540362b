"""Several classifiers on one backbone: each is a head of a few hundred KB, and memory holds the backbone once.

    python examples/head_only.py

Three questions about the customer messages that come with the package: what the writer does (label), what makes the
message hard to read (kind), and whether it is a complaint. Features are extracted once, for all three.

Seen, three minutes on one core: heads of 97, 58 and 5 KB; the backbone takes 90.9 MB of memory, with all three heads
91.0. The same model with one number changed is refused, by its fingerprint.
"""

from __future__ import annotations

import tempfile

from common import load_demo, parser, table
from transformers import AutoModel, AutoTokenizer

from spin_hf import CheckpointError, SpinForSequenceClassification, spin_calibrate
from spin_hf.demo import BACKBONE_ID, backbone_folder
from spin_hf.prediction import predict


def main() -> None:
    options = parser(__doc__, out="outputs/heads").parse_args()
    splits = load_demo(options.rows)[:2]
    for row in [row for rows in splits for row in rows]:
        row["complaint"] = "complaint" if row["label"] == "complaint" else "anything else"

    source = backbone_folder() or BACKBONE_ID
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        for question in ("label", "kind", "complaint"):
            model = SpinForSequenceClassification.from_backbone(source)
            result = spin_calibrate(model, tokenizer, *splits, label_column=question, cache_dir=cache)
            model.save_pretrained(options.out / question, form="head")
            size = sum(file.stat().st_size for file in (options.out / question).iterdir())
            lines.append((question, result.chosen.score, result.chosen.num_features, f"{size / 1e3:,.0f} KB"))
    print(table(("head", "accuracy (validation)", "features", "on disk"), lines))

    backbone = AutoModel.from_pretrained(source)  # once, for all heads
    heads = {
        question: SpinForSequenceClassification.from_pretrained(options.out / question, backbone=backbone)
        for question, *_ in lines
    }
    models = [backbone, *heads.values()]
    tensors = {tensor.data_ptr(): tensor.nbytes for model in models for tensor in model.state_dict().values()}
    alone = sum(tensor.nbytes for tensor in backbone.state_dict().values())
    print(f"\nThe backbone takes {alone / 1e6:.1f} MB, with {len(heads)} heads {sum(tensors.values()) / 1e6:.1f} MB.")
    text = "Lovely, the third parcel in a row that arrived empty."
    print(text, {question: predict(head, tokenizer, [text]).row(0)["label"] for question, head in heads.items()})

    other = AutoModel.from_pretrained(source)
    other.get_input_embeddings().weight.data[1000] += 0.01  # as if it had been trained a little
    try:
        SpinForSequenceClassification.from_pretrained(options.out / "label", backbone=other)
    except CheckpointError as error:
        print(f"\nAnother backbone is refused: {error}")


if __name__ == "__main__":
    main()
