"""The work of `blink inspect`, whose arguments experiments/commands/inspect.py has: what the compiler made of every
kernel, and what of it is a fault.

A module may state why a kernel of its stays narrow: NARROW_ACCESS = {"_name_kernel": "reason"}, or
{"_name_kernel:target": "reason"} for one target.

What is spilled is the compiler's choice and changes with its version: one named version is held to none, others may
spill a few registers, which the table shows. sm_75 may spill: Triton has no tensor-core path for it, so products are
made of multiply-adds, whose operands take registers.
"""

import argparse
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from blink.errors import UserError
from blink.files import check_json, write_json

from .. import HAS_TRITON
from ..environment import commit

# the version of triton that is held to no spill, and how many accesses others may make to spilled registers
NO_SPILL_VERSION, FEW_SPILLS = "3.8", 16
_LEGEND = """\
occ: bound on resident warps, and what sets it.  ld16, st16: instructions of 16
bytes or more a thread, of all global loads and stores.  sfu: special functions.
All counts are static; shared memory and code in bytes."""
_HEADER = "regs spill shared  occ by      ld16  st16 tensor core        fp32   sfu   code"
_INDENT = {"initial_indent": "    ", "subsequent_indent": "    "}


def _compile(examine: Callable[[NamedTuple], list[dict]], jobs: list) -> Iterator[dict]:
    """Rows of all jobs in order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(cores or 1, len(jobs)))
    # a fork would copy torch's threads in whatever state they are
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        # Ctrl-C reaches the whole group; the workers, begun here, ignore it and end with this process
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            found = pool.map(examine, jobs)
        finally:
            signal.signal(signal.SIGINT, before)
        for rows in progress.track(found, total=len(jobs), description="compiling"):
            yield from rows


def _is_narrow(row: dict) -> bool:
    return bool(row["wide_argument"]) and row["wide_loads"] + row["wide_stores"] == 0


def allowed_spills(target: str, version: str) -> float:
    """Accesses to spilled registers that a kernel may make; version: triton's."""
    if target == "sm_75" or not target.startswith("sm_"):
        return float("inf")
    return 0 if version.startswith(f"{NO_SPILL_VERSION}.") else FEW_SPILLS


def offenses(rows: list[dict], version: str) -> list[str]:
    """One line for every fault: not compiled, spilling, too much shared memory, sums whose copies differ, narrow
    without a stated reason. version: triton's.
    """
    lines = []
    for row in rows:
        where = f"{row['kernel']} ({row['target']}, {row['dtype']}, {row['case']})"
        if row["error"]:
            lines.append(f"{where}: does not compile: {' '.join(row['error'].split())[:200]}")
            continue
        if row["spills"] > allowed_spills(row["target"], version):
            lines.append(f"{where}: {row['spills']} loads and stores of spilled registers, {row['stack']} B of stack")
        if row["shared"] > row["shared_limit"]:
            lines.append(f"{where}: {row['shared']} B of shared memory, of which a block may use {row['shared_limit']}")
        if row["fused_shuffles"]:
            lines.append(f"{where}: {row['fused_shuffles']} sums over lanes of products that are not rounded first")
        if _is_narrow(row) and not row["narrow_reason"]:
            lines.append(f"{where}: no 16-byte global access, which the layout of {row['wide_argument']} allows")
    return lines


def _table(rows: list[dict]) -> Iterator[str]:
    yield _LEGEND
    if any(row["target"] == "sm_75" for row in rows):
        yield "sm_75: no tensor-core path in Triton; products by multiply-add, which spill."
    for (target, dtype), group in groupby(rows, key=lambda row: (row["target"], row["dtype"])):
        yield f"\n{target} {dtype}"
        yield _HEADER
        for row in group:
            yield from _titled(f"{row['op']}  {row['kernel']}", row["case"])
            if row["error"]:
                yield "    does not compile"
                continue
            yield _numbers(row)
            if _is_narrow(row) and row["narrow_reason"]:
                yield from textwrap.wrap(f"narrow: {row['narrow_reason']}", 80, **_INDENT)


def _titled(kernel: str, case: str) -> list[str]:
    """In one line or, where it would be too long, two."""
    return [f"{kernel}  {case}"] if len(kernel) + len(case) <= 78 else [kernel, f"    {case}"]


