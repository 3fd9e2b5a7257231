"""What `blink train` wrote, read back and checked: a folder of --out, or a file of --json with what lies beside it."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from blink.errors import UserError
from blink.files import from_json, is_missing
from blink.model import saved
from blink.training.results import EpochRow, Kept, spread

if TYPE_CHECKING:
    from blink.training.gallery import Gallery

EXPECTED = "expected a folder of blink train --out, or a file of its --json"


@dataclass(frozen=True)
class Run:
    """losses: of the batches of `steps` (0, 1, ...); kept: of --keep best, where the weights in the files are not the
    last; gallery, network: None where there is none beside the summary.
    """

    seed: int
    accuracy: float
    seconds: float
    images_per_second: float
    epochs: tuple[EpochRow, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    balanced_accuracy: float | None
    kept: Kept | None
    gallery: "Gallery | None"
    network: Path | None


@dataclass(frozen=True)
class Data:
    """As a summary names it; image_shape: (channels, height, width)."""

    name: str
    fingerprint: str
    generated: bool
    train: int
    test: int
    classes: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Training:
    """One summary. label: what tells it from the others. started: when, or of when its file is.

    start_up: seconds by part; environment: facts by name. missing: what a page lacks for it, in lines; damaged: what
    lies beside it and is not what its name says, in lines.
    """

    path: Path
    label: str
    started: str
    command: tuple[str, ...]
    data: Data
    recipe: dict
    kernels: str
    stem: str
    dtype: str
    graph: bool
    deterministic: bool
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    start_up: dict[str, float]
    pflop: float | None
    peak_bytes: int | None
    environment: dict[str, str]
    runs: tuple[Run, ...]
    missing: tuple[str, ...]
    damaged: tuple[str, ...]

    def spread(self, name: str) -> dict:
        """Of the runs' "accuracy", "seconds" or "images_per_second", as `results.spread` gives it."""
        return spread([getattr(run, name) for run in self.runs])

    @property
    def galleries(self) -> "list[Gallery]":
        return [run.gallery for run in self.runs if run.gallery is not None]


def check(paths: Iterable[Path]) -> None:
    """What can be seen before a library is imported. Raises UserError."""
    for path in paths:
        if is_missing(path):
            raise UserError(f"there is no {path}; {EXPECTED}")


def read_all(paths: Iterable[Path]) -> list[Training]:
    """Each with a label of its own. Raises UserError for what is no summary of blink train with a run that ended."""
    found = [read(path) for path in dict.fromkeys(paths)]
    for candidates in (
        [str(training.recipe["name"]) for training in found],
        [t.path.resolve().parent.name if t.path.name == "summary.json" else t.path.stem for t in found],
        [str(training.path) for training in found],
    ):
        counts = Counter(candidates)
        if max(counts.values()) == 1:
            break
    return [Training(**vars(training) | {"label": label}) for training, label in zip(found, candidates)]


def read(path: Path) -> Training:
    """The summary of a folder or file. Raises UserError."""
    file = path / "summary.json" if path.is_dir() else path
    try:
        text = file.read_text()
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    except FileNotFoundError as error:
        lacks = f"{path} holds no summary.json" if path.is_dir() else f"there is no {path}"
        raise UserError(f"{lacks}; {EXPECTED}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{file} cannot be read ({reason}); {EXPECTED}") from error
    try:
        content = parsed(text)
        return assembled(file, content, written)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no summary of blink train ({reason}); {EXPECTED}") from error


def parsed(text: str) -> dict:
    """Raises ValueError, which says what else it is where that is known."""
    try:
        content = from_json(text)
    except ValueError as error:
        lines = text.splitlines()
        if len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}"):
            raise ValueError("it holds JSON lines, as blink ablate and blink race write them") from error
        raise
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    for key, command in (("until", "until"), ("contestant", "race"), ("plan", "ablate"), ("schema", "bench")):
        if key in content:
            raise ValueError(f"it is of blink {command}")
    if not content["runs"]:
        raise ValueError("no run of it has ended")
    return content


