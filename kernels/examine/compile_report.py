"""Compile every kernel for GPUs that need not be here, and report what the compiler made of it.

    blink inspect [OP ...] [--target sm_90,gfx942] [--dtype float16] [--sass] [--json FILE] [--quick]

Each op's kernels are compiled at the shapes that the hlb network gives them. Exit code 1 where a kernel spills
registers to memory on an NVIDIA target, needs more shared memory than a block may use, makes no 16-byte global access
although its layout allows it, leaves copies of a sum that differ, or does not compile; 2 for a mistake on the command
line. A module may state why a kernel of its stays narrow: NARROW_ACCESS = {"_name_kernel": "reason"}, or
{"_name_kernel:target": "reason"} for one target.

What is spilled is the compiler's choice and changes with its version: one named version is held to none, others may
spill a few registers, which the table shows. sm_75 may spill: Triton has no tensor-core path for it, so products are
made of multiply-adds, whose operands take registers.
"""

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from blink.files import replacing

from .. import HAS_TRITON

DTYPES = ("float16", "bfloat16", "float32")
# the version of triton that is held to no spill, and how many accesses others may make to spilled registers
NO_SPILL_VERSION, FEW_SPILLS = "3.8", 8
_LEGEND = """\
occ: bound on resident warps, and what sets it.  ld16, st16: instructions of 16
bytes or more a thread, of all global loads and stores.  sfu: special functions.
All counts are static; shared memory and code in bytes."""
_HEADER = "regs spill shared  occ by      ld16  st16 tensor core        fp32   sfu   code"
_INDENT = {"initial_indent": "    ", "subsequent_indent": "    "}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, and exit code 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parse(argv: list[str] | None, ops: list[str], targets: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="blink inspect", description="Compile every kernel ahead of time and report its resources.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"ops to compile, of {', '.join(ops)}; default: all")
    parser.add_argument("--target", help=f"targets, separated by commas, of {', '.join(targets)}; default: all")
    parser.add_argument("--dtype", default="float16", help=f"dtypes, of {', '.join(DTYPES)}; default: float16")
    parser.add_argument("--sass", action="store_true", help="print the machine code too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--quick", action="store_true", help="each op's first shape, sm_90 unless --target is given")
    options = parser.parse_args(argv)

    def chosen(kind: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
        known = list(known)
        for name in names:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; known: {', '.join(known)}")
        # in the known order, each once
        return [name for name in known if name in names]

    options.ops = chosen("op", options.ops, ops) or ops
    default = "sm_90" if options.quick else ",".join(targets)
    options.targets = chosen("target", (default if options.target is None else options.target).split(","), targets)
    options.dtypes = chosen("dtype", options.dtype.split(","), DTYPES)
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: the folder {options.json.resolve().parent} does not exist")
    if options.json and options.json.is_dir():
        parser.error(f"--json: {options.json} is a folder")
    return options


def _jobs(cases: list, options: argparse.Namespace) -> list[tuple[int, str, str]]:
    indices, seen = [], set()
    for index, case in enumerate(cases):
        if case.op in options.ops and not (options.quick and case.op in seen):
            indices.append(index)
            seen.add(case.op)
    return [(index, dtype, target) for target in options.targets for dtype in options.dtypes for index in indices]


def _compile(jobs: list[tuple[int, str, str]]) -> Iterator[dict]:
    """Rows of all jobs in order, each kernel's source once a target."""
    from .ahead_of_time import examine

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, len(jobs))
    seen = set()
    # a fork would copy torch's threads in whatever state they are
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        for rows in progress.track(pool.map(examine, jobs), total=len(jobs), description="compiling"):
            for row in rows:
                key = row.pop("key")
                if key not in seen:
                    seen.add(key)
                    yield row


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
            yield f"{row['kernel']}  {row['case']}"
            if row["error"]:
                yield "    does not compile"
                continue
            yield _numbers(row)
            if _is_narrow(row) and row["narrow_reason"]:
                yield from textwrap.wrap(f"narrow: {row['narrow_reason']}", 80, **_INDENT)


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


def _write_json(path: Path, document: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """The exit code. Raises SystemExit with code 2, one line on stderr, for a mistake."""
    if not HAS_TRITON:
        print("blink inspect: error: needs triton, which is not installed", file=sys.stderr)
        return 2
    import triton

    from ..launching import interpreting
    from .ahead_of_time import TARGETS
    from .cases import network_cases

    cases = network_cases()
    options = _parse(argv, list(dict.fromkeys(case.op for case in cases)), list(TARGETS))
    if interpreting():
        print(
            "blink inspect: error: TRITON_INTERPRET is set, which makes kernels plain functions; unset it",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    rows = list(_compile(_jobs(cases, options)))
    seconds = time.perf_counter() - start
    assemblies = [row.pop("assembly", "") for row in rows]
    found = offenses(rows, triton.__version__)
    code = 1 if found else 0
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        document = {"versions": versions, "seconds": round(seconds, 1), "rows": rows, "offenses": found}
        try:
            _write_json(options.json, document)
        except OSError as error:
            # the table is still worth printing
            print(f"blink inspect: error: could not write {options.json} ({error.strerror})", file=sys.stderr)
            code = 2
    if options.sass:
        for row, assembly in zip(rows, assemblies):
            print(f"; {row['kernel']} {row['target']} {row['dtype']} {row['case']}\n{assembly}")
    for line in _table(rows):
        print(line)
    print("\n" + "\n".join(found + [_summary(rows, seconds)]))
    return code


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader (head, less) has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)
