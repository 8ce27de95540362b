"""What a backbone of lower precision costs in accuracy: SST-2 calibrated and scored in float32, bfloat16 and int8.

Each is calibrated anew with the default settings, chosen on validation and scored on test once; the head is float32 in
all of them. Prints one line of JSON for each, with the seconds of each stage.

    python examples/benchmarks/precision.py --data DATA --model PATH/TO/SmolLM2-135M --device cuda
"""

from __future__ import annotations

import sys
from pathlib import Path

import results
import torch
import transformers
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer

from spin_hf import SpinForSequenceClassification, spin_calibrate
from spin_hf.prediction import predict

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import load


def load_options(precision: str) -> dict:
    if precision != "int8":
        return {"dtype": getattr(torch, precision)}
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "dtype": torch.bfloat16,
        "quantization_config": transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig()),
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/{train,validation,test}.jsonl.gz")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rows", type=int, help="most rows of each split")
    arguments = parser.parse_args()
    train, validation, test = load(arguments.data, "sst2", arguments.rows)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    for precision in arguments.precisions:
        model = SpinForSequenceClassification.from_backbone(
            arguments.model, num_labels=2, device_map=arguments.device, **load_options(precision)
        )
        result = spin_calibrate(model, tokenizer, train, validation, batch_tokens=16384)
        answers = predict(model, tokenizer, [row["text"] for row in test]).labels
        rows.append(
            {
                "model": Path(arguments.model).name,
                "precision": precision,
                "validation": round(result.chosen.score, 4),
                "test": round(accuracy_score([row["label"] for row in test], answers), 4),
                "features": result.chosen.num_features,
                "depth": result.chosen.depth,
                "worst_gap": result.convergence["worst_gap"],
                "unconverged": result.convergence["unconverged"],
                "seconds": {stage: round(value, 1) for stage, value in result.seconds.items()},
            }
        )
    results.report(arguments.record, f"Precision: {Path(arguments.model).name}", rows, on=arguments.device)


if __name__ == "__main__":
    main()
