"""A page that classifies what is typed into it, and abstains below a confidence that a slider sets.

    pip install "spin_hf[app]"
    python examples/quick_start.py
    python examples/gradio_app.py outputs/minilm-messages

The folder may hold any classifier, with one label per text or several.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gradio

from spin_hf.loading import load_classifier
from spin_hf.prediction import predict


def make_app(folder: Path) -> gradio.Interface:
    """The page of a saved classifier, not yet served."""
    model, tokenizer = load_classifier(folder, None, False)
    if model.config.problem_type == "regression":
        raise SystemExit(f"{folder} predicts a number, which has no confidence. Take one that predicts labels.")

    def classify(text: str, min_confidence: float) -> tuple[str, dict[str, Any]]:
        if not text.strip():
            raise gradio.Error("Write something first.")
        row = predict(model, tokenizer, [text], min_confidence=min_confidence).row(0)
        if row["abstained"]:
            return "not sure enough to say", row["scores"]
        return row["label"] if "label" in row else ", ".join(row["labels"]) or "none of the labels", row["scores"]

    slider = gradio.Slider(0, 1, value=0.5, step=0.01, label="Abstain below this confidence")
    probabilities = gradio.Label(label="Probabilities", num_top_classes=8, show_heading=False)
    return gradio.Interface(
        classify,
        inputs=[gradio.Textbox(label="Text", lines=3), slider],
        outputs=[gradio.Textbox(label="Answer"), probabilities],
        title=folder.resolve().name,
        description=f"{model.config.num_features:,} neurons are read, in {model.spin.depth} blocks of the backbone.",
        flagging_mode="never",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a classifier")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    make_app(options.folder).launch(server_port=options.port)
