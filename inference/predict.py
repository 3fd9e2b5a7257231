"""Say what images show, by a network that `blink train --out` kept."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from blink.command import positive
from blink.errors import UserError
from blink.inference.classifier import load
from blink.inference.images import attempted
from blink.training.data.decoding import is_image

EXAMPLES = (
    "blink predict runs/photographs/blink-seed0.safetensors photograph.jpg",
    "blink predict model.safetensors photographs/ --top 5 --csv",
)
_BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="the .safetensors file of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE",
        help="files, folders and all images below them, or - for a list of files on standard input")  # fmt: skip
    parser.add_argument("--top", type=positive(int), default=3, metavar="K", help="how many classes (default: 3)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="an object a line: image, classes, probabilities")
    form.add_argument("--csv", action="store_true", help="a row an image: image, class 1, probability 1, ...")


def run(options: argparse.Namespace) -> int:
    model = load(options.model, options.device)
    top = min(options.top, len(model.classes))
    write = _as_json if options.json else _as_csv if options.csv else _as_text
    paths, unreadable = listed_images(options.images), 0
    if options.csv:
        csv.writer(sys.stdout).writerow(["image", *(f"{what}_{k + 1}" for k in range(top) for what in ("class", "p"))])
    while part := list(islice(paths, _BATCH)):
        found = list(zip(part, attempted(part, model.image_shape)))
        for _, error in found:
            if isinstance(error, UserError):
                # the others are still predicted
                print(f"blink: {error}", file=sys.stderr)
                unreadable += 1
        images = [(path, image) for path, image in found if not isinstance(image, UserError)]
        likely = model.probabilities(torch.stack([image for _, image in images])).topk(top) if images else ((), ())
        for (path, _), values, indices in zip(images, *likely):
            write(str(path), [(model.classes[i], p) for i, p in zip(indices.tolist(), values.tolist())])
        sys.stdout.flush()
    return 2 if unreadable else 0


def listed_images(arguments: list[str]) -> Iterator[Path]:
    """Every image that the arguments name, in order. Raises UserError for what does not exist and empty folders."""
    for argument in arguments:
        if argument == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
            continue
        path = Path(argument)
        if not path.exists():
            raise UserError(f"there is no {path}; expected an image, a folder of images, or -")
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if is_image(p) and p.is_file())
        if not found:
            raise UserError(f"{path} holds no image; name another folder, or a file")
        yield from found


def _printable(text: str) -> str:
    """Names that are no text are file names in another encoding."""
    return text.encode(errors="replace").decode()


def _as_text(image: str, likely: list[tuple[str, float]]) -> None:
    print(_printable(f"{image}: " + ", ".join(f"{name} {p:.1%}" for name, p in likely)))


def _as_json(image: str, likely: list[tuple[str, float]]) -> None:
    predictions = [{"class": name, "probability": round(p, 6)} for name, p in likely]
    print(json.dumps({"image": image, "predictions": predictions}))


def _as_csv(image: str, likely: list[tuple[str, float]]) -> None:
    values = [value for name, p in likely for value in (_printable(name), f"{p:.6f}")]
    csv.writer(sys.stdout).writerow([_printable(image), *values])
