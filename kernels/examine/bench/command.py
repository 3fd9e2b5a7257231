"""The work of `blink bench`, whose arguments experiments/commands/bench.py has. Every provider's results are compared
with float64 before they are timed.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from blink.errors import UserError
from blink.files import check_json, make_folder, write_json
from blink.optional import needed
from blink.training.recipes import RECIPES

from ... import environment, interpreting, registry
from .. import cases
from . import measure, providers
from .report import closing_line, compare, first_call_line, format_row, ratio_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPS = tuple(registry.OPS)
# what --shapes names
NAMED = ("network", *RECIPES, *cases.MODELS)
_REDUCED_BATCH = 2


def run(options: argparse.Namespace) -> int:
    if options.list:
        for case, _ in choose_cases(options):
            print(f"{case.op:26}{case.label}")
        return 0
    if options.compare:
        before, after = (read_json(path) for path in options.compare)
        lines, regressions = compare(before, after, options.band / 100)
        print("\n".join(lines))
        print(f"{regressions} regressions beyond {options.band:g} %")
        return 1 if regressions else 0
    check_json(options)
    if options.plot is not None:
        make_folder(options.plot)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and "fused" in options.providers and not interpreting():
        providers.reexecute_interpreted("bench", options.arguments)
    return bench(options, device)


def bench(options: argparse.Namespace, device: torch.device) -> int:
    # torch.compile says there that it found no CUDA, which is known
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    facts = environment.describe(device)
    dtypes = options.dtype or (["float16", "bfloat16"] if device.type == "cuda" else ["float32"])
    seconds = 0.1 if options.quick else 0.25
    roofs = {name: measure.matmul_rate(DTYPES[name], device, seconds) for name in dtypes}
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit'] or 'unknown'}"
    print(f"{facts['device']}, {versions}")
    for name, rate in roofs.items():
        print(f"matmul roof {name}: {rate / 1e12:.2f} TFLOP/s")
    rows: list[dict] = []
    content = {"schema": 1, "environment": facts, "quick": options.quick, "matmul_flop_s": roofs, "rows": rows}
    for case, reduced in choose_cases(options):
        for name in dtypes:
            for row in rows_of(case, reduced, name, options, device, seconds, roofs[name]):
                rows.append(row)
                print(format_row(row), flush=True)
            if options.json is not None:
                # after each, so that nothing that ends this process takes a finished one with it
                write_json(options.json, content)
    print(first_call_line(rows))
    print(closing_line(rows))
    if options.plot is not None:
        draw_plots(rows, f"{facts['device']}, torch {facts['torch']}", options.plot)
    return 1 if any(refused(name, p) for row in rows for name, p in row["providers"].items()) else 0


def refused(name: str, entry: dict) -> bool:
    """A wrong result of anyone, or fused kernels that could not run at all; another's failure is not ours."""
    return entry["status"] == "wrong" or (name == "fused" and entry["status"] == "failed")


def choose_cases(options: argparse.Namespace) -> list[tuple[cases.Case, cases.Case]]:
    """(the case to time, the same at a small batch to interpret), for the chosen ops and shapes."""
    if not OPS:
        raise UserError("blink bench needs triton, which is not installed")
    ops = options.ops or OPS
    if options.shapes in NAMED:
        batch = cases.quick_batch(options.shapes) if options.quick else None
        made = [pair for make in cases.makers(options.shapes) for pair in zip(make(batch), make(_REDUCED_BATCH))]
        pairs = list({(pair[0].op, pair[0].label): pair for pair in made if pair[0].op in ops}.values())
    else:
        shapes = cases.SWEEP if options.shapes == "sweep" else parse_shapes(options.shapes)
        pairs = [
            (cases.case_at(op, *shape), cases.case_at(op, _REDUCED_BATCH, *shape[1:])) for op in ops for shape in shapes
        ]
    if not pairs:
        raise UserError(f"--shapes {options.shapes} has no case of {', '.join(ops)}; leave one of them out")
    if options.quick:
        pairs = list({pair[0].op: pair for pair in reversed(pairs)}.values())[::-1]
    return pairs


