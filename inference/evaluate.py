"""The work of `blink evaluate`; commands/evaluate.py has its arguments."""

import argparse
import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from blink.errors import UserError
from blink.files import check_json, check_output, write, write_json
from blink.inference.classifier import Classifier, load
from blink.inference.labelled import Labelled, read_labelled
from blink.inference.shared import Complaints, printable
from blink.training import metrics
from blink.training.bars import bars
from blink.training.evaluation import VIEWS, accuracy, images_at_once, logits_of, unsure

_COLUMNS, _NAME = 80, 8
# of more classes, those that are shown are the worst
_CLASSES_SHOWN = 30
_ROW = ("image", "label", "predicted", "probability")


@dataclass
class Evaluation:
    """What a network makes of labelled images.

    probabilities [N, classes] float32; counts [classes, classes] int64: the confusion matrix; accuracy, balanced
    (accuracy) and calibration (error) as `training.metrics` has them.
    """

    probabilities: Tensor
    counts: Tensor
    accuracy: float
    balanced: float
    calibration: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Evaluation":
        """logits [N, classes] float32 and labels [N] int64, on the CPU."""
        probabilities = logits.softmax(1)
        counts = metrics.confusion(logits.argmax(1), labels, logits.shape[1])
        found = (accuracy(logits, labels), metrics.balanced_accuracy(counts))
        return cls(probabilities, counts, *found, metrics.calibration_error(probabilities, labels))


def run(options: argparse.Namespace) -> int:
    check_json(options)
    check_output(options.csv)
    model, complaints, console = load(options.model, options.device), Complaints(), Console()
    tta, part = views_of(model, options.model) if options.tta else (None, 1.0)
    with bars(console) as bar:
        task = bar.add_task("decoding images", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        chosen = (options.half, options.val_split, options.limit)
        data = read_labelled(options.data, model, *chosen, progress, complaints)
        total = len(data.images) + (unsure(len(data.images), part) * len(VIEWS[tta]))
        bar.reset(task, description="evaluating", total=total)
        # views are counted as they come out of the network
        counting = model.network.register_forward_hook(lambda network, images, logits: bar.advance(task, len(logits)))
        logits = evaluated(model, data.images, tta, part)
        counting.remove()
    broken = int((~logits.isfinite().all(1)).sum())
    if broken:
        raise UserError(f"{options.model} gives NaN for {broken} of {len(logits)} images; its training failed")
    result = Evaluation.of(logits, data.labels)
    show(console, options, model, data, result)
    write_results(options, model, data, result)
    return 2 if complaints.count else 0


def views_of(model: Classifier, path: Path) -> tuple[str | None, float]:
    """(tta, tta_fraction) of the recipe that the network was trained with. Raises UserError if it is not known."""
    recipe = model.facts.get("recipe") or {}
    tta, part = recipe.get("tta", "unknown"), recipe.get("tta_fraction")
    if tta not in VIEWS or not isinstance(part, int | float) or not 0 <= part <= 1:
        raise UserError(f"--tta: {path} does not say which views its recipe averages; leave it out")
    return tta, part


@torch.inference_mode()
def evaluated(model: Classifier, images: Tensor, tta: str | None, part: float) -> Tensor:
    """Logits [N, classes] float32 on the CPU of images [N, H, W, C] uint8, as a training's final evaluation has them
    in float32.
    """
    at_once = images_at_once(model.network, model.image_shape, torch.float32, model.device)
    return logits_of(model.network, images.to(model.device), tta, part, at_once).cpu()


def seen_in_training(model: Classifier, data: Labelled) -> str | None:
    """A line, where the network was trained on images that are among these."""
    trained = (model.facts.get("data") or {}).get("fingerprint")
    if data.half == "test" or data.fingerprint is None or data.fingerprint != trained:
        return None
    if data.half == "train":
        return "the network was trained on these images"
    return "the network was trained on a part of these images; --half test takes the others"


def show(console: Console, options: argparse.Namespace, model: Classifier, data: Labelled, result: Evaluation) -> None:
    def say(text: str = "", style: str | None = None) -> None:
        console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)

    half = "" if data.half == "all" else f", its {data.half} half"
    say(f"{options.model.name} on {data.name}{half}: {len(data.images):,} images", "bold")
    for note in filter(None, [*data.notes, seen_in_training(model, data)]):
        console.print(f"note         {printable(note)}", style="yellow", highlight=False, markup=False)
    confidence = result.probabilities.max(1).values.double().mean().item()
    say(f"accuracy     {result.accuracy:.4f}  ({'views averaged' if options.tta else 'not augmented'})")
    say(f"balanced     {result.balanced:.4f}  (the mean over the classes)")
    say(f"calibration  {result.calibration:.4f}  (expected error; the mean probability is {confidence:.4f})")
    say()
    table = class_table(model.classes, result.counts)
    console.print(table)
    if table.row_count < len(model.classes):
        say(f"the lowest {table.row_count} of {len(model.classes)} (--json: all)")
    matrix = confusion_table(model.classes, result.counts)
    confusions = [] if matrix else most_frequent(result.counts, options.top)
    if matrix:
        say("\nconfusion: a row is a class, its columns what its images were taken for", "bold")
        console.print(matrix)
    elif confusions:
        say("\nmost frequent confusions", "bold")
    for label, taken, count in confusions:
        say(f"{model.classes[label]} taken for {model.classes[taken]}: {count:,}")
    mistakes = metrics.confident_mistakes(result.probabilities, data.labels, options.top).tolist()
    if mistakes:
        say("\nmost confident mistakes", "bold")
    for i in mistakes:
        image, label, taken, probability = row_of(model, data, result, i)
        say(f"{image}: {label} taken for {taken}, {probability:.1%}")


