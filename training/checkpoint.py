"""A run that can be continued: everything that the next epoch depends on, as one safetensors file an epoch."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blink.errors import UserError
from blink.files import from_json
from blink.model.saved import write_tensors
from blink.training.clock import Stopwatch
from blink.training.results import EpochRow
from blink.training.trainer import Trainer

_FORMAT = 2
_KEY = "blink checkpoint"
# the one before may be whole where the last is not
_KEPT = 2


@dataclass
class Best:
    """The weights of the epoch that did best in validation. epoch: 1, 2, ...; accuracy: of that validation."""

    epoch: int
    accuracy: float
    state: dict[str, Tensor]


@dataclass
class RunState:
    """What a run has beside its trainer. clock: what is timed; steps_clock: the steps of it; rows: the epochs done;
    losses: of their steps.
    """

    seed: int
    generator: torch.Generator
    clock: Stopwatch
    steps_clock: Stopwatch
    rows: list[EpochRow] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: Best | None = None

    @classmethod
    def at_start(cls, seed: int, device: torch.device) -> "RunState":
        return cls(seed, torch.Generator(device).manual_seed(seed), Stopwatch(device), Stopwatch(device))


class Checkpoints:
    """The checkpoints of a job's runs in one folder; the last two of a run are kept until it has ended.

    every: epochs from one to the next, 0: none are written; identity: what a run must share with the one that it
    continues, ready for JSON; note: called with a line that a person should know; writes: False where another rank of
    the same run does.
    """

    def __init__(
        self, folder: Path, name: str, every: int, identity: dict, note: Callable[[str], None], writes: bool = True
    ):
        self._writes = writes
        self._folder, self._name, self._every, self._note = folder, name, every, note
        # as it will be read back: tuples become lists
        self._identity = json.loads(json.dumps(identity))

    def _files(self, seed: int) -> list[Path]:
        """Of a run, the latest first."""
        found = self._folder.glob(f"{escape(self._name)}-seed{seed}-epoch*.checkpoint")
        return sorted(found, key=lambda path: int(path.stem.rpartition("epoch")[2]), reverse=True)

    def save(self, trainer: Trainer, run: RunState) -> None:
        """After an epoch, if its turn has come. A disk that is full is noted and ends nothing."""
        epoch = len(run.rows)
        if not self._every or epoch % self._every or epoch == trainer.budget.epochs:
            return
        tensors = {f"trainer.{name}": value for name, value in trainer.state().items()}
        if not self._writes:
            return
        path = self._folder / f"{self._name}-seed{run.seed}-epoch{epoch}.checkpoint"
        content = {
            "format": _FORMAT,
            "identity": self._identity,
            "rows": [asdict(row) for row in run.rows],
            "seconds": [run.clock.seconds, run.steps_clock.seconds],
        }
        tensors |= {"generator": run.generator.get_state(), "losses": torch.tensor(run.losses)}
        if run.best is not None:
            content["best"] = {"epoch": run.best.epoch, "accuracy": run.best.accuracy}
            tensors |= {f"best.{name}": value for name, value in run.best.state.items()}
        try:
            write_tensors(path, {name: value.cpu() for name, value in tensors.items()}, {_KEY: json.dumps(content)})
        except UserError as error:
            self._note(f"no checkpoint of epoch {epoch} ({error}); the run goes on")
            return
        for old in self._files(run.seed)[_KEPT:]:
            old.unlink(missing_ok=True)

    def resume(self, trainer: Trainer, run: RunState) -> None:
        """Bring a run that `trainer` has just begun to where its last whole checkpoint is; without one, to its start.

        Raises UserError for checkpoints of another job.
        """
        for path in self._files(run.seed):
            try:
                content, tensors = _read(path)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                self._note(f"{path} is no whole checkpoint ({' '.join(str(error).split())[:200]}); an earlier is tried")
                continue
            differing = [key for key in self._identity if content["identity"].get(key) != self._identity[key]]
            if differing:
                raise UserError(
                    f"{path} is of a run with other {', '.join(differing)}; continue it as it was, or train into "
                    "another folder"
                )
            self._restore(content, tensors, trainer, run)
            return

    def _restore(self, content: dict, tensors: dict[str, Tensor], trainer: Trainer, run: RunState) -> None:
        named = {kind: {} for kind in ("trainer", "best")}
        for name, value in tensors.items():
            kind, _, inner = name.partition(".")
            if kind in named:
                named[kind][inner] = value
        trainer.load_state(named["trainer"])
        run.generator.set_state(tensors["generator"])
        run.rows, run.losses = [EpochRow(**row) for row in content["rows"]], tensors["losses"].tolist()
        for clock, seconds in zip((run.clock, run.steps_clock), content["seconds"]):
            clock.go_on_from(seconds)
        if "best" in content:
            run.best = Best(**content["best"], state=named["best"])

    def remove(self, seed: int) -> None:
        """Of a run that has ended and is kept."""
        for path in self._files(seed):
            path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        content = from_json((file.metadata() or {})[_KEY])
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        return content, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