def _numbers(row: dict) -> str:
    # shapes of one instruction are summed: the table says which unit, the JSON which instruction
    units: dict[str, int] = {}
    for name, count in row["tensor_core"].items():
        unit = "mfma" if "mfma" in name else name.split(".")[0]
        units[unit] = units.get(unit, 0) + count
    tensor = " ".join(f"{name} {count}" for name, count in units.items()) or "-"
    loads, stores = f"{row['wide_loads']}/{row['loads']}", f"{row['wide_stores']}/{row['stores']}"
    limit = "regs" if row["limited_by"] == "registers" else row["limited_by"]
    return (
        f"{row['registers']:4} {row['spills']:5} {row['shared']:6} {row['occupancy']:4.0%} {limit:6}"
        f" {loads:>5} {stores:>5} {tensor:17} {row['fp32']:5} {row['special']:5} {row['code_bytes']:6}"
    )


def _summary(rows: list[dict], seconds: float) -> str:
    compiled = [row for row in rows if not row["error"]]
    spilling = sum(bool(row["spills"]) for row in compiled)
    narrow = [row for row in compiled if _is_narrow(row)]
    excused = sum(bool(row["narrow_reason"]) for row in narrow)
    line = f"{len(rows)} kernels in {seconds:.0f} s: {spilling} with spills, {len(narrow) - excused} narrow"
    line += f", {excused} narrow for a stated reason" if excused else ""
    failed = len(rows) - len(compiled)
    return line + (f", {failed} not compiled" if failed else "")


def run(options: argparse.Namespace) -> int:
    if not HAS_TRITON:
        raise UserError("blink inspect needs triton, which is not installed")
    import triton

    from ..launching import interpreting
    from ..registry import OPS
    from . import ahead_of_time
    from .cases import network_cases, recipe_cases

    for op in options.ops:
        if op not in OPS:
            raise UserError(f"unknown op {op!r}; expected one of {', '.join(OPS)}")
    check_json(options)
    if interpreting():
        raise UserError("TRITON_INTERPRET is set, which makes kernels plain functions; unset it")
    if options.bounds is not None:
        return _bounds(options)
    options.target = options.target or (["sm_90"] if options.quick else list(ahead_of_time.TARGETS))
    cases = recipe_cases(options.recipe) if options.recipe else network_cases()
    cases = [case for case in cases if case.op in (options.ops or OPS)]
    if options.quick:
        cases = list({case.op: case for case in reversed(cases)}.values())[::-1]
    start = time.perf_counter()
    jobs = ahead_of_time.jobs(cases, options.dtype, options.target, options.tiles)
    rows = list(_compile(ahead_of_time.examine, jobs))
    seconds = time.perf_counter() - start
    assemblies = [row.pop("assembly", "") for row in rows]
    found = offenses(rows, triton.__version__)
    if options.sass:
        for row, assembly in zip(rows, assemblies):
            print(f"; {row['kernel']} {row['target']} {row['dtype']} {row['case']}\n{assembly}")
    for line in _table(rows):
        print(line)
    print("\n" + "\n".join(found + [_summary(rows, seconds)]))
    if options.json is not None:
        write_json(options.json, {**_about(), "seconds": round(seconds, 1), "rows": rows, "offenses": found})
    return 1 if found else 0


def _about() -> dict:
    """What a file of results names beside its rows."""
    import triton

    return {"versions": {"torch": torch.__version__, "triton": triton.__version__}}


def _bounds(options: argparse.Namespace) -> int:
    from . import bounds_report

    if options.target or options.sass or options.tiles or options.quick:
        raise UserError("--bounds compiles a step's kernels for the GPUs it names; it goes with ops, --dtype, --recipe")
    recipe = options.recipe or "blink"
    jobs = bounds_report.jobs(recipe, options.dtype, options.bounds, options.ops)
    if not jobs:
        raise UserError(f"a step of {recipe} calls none of {', '.join(options.ops)}; name another --recipe")
    rows = list(_compile(bounds_report.examine, jobs))
    about = {"command": ["blink", "inspect", *options.arguments], "commit": commit(), **_about(), "recipe": recipe}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{shlex.join(about['command'])}; commit {about['commit']}; {versions}\n")
    for line in bounds_report.table(rows, recipe, options.bounds):
        print(line)
    if options.json is not None:
        write_json(options.json, {**about, "rows": rows})
    return 0
