"""What follows a run beside the terminal: a CSV file, TensorBoard, Weights & Biases.

A step only leaves a reference to the losses on the device; all is written when an epoch has ended, which is not timed.
"""

import argparse
import csv
import json
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from blink.errors import UserError
from blink.files import check_output, make_folder
from blink.optional import needed
from blink.training.listener import Listener
from blink.training.results import EpochRow, RunResult
from blink.training.show_recipes import settings

COLUMNS = ("run", "seed", *(field.name for field in fields(EpochRow)))
_RUN_FACTS = ("command", "data", "recipe", "kernels", "dtype", "deterministic", "budget", "environment")


def check(options: argparse.Namespace) -> None:
    """Before any work: the libraries are there, the outputs can be written, wandb knows who asks. Raises UserError."""
    check_output(options.csv)
    if options.tensorboard is not None:
        # PyTorch's own writer, which imports this
        needed("tensorboard", "--tensorboard")
        make_folder(options.tensorboard)
    if options.wandb is not None:
        wandb = needed("wandb", "--wandb")
        try:
            if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
                wandb.login()
        except (wandb.Error, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"--wandb: {reason}, or set WANDB_MODE=offline") from error


def loggers(options: argparse.Namespace, facts: dict) -> list[Listener]:
    """Those that the options ask for. facts: what is known before the first run (see job.py)."""
    kinds = {"csv": Csv, "tensorboard": TensorBoard, "wandb": Wandb}
    asked = {name: getattr(options, name) for name in kinds}
    return [Guarded(f"--{name}", kinds[name](where, facts)) for name, where in asked.items() if where is not None]


class Guarded(Listener):
    """A logger whose failure is one line on standard error; after it the logger is silent and the training goes on."""

    def __init__(self, flag: str, logger: Listener):
        self._flag = flag
        self._logger: Listener | None = logger

    def _call(self, method: str, *arguments) -> None:
        if self._logger is None:
            return
        try:
            getattr(self._logger, method)(*arguments)
        except Exception as error:
            failed, self._logger = self._logger, None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"blink: {self._flag} failed ({reason}); the training goes on without it", file=sys.stderr)
            if method != "on_end":
                # its file or connection may still be closed, or not
                with suppress(Exception):
                    failed.on_end(None)

    def on_earlier(self, result: RunResult) -> None:
        self._call("on_earlier", result)

    def on_start(self, seed: int) -> None:
        self._call("on_start", seed)

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        self._call("on_resume", rows, losses)

    def on_step(self, done: int, losses: Tensor) -> None:
        self._call("on_step", done, losses)

    def on_epoch(self, row: EpochRow) -> None:
        self._call("on_epoch", row)

    def on_end(self, result: RunResult | None) -> None:
        self._call("on_end", result)


class Csv(Listener):
    """A row an epoch under COLUMNS, of all runs in one file; run: 1, 2, ...; what is not known is empty."""

    def __init__(self, path: Path, facts: dict):
        self._path, self._file, self._run = path, None, 0

    def on_earlier(self, result: RunResult) -> None:
        self.on_start(result.seed)
        self.on_resume(result.epochs, result.losses)
        self.on_end(result)

    def on_start(self, seed: int) -> None:
        self._run, self._seed = self._run + 1, seed
        # a file is begun anew with the first run
        self._file = open(self._path, "w" if self._run == 1 else "a", newline="")  # noqa: SIM115
        if self._run == 1:
            csv.writer(self._file).writerow(COLUMNS)

    def on_epoch(self, row: EpochRow) -> None:
        csv.DictWriter(self._file, COLUMNS).writerow({"run": self._run, "seed": self._seed, **asdict(row)})
        self._file.flush()

    def on_end(self, result: RunResult | None) -> None:
        self._file.close()