def row_of(model: Classifier, data: Labelled, result: Evaluation, i: int) -> tuple[str, str, str, float]:
    """(file or number, class, what it was taken for, with which probability) of image i."""
    probability, taken = result.probabilities[i].max(0)
    return data.names[i], model.classes[data.labels[i]], model.classes[taken], probability.item()


def class_table(classes: tuple[str, ...], counts: Tensor) -> Table:
    """Images and accuracy of each class; where classes are many, of the worst."""
    images, accuracies = counts.sum(1).tolist(), metrics.per_class_accuracy(counts).tolist()
    shown = range(len(classes))
    if len(classes) > _CLASSES_SHOWN:
        # those without an image last
        shown = sorted(shown, key=lambda i: (math.isnan(accuracies[i]), accuracies[i]))[:_CLASSES_SHOWN]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("class", max_width=_COLUMNS // 2, no_wrap=True, overflow="ellipsis")
    table.add_column("images", justify="right")
    table.add_column("accuracy", justify="right")
    for i in shown:
        value = "-" if math.isnan(accuracies[i]) else f"{accuracies[i]:.4f}"
        table.add_row(Text(printable(classes[i])), f"{images[i]:,}", value)
    return table


def confusion_table(classes: tuple[str, ...], counts: Tensor) -> Table | None:
    """The whole matrix, if 80 columns hold it with at least eight of each name."""
    number = len(str(len(classes) - 1))
    width = max(number, len(str(counts.max().item())))
    room = _COLUMNS - (number + 1) - len(classes) * (width + 1)
    if room < _NAME:
        return None
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", justify="right", width=number)
    table.add_column("", max_width=room - 1, no_wrap=True, overflow="ellipsis")
    for i in range(len(classes)):
        table.add_column(str(i), justify="right", width=width)
    for i, row in enumerate(counts.tolist()):
        table.add_row(str(i), Text(printable(classes[i])), *map(str, row))
    return table


def most_frequent(counts: Tensor, most: int) -> list[tuple[int, int, int]]:
    """(class, what its images were taken for, how often) of at most so many confusions, the most frequent first."""
    wrong = counts.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
    found = [(*divmod(i, len(counts)), wrong.flatten()[i].item()) for i in order]
    return [one for one in found if one[2]]


def write_results(options: argparse.Namespace, model: Classifier, data: Labelled, result: Evaluation) -> None:
    """--json and --csv. Raises UserError where they cannot be written."""
    if options.json is not None:
        write_json(options.json, as_dict(options, model, data, result))
    if options.csv is not None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(_ROW)
        for i in sorted(range(len(data.names)), key=data.positions.__getitem__):
            *names, probability = row_of(model, data, result, i)
            rows.writerow([*map(printable, names), f"{probability:.6f}"])
        write(options.csv, text.getvalue().encode())


def as_dict(options: argparse.Namespace, model: Classifier, data: Labelled, result: Evaluation) -> dict:
    """All of it but for the images that are no mistake, ready for JSON."""
    images, accuracies = result.counts.sum(1).tolist(), metrics.per_class_accuracy(result.counts).tolist()
    mistakes = metrics.confident_mistakes(result.probabilities, data.labels, len(data.names)).tolist()
    return {
        "command": ["blink", "evaluate", *options.arguments],
        "model": {"file": str(options.model), **{key: model.facts.get(key) for key in ("seed", "accuracy", "data")}},
        "data": {
            "name": data.name,
            "half": data.half,
            "images": len(data.names),
            "trained_on": seen_in_training(model, data) is not None,
            "notes": data.notes,
        },
        "views_averaged": options.tta,
        "accuracy": result.accuracy,
        "balanced_accuracy": result.balanced,
        "calibration_error": result.calibration,
        "classes": [
            {"class": name, "images": count, "accuracy": None if math.isnan(value) else value}
            for name, count, value in zip(model.classes, images, accuracies)
        ],
        "confusion": result.counts.tolist(),
        "mistakes": [dict(zip(_ROW, row_of(model, data, result, i))) for i in mistakes],
    }
