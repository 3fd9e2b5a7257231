"""The work of `blink predict`; commands/predict.py has its arguments."""

import argparse
import csv
import json
import sys

from blink.inference.classifier import load
from blink.inference.images import listed_images, readable
from blink.inference.shared import Complaints, printable

_BATCH = 256


def run(options: argparse.Namespace) -> int:
    model = load(options.model, options.device)
    top = min(options.top, len(model.classes))
    write = _as_json if options.json else _as_csv if options.csv else _as_text
    complaints = Complaints()
    if options.csv:
        csv.writer(sys.stdout).writerow(["image", *(f"{what}_{k + 1}" for k in range(top) for what in ("class", "p"))])
    for paths, images in readable(listed_images(options.images), model.image_shape, _BATCH, complaints):
        likely = model.probabilities(images).topk(top)
        for path, values, indices in zip(paths, *likely):
            write(str(path), [(model.classes[i], p) for i, p in zip(indices.tolist(), values.tolist())])
        sys.stdout.flush()
    return 2 if complaints.count else 0


def _as_text(image: str, likely: list[tuple[str, float]]) -> None:
    print(printable(f"{image}: " + ", ".join(f"{name} {p:.1%}" for name, p in likely)))


def _as_json(image: str, likely: list[tuple[str, float]]) -> None:
    predictions = [{"class": name, "probability": round(p, 6)} for name, p in likely]
    print(json.dumps({"image": image, "predictions": predictions}))


def _as_csv(image: str, likely: list[tuple[str, float]]) -> None:
    values = [value for name, p in likely for value in (printable(name), f"{p:.6f}")]
    csv.writer(sys.stdout).writerow([printable(image), *values])
