"""What a run gives, and the spread of several."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # tables of results need no PyTorch
    from torch import Tensor


@dataclass
class EpochRow:
    """What one line of the log shows. train_loss: mean per image; accuracies are fractions, ema None before it runs.

    lr: of the recipe's last group; where that is a mean's, of the mean.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    lr: float
    accuracy: float | None
    ema_accuracy: float | None
    seconds: float


@dataclass
class Kept:
    """The weights of an earlier epoch. epoch: 1, 2, ...; accuracy: test-time augmented, on all test images."""

    epoch: int
    accuracy: float


@dataclass
class HeldOut:
    """Two rulers with less noise than accuracy: the mean cross-entropy of the test images at the temperature that makes
    it least, and the mean margin there, the true class's logit less the largest other.
    """

    cross_entropy: float
    temperature: float
    margin: float


@dataclass
class RunResult:
    """accuracy: test-time augmented, of the weight average if there is one; seconds: the timed segments;
    losses: per image, every step; state: the last weights, or those that `kept` tells of; logits [test images, classes]
    float32: what these gave for the test images; balanced_accuracy: accuracy, but the mean over the classes; held_out:
    of the logits that accuracy is of.
    """

    seed: int
    accuracy: float
    seconds: float
    images_per_second: float
    losses: list[float]
    epochs: list[EpochRow] = field(default_factory=list)
    state: "dict[str, Tensor]" = field(default_factory=dict, repr=False)
    logits: "Tensor | None" = field(default=None, repr=False)
    kept: Kept | None = None
    balanced_accuracy: float | None = None
    held_out: HeldOut | None = None


def run_as_dict(run: RunResult, every: int) -> dict:
    """A run ready for JSON, with the loss of each `every`-th step."""
    return {
        "seed": run.seed,
        "accuracy": run.accuracy,
        "balanced_accuracy": run.balanced_accuracy,
        "seconds": run.seconds,
        "images_per_second": run.images_per_second,
        "logged_steps": list(range(0, len(run.losses), every)),
        "losses": run.losses[::every],
        "epochs": [asdict(row) for row in run.epochs],
        "kept": run.kept and asdict(run.kept),
        "held_out": run.held_out and asdict(run.held_out),
    }


def run_from_dict(content: dict, steps: int) -> RunResult:
    """What `run_as_dict` made of a run of so many steps; losses that it left out are NaN."""
    losses = [math.nan] * steps
    for step, loss in zip(content["logged_steps"], content["losses"]):
        losses[step] = loss
    plain = {key: content[key] for key in ("seed", "accuracy", "balanced_accuracy", "seconds", "images_per_second")}
    kept, ruler = content["kept"] and Kept(**content["kept"]), content.get("held_out")
    rows, held_out = [EpochRow(**row) for row in content["epochs"]], ruler and HeldOut(**ruler)
    return RunResult(**plain, losses=losses, epochs=rows, kept=kept, held_out=held_out)


def spread(values: list[float]) -> dict:
    """mean, and from two values on: std (n - 1) and the half-width of the 95 % t interval of the mean."""
    out = {"n": len(values), "mean": statistics.fmean(values), "std": None, "ci95": None}
    if len(values) > 1:
        from scipy.stats import t  # slow to import, and most calls train once

        out["std"] = statistics.stdev(values)
        out["ci95"] = float(t.ppf(0.975, len(values) - 1)) * out["std"] / math.sqrt(len(values))
    return out


def spreads(runs: "list[RunResult]") -> dict[str, dict]:
    """Of several runs' accuracy and seconds."""
    return {key: spread([getattr(run, key) for run in runs]) for key in ("accuracy", "seconds")}


def with_spread(s: dict, digits: int) -> str:
    """A spread as text: the mean, and from two values on its std and 95 % interval."""
    text = f"{s['mean']:.{digits}f}"
    if s["std"] is not None:
        text += f" std {s['std']:.{digits}f}, 95 % +-{s['ci95']:.{digits}f}, n = {s['n']}"
    return text
