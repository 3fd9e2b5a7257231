"""One block of a contestant: a process of its own that trains a number of runs; what came of it as one record."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blink.command import python_path
from blink.errors import UserError
from blink.experiments import records
from blink.experiments.race.peers import Peer

if TYPE_CHECKING:
    # a table of races needs no PyTorch
    import torch

OURS = "blink"
# seconds
_LOOK_EVERY = 1.0


@dataclass(frozen=True)
class Contestant:
    """A peer with its script and the folder it runs in; or, with neither, this project itself.

    options: of `blink train`, for this project.
    """

    name: str
    folder: Path
    peer: Peer | None = None
    script: Path | None = None
    options: tuple[str, ...] = ()

    def command(self, runs: int, seed: int, out: Path, device: str) -> list[str]:
        if self.peer is None:
            own = ["--runs", str(runs), "--seed", str(seed), "--validate", "0", "--json", str(out), "--device", device]
            return [sys.executable, "-m", "blink", "train", *self.options, *own]
        launched = [self.name, str(self.script), str(runs), str(out), device]
        return [sys.executable, "-m", "blink.experiments.race.launch", *launched]


@dataclass(frozen=True)
class Block:
    """runs: accuracy, seconds by the script's own rules, our_seconds by our clock, of each counted run.

    process_seconds: of the whole process, imports, data, compilation and warm-up included. error: why it has fewer
    runs than were asked for; None: it has them all.
    """

    runs: list[dict]
    process_seconds: float
    peak_bytes: int | None
    error: str | None


def visible(device: "torch.device") -> dict[str, str]:
    """The environment in which a process finds no GPU but this one, which a script then takes without being asked."""
    if device.index is None:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": listed.split(",")[device.index] if listed else str(device.index)}


def run_block(
    contestant: Contestant, runs: int, seed: int, device: "torch.device", caches: Path,
    on_runs: Callable[[int], None] | None = None,
) -> Block:  # fmt: skip
    """Train `runs` runs in a new process, with its compilers' caches under `caches`. Never raises for what it does.

    on_runs is told every second how many runs have ended; without it nothing looks while the process is timed.
    """
    contestant.folder.mkdir(parents=True, exist_ok=True)
    own = {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTHONPATH": python_path(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "runs.json"
        began = time.perf_counter()
        process = subprocess.Popen(
            contestant.command(runs, seed, out, device.type),
            cwd=contestant.folder,
            env=os.environ | own | visible(device),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        read = _own_runs if contestant.peer is None else _peer_runs
        said = _watched(process, None if on_runs is None else lambda: on_runs(len(read(out)[0])))
        seconds = time.perf_counter() - began
        found, peak = read(out)
    error = None
    # a script may fail after its last run by a fault of its own, which takes nothing from the runs
    if len(found) < runs:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it printed no run")
        error = f"ended with exit code {process.returncode} after {len(found)} of {runs} runs: {last.strip()}"
    return Block(found, seconds, peak, error)


def _watched(process: subprocess.Popen, look: Callable[[], None] | None) -> str:
    """What the process said on standard error, once it ended; `look`, if given, is called every second until then."""
    with process:
        try:
            while True:
                try:
                    return process.communicate(timeout=None if look is None else _LOOK_EVERY)[1]
                except subprocess.TimeoutExpired:
                    # a line that is just being written is there the next time
                    with suppress(UserError):
                        look()
        except BaseException:
            # an interruption ends what it waits for
            process.kill()
            raise


def _own_runs(out: Path) -> tuple[list[dict], int | None]:
    if not out.exists():
        return [], None
    content = json.loads(out.read_text())
    runs = [{k: run[k] for k in ("accuracy", "seconds")} | {"our_seconds": run["seconds"]} for run in content["runs"]]
    return runs, content["peak_bytes"]


def _peer_runs(out: Path) -> tuple[list[dict], int | None]:
    # while it goes on, its last line may not be finished
    lines = records.read(out, note=lambda line: None)
    runs = [line for line in lines if "accuracy" in line]
    return runs, next((line["peak_bytes"] for line in lines if "peak_bytes" in line), None)
