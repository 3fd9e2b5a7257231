"""The published trainers that can be raced: how to know a checkout, count its runs, feed it and read what it prints.

Nothing of theirs is here: a user names a checkout, and in memory the number of runs is changed and, where nothing is
compiled, the warm-up left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from blink.errors import UserError
from blink.training.recipes import AIR, HLB, Recipe, with_group


@dataclass(frozen=True)
class Peer:
    """One script.

    script: its path in the checkout. marks, lacks: what its text holds, and what it does not (another version would).
    runs: the loop over runs, whose number is the second group; asked: how many more than are counted, which a script
    without a warm-up of its own spends on one. data: which files it looks for. accuracy, seconds: the columns of its
    report that hold a run's results. recipe: the same training in this project's terms, to count its FLOPs; None: none.
    """

    name: str
    script: str
    marks: tuple[str, ...]
    lacks: tuple[str, ...]
    asked: int
    data: Literal["airbench", "hlb-integer", "hlb-one-hot"]
    accuracy: str
    seconds: str
    recipe: Recipe | None = None
    on_cpu: bool = False


_RUNS = re.compile(r"(for \w+ in range\()(\d+)(\))")
_WARM_UP = re.compile(r'^ +main\("warmup".*\)\n', re.MULTILINE)

_HIVERGE = with_group(
    replace(AIR, name="hiverge", epochs=7.59, batch_size=1536, tta_fraction=0.25), "stem.bias", epochs=0.19
)

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "airbench94_muon", "airbench94_muon.py", ("zeropower_via_newtonschulz5", "tta_val_acc"),
            ("_zeropower_via_newtonschulz5",), 0, "airbench", "tta_val_acc", "time_seconds", AIR, on_cpu=True,
        ),
        Peer(
            "airbench94_compiled", "legacy/airbench94_compiled.py", ("model_freezebias", "tta_val_acc"),
            (), 0, "airbench", "tta_val_acc", "total_time_seconds",
        ),
        Peer(
            "hiverge", "cifar10_speedrun.py", ("_zeropower_via_newtonschulz5", "UNCERTAIN_QUANTILE"),
            (), 0, "airbench", "tta_val_acc", "time_seconds", _HIVERGE, on_cpu=True,
        ),
        Peer(
            "hlb-v0.3.0", "main.py", ("data.pt", "ema_val_acc"),
            ("F.one_hot(",), 1, "hlb-integer", "ema_val_acc", "total_time_seconds", HLB,
        ),
        Peer(
            "hlb-v0.7.0", "main.py", ("data.pt", "ema_val_acc", "F.one_hot("),
            (), 1, "hlb-one-hot", "ema_val_acc", "total_time_seconds",
        ),
    )
}  # fmt: skip


def find_script(peer: Peer, checkout: Path) -> Path:
    """The peer's script in a user's checkout (or the script itself). Raises UserError when this is not that peer."""
    path = checkout if checkout.is_file() else checkout / peer.script
    if not path.is_file() and (checkout / Path(peer.script).name).is_file():
        path = checkout / Path(peer.script).name
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{checkout} holds no readable {peer.script}, which {peer.name} is expected to be") from error
    if any(mark not in text for mark in peer.marks) or any(mark in text for mark in peer.lacks):
        raise UserError(f"{path} is not {peer.name} as it was published; check out the version that its name says")
    with_runs(peer, text, 1, path)
    return path


def with_runs(peer: Peer, text: str, runs: int, path: Path) -> str:
    """The script's text with its number of runs changed, and nothing else. Raises UserError when that is not found."""
    head, mark, main = text.rpartition("__main__")
    if not mark or len(_RUNS.findall(main)) != 1:
        raise UserError(f"{path} has no single loop over its runs after __main__; expected {peer.name} as published")
    return head + mark + _RUNS.sub(lambda m: f"{m[1]}{runs + peer.asked}{m[3]}", main)


def without_warm_up(text: str, path: Path) -> str:
    """The script's text without its run that nobody counts. Raises UserError when that is not found."""
    text, found = _WARM_UP.subn("", text)
    if found != 1:
        raise UserError(f"{path} has no single call of main for a warm-up; expected a script as published")
    return text


class Rows:
    """A peer's report, line by line: a run's results stand in the last row before a closing bar."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self._columns: list[str] | None = None
        self._last: dict[str, str] | None = None

    def read(self, text: str) -> Iterator[tuple[float, float]]:
        """(accuracy, seconds) of each run that a line of output ends. Raises UserError for a report it cannot read."""
        for line in (part.strip() for part in text.split("\r")):
            if line and not line.strip("-"):
                if self._last is not None:
                    row, self._last = self._last, None
                    yield self._result(row)
            elif line.startswith("|"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                if self._columns is None:
                    self._columns = cells
                    self._check(cells)
                else:
                    self._last = dict(zip(self._columns, cells))

    def _check(self, columns: list[str]) -> None:
        missing = {self._peer.accuracy, self._peer.seconds} - set(columns)
        if missing:
            raise UserError(f"{self._peer.name} reports {', '.join(columns)}; expected {' and '.join(sorted(missing))}")

    def _result(self, row: dict[str, str]) -> tuple[float, float]:
        try:
            return float(row[self._peer.accuracy]), float(row[self._peer.seconds])
        except (KeyError, ValueError) as error:
            raise UserError(f"{self._peer.name} ended a run with the row {row}, which holds no results") from error