def rows_of(case, reduced, dtype_name: str, options, device: torch.device, seconds: float, matmul: float) -> list[dict]:
    """One row per pass."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    tensors = case.make(device, dtype)
    truth = providers.truth_of(case, tensors)
    able = [name for name in options.providers if case.op in providers.PROVIDERS[name].ops]
    admitted = {name: admit(name, case, reduced, tensors, truth, dtype, device) for name in able}
    rows = []
    for which in ("fwd", "bwd") if options.passes == "both" else (options.passes,):
        if which == "bwd" and not case.differentiable:
            continue
        cost = case.cost(dtype.itemsize)[which]
        copy = measure.copy_time(cost.bytes, device, seconds).best
        floor = max(copy, cost.flops / matmul * 1e6)
        entries = {}
        for name, (bind, entry) in admitted.items():
            entries[name] = dict(entry)
            if bind is not None:
                entries[name] |= timed(case, bind, tensors, dtype, which == "bwd", device, seconds, cost, floor)
        row = {"op": case.op, "pass": which, "case": case.label, "dtype": dtype_name}
        row |= {"bytes": cost.bytes, "flops": cost.flops, "copy": copy, "providers": entries}
        rows.append(row | {"ratio": ratio_of(entries)})
    return rows


def admit(name: str, case, reduced, tensors, truth, dtype, device) -> tuple[providers.Bind | None, dict]:
    """(what binds the calls to time, or None, and what is known so far): only what gives the right results is timed."""
    interpreted = name == "fused" and device.type == "cpu"
    if interpreted and dtype == torch.bfloat16:
        return None, {"status": "skipped", "note": "skipped: Triton's interpreter computes bfloat16 wrongly"}
    try:
        bind = providers.load(name, case, dtype)
    except RuntimeError as error:
        return None, {"status": "skipped", "note": f"skipped: {error}"[:200]}
    try:
        if interpreted:
            case, tensors = reduced, reduced.make(device, dtype)
            truth = providers.truth_of(case, tensors)
        first = providers.first_call_seconds(case, bind, tensors, dtype)
        verdict = providers.judge(case, bind, tensors, dtype, truth)
    except Exception as error:  # another provider's compiler can fail in any way, and must not end the table
        reason = (str(error).splitlines() or [""])[0]
        return None, {"status": "failed", "note": f"FAILED: {type(error).__name__}: {reason}"[:200]}
    known = {"error": verdict.error, "tolerance": verdict.tolerance, "first_call_seconds": first}
    if not verdict.right:
        note = f"WRONG: {verdict.where} is off by {verdict.error:.1e}, tolerance {verdict.tolerance:.0e}"
        return None, {"status": "wrong", "note": note, **known, "error": min(verdict.error, 1e30)}
    if interpreted:
        note = f"interpreted: not timed (right at a small size, error {verdict.error:.1e})"
        return None, {"status": "interpreted", "note": note, **known}
    return bind, known


def timed(case, bind, tensors, dtype, backward: bool, device, seconds: float, cost, floor: float) -> dict:
    count = measure.rotating_sets(cost.bytes, device)
    sets = [tensors] + [case.make(device, dtype) for _ in range(count - 1)]

    def prepare():
        return providers.calls_of(case, bind, sets, dtype, backward)

    timing = measure.time_calls(prepare, device, seconds)
    peak = measure.peak_extra_bytes(providers.calls_of(case, bind, sets[:1], dtype, backward)[0], device)
    time = timing.best
    return {
        "status": "timed",
        **asdict(timing),
        "time": time,
        "gb_s": cost.bytes / time / 1e3,
        "tflop_s": cost.flops / time / 1e6,
        "roofline": floor / time,
        "peak_bytes": peak,
    }


def parse_shapes(text: str) -> list[tuple[int, int, int, int]]:
    shapes = []
    for part in text.split(","):
        sizes = part.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UserError(f"--shapes {part!r}: expected {', '.join(NAMED)}, sweep or BxCxHxW, as in 512x128x15x15")
        if min(int(sizes[2]), int(sizes[3])) < 2:
            raise UserError(f"--shapes {part!r}: height and width must be at least 2, the whitening kernel's size")
        shapes.append(tuple(map(int, sizes)))
    return shapes


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']}, expected 1")
        content["rows"][0]["providers"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a file that bench --json wrote ({error})") from error
    return content


def draw_plots(rows: list[dict], title: str, folder: Path) -> None:
    needed("matplotlib", "--plot")
    from .plot import draw

    try:
        for path in draw(rows, title, folder):
            print(f"wrote {path}")
    except OSError as error:
        raise UserError(f"--plot {folder}: {error.strerror}; name another folder") from error