class Scalars(Listener):
    """What TensorBoard and wandb share: numbers by name and step, where step counts the steps done in the run.

    A subclass has `write(step, scalars)`, called with rising steps. A run that goes on from a checkpoint is told whole.
    """

    def on_start(self, seed: int) -> None:
        self.seed, self._losses, self._written = seed, torch.empty(0), 0

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        for row in rows:
            self._write(row, losses[self._written : row.step])

    def on_step(self, done: int, losses: Tensor) -> None:
        self._losses = losses

    def on_epoch(self, row: EpochRow) -> None:
        self._write(row, self._losses[: row.step - self._written].tolist())

    def _write(self, row: EpochRow, losses: list[float]) -> None:
        for step, loss in enumerate(losses, self._written + 1):
            self.write(step, {"train/step_loss": loss})
        self._written = row.step
        known = {
            "epoch": row.epoch,
            "train/loss": row.train_loss,
            "train/accuracy": row.train_accuracy,
            "train/lr": row.lr,
            "test/accuracy": row.accuracy,
            "test/ema_accuracy": row.ema_accuracy,
            "seconds": row.seconds,
        }
        self.write(row.step, {name: value for name, value in known.items() if value is not None})

    def write(self, step: int, scalars: dict[str, float]) -> None:
        raise NotImplementedError


def finals(result: RunResult) -> dict[str, float]:
    """What a run ended with, by name."""
    return {f"final/{name}": getattr(result, name) for name in ("accuracy", "seconds", "images_per_second")}


class TensorBoard(Scalars):
    """A run of TensorBoard's a seed, in a folder of its own below `folder`, with its settings as hparams."""

    def __init__(self, folder: Path, facts: dict):
        self._folder, self._facts, self._writer = folder, facts, None

    def on_start(self, seed: int) -> None:
        super().on_start(seed)
        self._unraised, threading.excepthook = threading.excepthook, self._on_thread_error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / f"{self._facts['recipe']['name']}-seed{self.seed}"
            # what an earlier training left in this folder from this step on is no longer shown
            self._writer = SummaryWriter(str(folder), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def on_epoch(self, row: EpochRow) -> None:
        super().on_epoch(row)
        self._writer.flush()

    def on_end(self, result: RunResult | None) -> None:
        try:
            super().on_end(result)
            writer, self._writer = self._writer, None
            if writer is not None and result is not None:
                # in this run's own folder
                writer.add_hparams(self._hparams(), finals(result), run_name=".", global_step=len(result.losses))
            if writer is not None:
                writer.close()
        finally:
            threading.excepthook = self._unraised

    def _hparams(self) -> dict[str, bool | int | float | str]:
        """The run's settings; TensorBoard takes no other types."""
        facts = self._facts
        recipe = {name: value for name, value in settings(facts["recipe"]).items() if name not in ("name", "summary")}
        own = {
            "recipe": facts["recipe"]["name"], "seed": self.seed, "data": facts["data"]["name"],
            "kernels": facts["kernels"]["name"], "dtype": facts["dtype"], **facts["budget"],
        }  # fmt: skip
        found = {**recipe, **own}
        return {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in found.items()}

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """What its writing thread fails with is raised to us as well, at the next call, and said in a line."""
        if not isinstance(error.exc_value, OSError):
            self._unraised(error)


class Wandb(Scalars):
    """A run of `project` a seed, its settings as the run's config. WANDB_MODE=offline needs no account."""

    def __init__(self, project: str, facts: dict):
        self._project, self._facts = project, facts

    def on_start(self, seed: int) -> None:
        import wandb

        super().on_start(seed)
        name = self._facts["recipe"]["name"]
        # through JSON, because tuples of parts are no config
        config = json.loads(json.dumps({key: self._facts[key] for key in _RUN_FACTS})) | {"seed": seed}
        self._run = wandb.init(
            project=self._project, name=f"{name}-seed{seed}", config=config, reinit="finish_previous"
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def on_end(self, result: RunResult | None) -> None:
        super().on_end(result)
        if result is not None:
            self._run.summary.update(finals(result))
        self._run.finish(exit_code=int(result is None))
