"""For `blink inspect --bounds`: of every kernel that a training step launches, what bounds it on GPUs that need not be
here (see `bounds`). Convolutions and the head are not among them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import NamedTuple

import torch

from blink.training.recipes import RECIPES

from ..launching import Launch, assumed_processors, leaves
from ..registry import OPS
from . import ahead_of_time
from .bounds import GPUS, Work, work
from .cases import Case, recorded_calls

# every other unit is to take at most so much of memory's time
GOAL = 0.7
# microseconds below which a launch is mostly its own latency, whatever the kernel does
SMALL = 2.0
_UNITS = ("memory", "issue", "fma", "alu", "sfu", "lsu", "tensor")
_LEGEND = f"""\
Microseconds that each unit is busy, if nothing else made it wait, and, as "us",
the longest of them with the last wave of programs counted as a full one.
n: launches a step.  *: a unit takes more than {GOAL:g} of memory's time, or waves
lose as much.  ~: loops of the machine code are not the PTX's; estimated.
Launches below {SMALL:g} us, which mostly wait for themselves, are only counted."""
_HEADER = "    n programs waves       us bound   memory  issue    fma    alu    sfu    lsu tensor"


class Job(NamedTuple):
    """A case, how often a step calls it, and what it is compiled for."""

    case: Case
    calls: int
    dtype: str
    target: str
    sms: int


def jobs(recipe: str, dtypes: list[str], gpus: list[str], ops: list[str]) -> list[Job]:
    """The calls of a step that trains everything on images of full size, once for each kind of GPU and dtype."""
    recorded = recorded_calls(RECIPES[recipe], RECIPES[recipe].batch_size, whole=True)
    cases = [Case(call.op, call.arguments, call.options) for call in recorded if call.op in OPS]
    counts = Counter((case.op, case.label) for case in cases)
    distinct = {(case.op, case.label): case for case in cases if case.op in (ops or OPS)}
    # programs go by how many processors there are
    kinds = dict.fromkeys((GPUS[gpu].target, GPUS[gpu].sms) for gpu in gpus)
    return [Job(case, counts[key], d, *k) for k in kinds for d in dtypes for key, case in distinct.items()]


def examine(job: Job) -> list[dict]:
    """A row of plain values for each launch of a case, equal ones as one."""
    with assumed_processors(job.sms):
        launches = ahead_of_time.capture(job.case, getattr(torch, job.dtype))
    rows: dict[tuple, dict] = {}
    for launch in launches:
        key = (*ahead_of_time.identity(launch), launch.grid)
        if key in rows:
            rows[key]["launches"] += job.calls
            continue
        compiled, found = ahead_of_time.compile_fully(launch, job.target)
        done = work(launch, compiled.asm["ptx"], found, _limits(job.case, launch))
        rows[key] = {
            "op": job.case.op,
            "case": job.case.label,
            "kernel": ahead_of_time.kernel_name(launch),
            "dtype": job.dtype,
            "target": job.target,
            "launches": job.calls,
            **asdict(done),
            "gpus": {name: _on(gpu, done) for name, gpu in GPUS.items() if (gpu.target, gpu.sms) == job[-2:]},
        }
    return list(rows.values())


def _limits(case: Case, launch: Launch) -> dict[int, int]:
    """Of a data set as much as a batch takes of it."""
    index, images = case.arguments.get("gather.index"), case.arguments.get("images")
    if index is None:
        return {}
    taken = index.numel * images.numel // images.shape[0]
    tensors = (value for _, value in leaves(launch.arguments) if isinstance(value, torch.Tensor))
    return {t.data_ptr(): taken for t in tensors if tuple(t.shape) == images.shape and t.dtype == images.dtype}


def _on(gpu, done: Work) -> dict:
    bound, seconds = done.bound(gpu)
    times = {unit: round(1e6 * time, 3) for unit, time in done.times(gpu).items()}
    return {"bound": bound, "microseconds": round(1e6 * seconds, 3), "waves": round(done.waves(gpu), 3), "units": times}


def beyond_goal(found: dict) -> bool:
    """Whether anything but memory holds a launch up; found: a row's of one GPU."""
    if found["microseconds"] < SMALL:
        return False
    return GOAL * found["microseconds"] > found["units"]["memory"] or any(
        time > GOAL * found["units"]["memory"] for unit, time in found["units"].items() if unit != "memory"
    )


def table(rows: list[dict], recipe: str, gpus: list[str]) -> Iterator[str]:
    """What takes longest first."""
    yield _LEGEND
    for name in gpus:
        gpu = GPUS[name]
        for dtype, group in groupby((r for r in rows if name in r["gpus"]), key=lambda row: row["dtype"]):
            found = sorted(group, key=lambda row: -row["launches"] * row["gpus"][name]["microseconds"])
            facts = f"{gpu.sms} SMs at {gpu.clock / 1e9:g} GHz, {gpu.bandwidth / 1e12:g} TB/s"
            yield f"\n{name}: {facts}; a step of {recipe}, {dtype}"
            yield _HEADER
            for row in found:
                if row["gpus"][name]["microseconds"] < SMALL:
                    continue
                yield f"{row['kernel']}  {row['case']}"
                yield _numbers(row, row["gpus"][name])
            yield _total(found, name)


def _numbers(row: dict, found: dict) -> str:
    units = "".join(f"{found['units'].get(unit, 0.0):7.1f}" for unit in _UNITS)
    mark, guess = "*" if beyond_goal(found) else " ", "~" if row["guessed"] else " "
    return (
        f"{row['launches']:5} {row['programs']:8} {found['waves']:5.2f} {guess}{found['microseconds']:7.1f}"
        f"{mark}{found['bound']:7} {units}"
    )


def _total(rows: list[dict], name: str) -> str:
    found = [(row["launches"], row["gpus"][name]) for row in rows]
    launches, beyond = sum(n for n, _ in found), sum(n for n, f in found if beyond_goal(f))
    small = sum(n for n, f in found if f["microseconds"] < SMALL)
    total = sum(n * f["microseconds"] for n, f in found)
    memory = sum(n * f["units"]["memory"] for n, f in found)
    return (
        f"{launches} launches, {small} of them small: {total:.0f} us, {memory:.0f} by memory alone; {beyond} beyond "
        f"the goal"
    )
