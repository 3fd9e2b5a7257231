"""Race the fused ops against eager PyTorch and torch.compile: `blink bench [OP ...]`.

Every provider's forward and gradients are compared with float64 first; a wrong one gets its error in place of a time,
and the exit code is 1. Percentages are of the roofline: the time that a copy of the counted bytes takes in the same
harness (or the matrix products at the measured rate, where that is longer) over the op's own time.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from blink.files import replacing
from blink.training.recipes import RECIPES

from ... import environment, interpreting, registry
from .. import cases
from . import measure, providers
from .report import closing_line, compare, first_call_line, format_row, ratio_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPS = tuple(registry.OPS)
# what --shapes names
NAMED = ("network", *RECIPES)
_REDUCED_BATCH = 2
_QUICK_BATCH = 128


class Mistake(Exception):
    """A user's mistake: printed as one line, exit code 2."""


def main(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
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
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and "fused" in options.providers and not interpreting():
            providers.reexecute_interpreted(__spec__.name.removesuffix(".__main__"), arguments)
        return run(options, device)
    except Mistake as error:
        print(f"blink bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blink bench: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, device: torch.device) -> int:
    # torch.compile says there that it found no CUDA, which is known
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    facts = environment.describe(device)
    dtypes = options.dtype or (["float16", "bfloat16"] if device.type == "cuda" else ["float32"])
    seconds = 0.1 if options.quick else 0.25
    roofs = {name: measure.matmul_rate(DTYPES[name], device, seconds) for name in dtypes}
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    for name, rate in roofs.items():
        print(f"matmul roof {name}: {rate / 1e12:.2f} TFLOP/s")
    rows: list[dict] = []
    content = {"schema": 1, "environment": facts, "quick": options.quick, "matmul_flop_s": roofs, "rows": rows}
    for case, reduced in choose_cases(options):
        for name in dtypes:
            for row in race(case, reduced, name, options, device, seconds, roofs[name]):
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
    ops = options.ops or OPS
    if options.shapes in NAMED:
        batch = _QUICK_BATCH if options.quick else None
        made = [pair for make in cases.makers(options.shapes) for pair in zip(make(batch), make(_REDUCED_BATCH))]
        pairs = list({(pair[0].op, pair[0].label): pair for pair in made if pair[0].op in ops}.values())
    else:
        shapes = cases.SWEEP if options.shapes == "sweep" else parse_shapes(options.shapes)
        pairs = [
            (cases.case_at(op, *shape), cases.case_at(op, _REDUCED_BATCH, *shape[1:])) for op in ops for shape in shapes
        ]
    if not pairs:
        raise Mistake(f"--shapes {options.shapes} has no case of {', '.join(ops)}; leave one of them out")
    if options.quick:
        pairs = list({pair[0].op: pair for pair in reversed(pairs)}.values())[::-1]
    return pairs


def race(case, reduced, dtype_name: str, options, device: torch.device, seconds: float, matmul: float) -> list[dict]:
    """One row per pass."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    tensors = case.make(device, dtype)
    truth = providers.truth_of(case, tensors)
    admitted = {name: admit(name, case, reduced, tensors, truth, dtype, device) for name in options.providers}
    rows = []
    for which in ("fwd", "bwd") if options.passes == "both" else (options.passes,):
        if which == "bwd" and not case.differentiable:
            continue
        cost = case.cost(dtype.itemsize)[which]
        copy = measure.copy_time(cost.bytes, device, seconds).best
        floor = max(copy, cost.flops / matmul * 1e6)
        entries = {}
        for name, (ops, entry) in admitted.items():
            entries[name] = dict(entry)
            if ops is not None:
                entries[name] |= timed(case, ops, tensors, dtype, which == "bwd", device, seconds, cost, floor)
        row = {"op": case.op, "pass": which, "case": case.label, "dtype": dtype_name}
        row |= {"bytes": cost.bytes, "flops": cost.flops, "copy": copy, "providers": entries}
        rows.append(row | {"ratio": ratio_of(entries)})
    return rows


def admit(name: str, case, reduced, tensors, truth, dtype, device) -> tuple[object | None, dict]:
    """(the ops to time, or None, and what is known so far): only what gives the right results is timed."""
    interpreted = name == "fused" and device.type == "cpu"
    if interpreted and dtype == torch.bfloat16:
        return None, {"status": "skipped", "note": "skipped: Triton's interpreter computes bfloat16 wrongly"}
    try:
        ops = providers.load(name, case)
    except RuntimeError as error:
        return None, {"status": "skipped", "note": f"skipped: {error}"[:200]}
    try:
        if interpreted:
            case, tensors = reduced, reduced.make(device, dtype)
            truth = providers.truth_of(case, tensors)
        first = providers.first_call_seconds(case, ops, tensors, dtype)
        verdict = providers.judge(case, ops, tensors, dtype, truth)
    except Exception as error:  # another provider's compiler can fail in any way, and must not end the table
        reason = (str(error).splitlines() or [""])[0]
        return None, {"status": "failed", "note": f"FAILED: {type(error).__name__}: {reason}"[:200]}
    known = {"error": verdict.error, "tolerance": verdict.tolerance, "first_call_seconds": first}
    if not verdict.right:
        note = f"WRONG: {verdict.where} is off by {verdict.error:.1e}, tolerance {verdict.tolerance:.0e}"
        return None, {"status": "wrong", "note": note, **known, "error": min(verdict.error, 1e30)}
    if interpreted:
        note = f"interpreted: not timed (right at batch {_REDUCED_BATCH}, error {verdict.error:.1e})"
        return None, {"status": "interpreted", "note": note, **known}
    return ops, known


def timed(case, ops, tensors, dtype, backward: bool, device, seconds: float, cost, floor: float) -> dict:
    count = measure.rotating_sets(cost.bytes, device)
    sets = [tensors] + [case.make(device, dtype) for _ in range(count - 1)]

    def prepare():
        return providers.calls_of(case, ops, sets, dtype, backward)

    timing = measure.time_calls(prepare, device, seconds)
    peak = measure.peak_extra_bytes(providers.calls_of(case, ops, sets[:1], dtype, backward)[0], device)
    time = timing.best
    return {
        "status": "timed",
        "note": timing.note,
        "median": timing.median,
        "low": timing.low,
        "high": timing.high,
        "samples": timing.samples,
        "graph": timing.graph,
        "time": time,
        "gb_s": cost.bytes / time / 1e3,
        "tflop_s": cost.flops / time / 1e6,
        "roofline": floor / time,
        "peak_bytes": peak,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise Mistake(f"{message}; see --help")

    parser = Parser(prog="blink bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(OPS)}")
    add("--shapes", default="network", metavar="S", help=f"{', '.join(NAMED)}, sweep or BxCxHxW,... (default: network)")
    add("--recipe", dest="shapes", choices=RECIPES, help="the shapes of this recipe: the same as --shapes RECIPE")
    add("--dtype", type=listed(DTYPES), metavar="D,...", help="float32, float16, bfloat16")
    add("--providers", type=listed(providers.NAMES), default=list(providers.NAMES), metavar="P,...")
    add("--pass", dest="passes", choices=("fwd", "bwd", "both"), default="both")
    add("--json", type=Path, metavar="FILE", help="write everything, with GPU, power limit, versions, commit")
    add("--plot", type=Path, metavar="DIR", help="write a roofline plot and a bar chart per op")
    add("--quick", action="store_true", help="one shape per op, a smaller batch, shorter timings")
    add("--list", action="store_true", help="print the cases and stop")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print the change from A.json to B.json")
    add("--band", type=float, default=5.0, metavar="PERCENT", help="noise band of --compare (default: 5)")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        raise Mistake(f"unknown op {unknown[0]!r}; expected one of {', '.join(OPS)}")
    if options.json is not None and options.json.is_dir():
        raise Mistake(f"--json {options.json} is a folder; name a file")
    if options.json is not None and not options.json.parent.is_dir():
        raise Mistake(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    return options


def listed(known):
    def parse_list(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; expected one or more of {', '.join(known)}")
        return names

    return parse_list


def parse_shapes(text: str) -> list[tuple[int, int, int, int]]:
    shapes = []
    for part in text.split(","):
        sizes = part.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise Mistake(f"--shapes {part!r}: expected {', '.join(NAMED)}, sweep or BxCxHxW, as in 512x128x15x15")
        if min(int(sizes[2]), int(sizes[3])) < 2:
            raise Mistake(f"--shapes {part!r}: height and width must be at least 2, the whitening kernel's size")
        shapes.append(tuple(map(int, sizes)))
    return shapes


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']}, expected 1")
        content["rows"][0]["providers"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise Mistake(f"{path} is not a file that bench --json wrote ({error})") from error
    return content


def write_json(path: Path, content: dict) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise Mistake(f"could not write {path} ({error.strerror}); free some space or name another file") from error


def draw_plots(rows: list[dict], title: str, folder: Path) -> None:
    try:
        from .plot import draw

        for path in draw(rows, title, folder):
            print(f"wrote {path}")
    except ImportError as error:
        raise Mistake(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    except OSError as error:
        raise Mistake(f"--plot {folder}: {error.strerror}; name another folder") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
