"""Trainings as one page of HTML that needs nothing else: no network, no script, no font."""

import shlex
from itertools import cycle
from pathlib import Path
from statistics import fmean

from torch import Tensor

from blink import __version__
from blink.errors import UserError
from blink.inference.classifier import Classifier, load
from blink.model.saved import model_card
from blink.optional import needed
from blink.reporting import curves, pictures
from blink.reporting.trainings import Training
from blink.training.gallery import Gallery
from blink.training.metrics import balanced_accuracy, per_class_accuracy
from blink.training.show_recipes import settings

# more classes make a matrix that nobody reads
MOST_IN_MATRIX = 30
_PAIRS, _WORST = 20, 15


def render(trainings: list[Training]) -> tuple[str, list[str]]:
    """(the page, what of the files could not be used, in lines). Raises UserError where a library is missing."""
    jinja2 = needed("jinja2", "blink report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    damaged = [line for training in trainings for line in training.damaged]
    sections = [section(number, training, damaged) for number, training in enumerate(trainings)]
    figures = [
        # its text is ours alone
        {"key": panel.name.replace(" ", "-"), "name": panel.name, "svg": jinja2.utils.markupsafe.Markup(svg)}
        for panel in curves.PANELS
        for svg in [curves.svg(panel, trainings)]
    ]
    marks = zip(trainings, cycle(range(len(curves.COLOURS))), cycle(curves.MARKERS.values()))
    page = environment.get_template("page.html.jinja").render(
        title=title(trainings),
        overview=[overview(training) for training in trainings],
        generated=any(training.data.generated for training in trainings),
        several_data=len({training.data.fingerprint for training in trainings}) > 1,
        averaged=any(row.ema_accuracy is not None for t in trainings for run in t.runs for row in run.epochs),
        figures=figures,
        legend=[{"colour": colour, "mark": mark, "label": training.label} for training, colour, mark in marks],
        points=[points(training) for training in trainings],
        parts=parts(trainings),
        sections=sections,
        version=__version__,
    )
    # names that are no text are file names in another encoding
    return page.encode(errors="replace").decode(), damaged


def title(trainings: list[Training]) -> str:
    data = ", ".join(dict.fromkeys(training.data.name for training in trainings))
    return f"{', '.join(training.label for training in trainings)} on {data}"


def with_interval(value: dict, form: str, scale: float = 1.0) -> str:
    """A spread's mean and, where there is one, its 95 % interval."""
    text = format(scale * value["mean"], form)
    return text if value["ci95"] is None else f"{text} ± {format(scale * value['ci95'], form)}"


def overview(training: Training) -> dict:
    """What the page says of it first."""
    epochs = training.total_steps / training.steps_per_epoch
    _, height, width = training.data.image_shape
    threads = training.environment.get("threads")
    device, seconds = training.environment.get("device", "unknown"), training.spread("seconds")
    if training.environment.get("device_type") == "cpu" and threads:
        device += f", {threads} thread{'s' if threads != '1' else ''}"
    return {
        "label": training.label,
        "started": training.started,
        "data": training.data,
        "size": f"{height}x{width}",
        "recipe": str(training.recipe["name"]),
        "kernels": f"{training.kernels}: {training.stem}",
        "budget": f"{training.total_steps:,} steps of {training.batch_size:,} images, {epochs:g} epochs",
        "n": len(training.runs),
        "accuracy": with_interval(training.spread("accuracy"), ".2f", 100),
        "seconds": with_interval(seconds, ".3f" if seconds["mean"] < 10 else ".1f"),
        "rate": f"{training.spread('images_per_second')['mean']:,.0f}",
        "pflop": None if training.pflop is None else f"{training.pflop:.4g}",
        "peak": None if training.peak_bytes is None else f"{training.peak_bytes / 1e9:.2f}",
        "device": device,
        "dtype": training.dtype,
    }


def points(training: Training) -> dict:
    """The curves as a table: of each epoch the means over the runs."""
    found = [curves.curve(training, panel.value) for panel in curves.PANELS]
    shown = [dict(zip(c.x, c.mean)) for c in found]
    forms = (".4f", ".4f", ".4g")
    rows = [
        [f"{x:g}", *(format(values[x], form) if x in values else "-" for values, form in zip(shown, forms))]
        for x in sorted(set().union(*shown))
    ]
    return {"label": training.label, "columns": [panel.name for panel in curves.PANELS], "rows": rows}


def parts(trainings: list[Training]) -> list[dict]:
    """Where the seconds went, a row a part, a cell a training: means over its runs, start-up once a command."""
    columns = []
    for training in trainings:
        images = training.batch_size * training.total_steps
        steps = fmean(images / run.images_per_second for run in training.runs if run.images_per_second > 0)
        rest = max(0.0, training.spread("seconds")["mean"] - steps)
        started = {f"start-up: {name}": seconds for name, seconds in training.start_up.items()}
        columns.append({**started, "training steps, a run": steps, "whitening and final evaluation, a run": rest})
    names = [name for name in dict.fromkeys(name for column in columns for name in column)]
    # what all start-ups have comes before what only some have
    names.sort(key=lambda name: not name.startswith("start-up"))
    longest = max(max(column.values()) for column in columns) or 1.0
    return [
        {
            "name": name,
            "cells": [
                {"text": "-", "part": 0}
                if name not in column
                else {"text": f"{column[name]:.2f}", "part": f"{100 * column[name] / longest:.1f}"}
                for column in columns
            ],
        }
        for name in names
    ]


def section(number: int, training: Training, damaged: list[str]) -> dict:
    """All that the page says of one training; what of its network cannot be used goes to `damaged`."""
    galleries, missing = training.galleries, list(training.missing)
    classifier = network = card = None
    path = next((run.network for run in training.runs if run.network is not None), None)
    if path is not None:
        try:
            classifier = load(path, "cpu", "reference")
            card = model_card(classifier.facts)
            network = first_layer(classifier, galleries[0] if galleries else None)
        except UserError as error:
            damaged.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(f"{path} is not all that a run's network file is ({' '.join(str(error).split())[:200]})")
    recipe = {name: value for name, value in settings(training.recipe).items() if name not in ("name", "summary")}
    return {
        "id": f"training-{number}",
        "label": training.label,
        "summary": str(training.recipe.get("summary", "")),
        "runs": [run_row(training, number) for number in range(len(training.runs))],
        "kept": any(run.kept is not None for run in training.runs),
        "confused": confused(galleries) if galleries else None,
        "gallery": pictured(galleries[0]) if galleries else None,
        "network": network,
        "card": card,
        "command": shlex.join(training.command),
        "environment": training.environment
        | {"dtype": training.dtype, "kernels": training.kernels}
        | {"CUDA graph": "yes" if training.graph else "no", "deterministic": "yes" if training.deterministic else "no"},
        "recipe": {name: "none" if value is None else str(value) for name, value in recipe.items()},
        "missing": missing,
    }


def run_row(training: Training, number: int) -> dict:
    run = training.runs[number]
    balanced = run.balanced_accuracy
    if balanced is None and run.gallery is not None and run.kept is None:
        balanced = balanced_accuracy(run.gallery.confusion)
    return {
        "seed": run.seed,
        "accuracy": f"{100 * run.accuracy:.2f}",
        "balanced": "-" if balanced is None else f"{100 * balanced:.2f}",
        "kept": None if run.kept is None else f"{100 * run.kept.accuracy:.2f}, of epoch {run.kept.epoch}",
        "loss": f"{run.epochs[-1].train_loss:.4f}" if run.epochs else "-",
        "seconds": f"{run.seconds:.2f}",
        "rate": f"{run.images_per_second:,.0f}",
    }


def percent(part: Tensor | float) -> str:
    return f"{100 * float(part):.1f}"


def confused(galleries: list[Gallery]) -> dict:
    """The confusion matrices of all runs as one: in cells where there are few classes, else its largest entries."""
    counts, names = sum(g.confusion.long() for g in galleries), galleries[0].classes
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    return {
        "runs": len(galleries),
        "balanced": f"{100 * balanced_accuracy(counts):.2f}",
        "matrix": matrix(counts, share, names) if len(names) <= MOST_IN_MATRIX else None,
        "names": names,
        "pairs": pairs(counts, share, names),
        "worst": worst(counts, names) if len(names) > MOST_IN_MATRIX else [],
    }


def matrix(counts: Tensor, share: Tensor, names: tuple[str, ...]) -> list[dict]:
    """Rows of cells: percent of the row's images, how dark, and the count in words."""
    return [
        {
            "name": name,
            "total": f"{int(counts[i].sum()):,}",
            "cells": [
                {
                    "text": percent(share[i, j]) if counts[i, j] else "",
                    # the root, so that few are seen
                    "depth": f"{float(share[i, j]) ** 0.5:.3f}",
                    "right": i == j,
                    "count": f"{int(counts[i, j]):,}",
                }
                for j in range(len(names))
            ],
        }
        for i, name in enumerate(names)
    ]


def pairs(counts: Tensor, share: Tensor, names: tuple[str, ...]) -> list[dict]:
    """The classes most often taken for another, by images."""
    wrong = counts.clone().fill_diagonal_(0).flatten()
    largest = [at for at in wrong.argsort(descending=True, stable=True)[:_PAIRS].tolist() if wrong[at]]
    return [
        {"true": names[i], "taken_for": names[j], "count": f"{int(counts[i, j]):,}", "share": percent(share[i, j])}
        for i, j in (divmod(at, len(names)) for at in largest)
    ]


def worst(counts: Tensor, names: tuple[str, ...]) -> list[dict]:
    """The classes recognized least often, those without test images left out."""
    accuracy = per_class_accuracy(counts)
    order = [i for i in accuracy.argsort(stable=True).tolist() if counts[i].sum()][:_WORST]
    return [{"name": names[i], "accuracy": percent(accuracy[i]), "images": f"{int(counts[i].sum()):,}"} for i in order]


def pictured(gallery: Gallery) -> dict:
    """The mistakes and the augmented images of one run."""
    names = gallery.classes
    epochs = sorted({epoch for _, epoch in gallery.views})
    of_mistakes = (gallery.true.tolist(), gallery.taken_for.tolist(), gallery.probability.tolist())
    return {
        "seed": gallery.seed,
        "mistakes": [
            {
                "src": pictures.png(image),
                "true": names[true],
                "taken_for": names[taken],
                # no line begins with a percent sign
                "sure": f"{100 * probability:.0f}\u00a0%",
            }
            for image, true, taken, probability in zip(gallery.mistakes, *of_mistakes)
        ],
        "epochs": [epoch + 1 for epoch in epochs],
        "augmented": [
            {
                "name": names[label],
                "src": pictures.png(image),
                "views": [
                    None if (number, epoch) not in gallery.views else pictures.png(gallery.views[number, epoch])
                    for epoch in epochs
                ],
            }
            for number, (image, label) in enumerate(zip(gallery.train, gallery.train_labels.tolist()))
        ],
    }


def first_layer(classifier: Classifier, gallery: Gallery | None) -> dict:
    """The filters of the first convolution, and what the stem makes of the gallery's test images."""
    what, filters = pictures.filters(classifier)
    seen = []
    if gallery is not None and len(gallery.test):
        found = pictures.features(classifier, gallery.test)
        seen = [
            {"src": pictures.png(image), "name": gallery.classes[label], "sheet": pictures.png(pictures.sheet(maps)),
             "channels": len(maps)}
            for image, label, maps in zip(gallery.test, gallery.test_labels.tolist(), found)
        ]  # fmt: skip
    return {"what": what, "filters": [pictures.png(f) for f in filters], "features": seen}
