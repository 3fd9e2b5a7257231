"""Write a network that `blink train --out` kept as ONNX or as a torch.export program, for use without this package."""

import argparse
from pathlib import Path

from blink.inference.shared import add_model_argument, check_model

EXAMPLES = (
    "blink export runs/photographs/blink-seed0.safetensors --onnx photographs.onnx",
    "blink export model.safetensors --torch-export model.pt2 --data photographs/",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_argument(add)
    add("--onnx", type=Path, metavar="FILE", help="write ONNX (needs onnx, onnxscript and onnxruntime)")
    add("--torch-export", type=Path, metavar="FILE", help="write a program for torch.export.load (.pt2)")
    add("--probabilities", action="store_true", help="the results are probabilities (default: logits)")
    add("--data", metavar="PATH", help="check it on up to 100 images of a folder, cifar10, cifar100 or synthetic "
        "(default: on generated ones, noise and smooth)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    check_model(options.model)
    # only now: help and mistakes need no PyTorch
    from blink.inference import export

    return export.run(options)