def finite(value) -> float:
    """Raises ValueError or TypeError for what is no finite number."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} where a number is expected")
    return number


def assembled(file: Path, content: dict, written: datetime) -> Training:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is no summary."""
    data, kernels, budget, recipe = (content[name] for name in ("data", "kernels", "budget", "recipe"))
    # what earlier versions did not tell is not known
    flops, peak, started = (content.get(name) for name in ("flops", "peak_bytes", "started"))
    name = str(recipe["name"])
    if "/" in name:
        raise ValueError(f"{name!r} is no recipe's name")
    missing, damaged = [], []
    about = Data(
        *(str(data[key]) for key in ("name", "fingerprint")), bool(data["generated"]),
        *(int(data[key]) for key in ("train", "test", "classes")), tuple(map(int, data["image_shape"])),
    )  # fmt: skip
    runs = []
    for run in content["runs"]:
        stem = f"{name}-seed{int(run['seed'])}"
        accuracy = finite(run["accuracy"])
        found = beside(file.parent / f"{stem}.gallery.safetensors", accuracy, about, missing, damaged)
        kept, balanced = run.get("kept"), run.get("balanced_accuracy")
        kept = None if kept is None else Kept(int(kept["epoch"]), finite(kept["accuracy"]))
        of_file = accuracy if kept is None else kept.accuracy
        network = beside(file.parent / f"{stem}.safetensors", of_file, about, missing, damaged)
        run = Run(
            int(run["seed"]), accuracy, finite(run["seconds"]), finite(run["images_per_second"]),
            tuple(map(epoch_row, run["epochs"])), tuple(map(int, run["logged_steps"])),
            tuple(map(float, run["losses"])), None if balanced is None else finite(balanced), kept, found, network,
        )  # fmt: skip
        runs.append(run)
    return Training(
        path=file,
        label=name,
        started=f"file of {said(written)}" if started is None else said(datetime.fromisoformat(started)),
        command=tuple(map(str, content["command"])),
        data=about,
        recipe=dict(recipe),
        kernels=str(kernels["name"]),
        stem=str(kernels["stem"]),
        dtype=str(content["dtype"]),
        graph=bool(content.get("graph", False)),
        deterministic=bool(content["deterministic"]),
        **{key: max(1, int(budget[key])) for key in ("batch_size", "steps_per_epoch", "total_steps")},
        start_up={str(part): finite(seconds) for part, seconds in content.get("start_up", {}).items()},
        pflop=None if flops is None else finite(flops["total"]) / 1e15,
        peak_bytes=None if peak is None else int(peak),
        environment={str(key): "-" if v is None else str(v) for key, v in content["environment"].items()},
        runs=tuple(runs),
        missing=tuple(summed(missing, len(runs))),
        damaged=tuple(damaged),
    )


def said(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z")


def epoch_row(row: dict) -> EpochRow:
    """Raises KeyError, TypeError or ValueError."""
    accuracies = (None if row[key] is None else finite(row[key]) for key in ("accuracy", "ema_accuracy"))
    values = (float(row["train_loss"]), float(row.get("train_accuracy", math.nan)), float(row["lr"]))
    return EpochRow(int(row["epoch"]), int(row["step"]), *values, *accuracies, finite(row["seconds"]))


def beside(path: Path, accuracy: float, data: Data, missing: list[str], damaged: list[str]) -> "Gallery | Path | None":
    """A gallery, or a network's path, if it lies there and is of this run; else a line says why not."""
    is_gallery = path.name.endswith(".gallery.safetensors")
    if not path.exists():
        missing.append("gallery" if is_gallery else "network")
        return None
    try:
        if is_gallery:
            # curves alone need no PyTorch
            from blink.training import gallery

            found = gallery.read(path)
            facts = {"accuracy": found.accuracy, "fingerprint": found.fingerprint}
        else:
            found, facts = path, about_network(path)
    except UserError as error:
        damaged.append(str(error))
        return None
    if facts != {"accuracy": accuracy, "fingerprint": data.fingerprint}:
        damaged.append(f"{path} is of another training than {path.parent / 'summary.json'} tells of; it is left out")
        return None
    return found


def about_network(path: Path) -> dict:
    """Raises UserError."""
    facts, _ = saved.read(path, weights=False)
    return {"accuracy": facts.get("accuracy"), "fingerprint": dict(facts.get("data", {})).get("fingerprint")}


def summed(missing: list[str], runs: int) -> list[str]:
    """What is missing, by kind."""
    shown = {
        "gallery": "no gallery: confusion matrix, mistakes, test images and augmented images are left out",
        "network": "no network file: filters, features and the model card are left out",
    }
    counts = Counter(missing)
    return [
        line if counts[kind] == runs else f"{line.split(':')[0]} of {counts[kind]} of {runs} runs"
        for kind, line in shown.items()
        if counts[kind]
    ]
