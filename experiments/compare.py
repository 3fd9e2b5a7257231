"""From the runs of a plan to its table: each variant against the first, paired by seed, with 95 % intervals."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod, sqrt

from blink.errors import UserError
from blink.experiments.plans import Plan
from blink.tables import fixed
from blink.tables import markdown as table
from blink.training.results import spread

# a difference of accuracy that is worth knowing
_TELLING = 0.001
# from so many seeds on the noise of a ruler is told
_MANY_SEEDS = 8
_RULERS = ("cross_entropy", "margin")


@dataclass(frozen=True)
class Row:
    """One variant. accuracy, difference, seconds, ratio: mean, std, ci95 and n as `results.spread` gives them.

    difference: accuracy less the baseline's of the same seed; ratio: the baseline's seconds of the same seed over
    these; both None for the baseline itself and where no seed is shared. pflop: counted for a run. rulers: those of
    `results.HeldOut`, ruler_differences: less the baseline's, by name, as far as the runs have them. better: the
    probability that it is the more accurate one, better_by_entropy: that its cross-entropy is lower.
    """

    variant: str
    accuracy: dict
    difference: dict | None
    rulers: dict[str, dict]
    ruler_differences: dict[str, dict]
    better: float | None
    better_by_entropy: float | None
    seconds: dict
    ratio: dict | None
    pflop: float
    stem: dict | None
    epochs: float


def machine_of(environment: dict) -> dict:
    """What of its description two machines, and the software on them, must share."""
    return {key: environment.get(key) for key in ("device", "threads", "power_limit", "torch", "triton")}


def conditions(record: dict) -> dict:
    """What two runs must share to be compared: the plan, the data, the scale, the machine and how it computes."""
    data = record["data"]
    return {
        "plan": record["plan"],
        "data": f"{data['name']} {data['fingerprint']}, {data['train']:,} training and {data['test']:,} test images",
        "width": record["width"],
        "epochs": record["epochs_factor"],
        "kernels": record["kernels"]["name"],
        "dtype": record["dtype"],
        "graph": record["graph"],
        "deterministic": record["deterministic"],
        **machine_of(record["environment"]),
    }


def same_recipe(a: dict, b: dict) -> bool:
    """Whether two runs trained the same recipe for as many steps."""
    return a["recipe"] == b["recipe"] and a["budget"] == b["budget"]


def comparable(records: Iterable[dict]) -> list[tuple[dict, list[dict]]]:
    """The records in groups that share their conditions, in order of appearance."""
    groups: dict[str, tuple[dict, list[dict]]] = {}
    for record in records:
        shared = conditions(record)
        groups.setdefault(json.dumps(shared), (shared, []))[1].append(record)
    return list(groups.values())


def compare(records: list[dict], plan: Plan) -> list[Row]:
    """Rows of one comparable group in the plan's order; the first is the baseline.

    Of a seed that occurs twice the first run counts. Raises UserError when a variant's runs are of different recipes.
    """
    runs: dict[str, dict[int, dict]] = {name: {} for name in plan.variants}
    for record in records:
        name, seed = record["variant"], record["seed"]
        seen = runs.setdefault(name, {})
        if seen and not same_recipe(next(iter(seen.values())), record):
            raise UserError(f"the runs of {name!r} are of two recipes or budgets; keep those of one")
        seen.setdefault(seed, record)
    runs = {name: seen for name, seen in runs.items() if seen}
    baseline = next(iter(runs.values()))
    rows = []
    for name, seen in runs.items():
        shared = [seed for seed in seen if seed in baseline and seen is not baseline]
        gains = [seen[s]["accuracy"] - baseline[s]["accuracy"] for s in shared]
        ratios = [baseline[s]["seconds"] / seen[s]["seconds"] for s in shared]
        some = next(iter(seen.values()))
        measured = {seed: run["held_out"] for seed, run in seen.items() if run.get("held_out")}
        base = {seed: run["held_out"] for seed, run in baseline.items() if run.get("held_out")}
        both = [seed for seed in shared if seed in measured and seed in base]
        differences = {ruler: [measured[s][ruler] - base[s][ruler] for s in both] for ruler in _RULERS}
        rows.append(
            Row(
                name,
                spread([r["accuracy"] for r in seen.values()]),
                spread(gains) if shared else None,
                {ruler: spread([each[ruler] for each in measured.values()]) for ruler in _RULERS if measured},
                {ruler: spread(values) for ruler, values in differences.items() if values},
                probability_above_zero(gains),
                probability_above_zero([-value for value in differences["cross_entropy"]]),
                spread([r["seconds"] for r in seen.values()]),
                spread(ratios) if shared else None,
                some["flops"]["total"] / 1e15,
                some.get("stem"),
                some["budget"]["total_steps"] / some["budget"]["steps_per_epoch"],
            )
        )
    return rows


def probability_above_zero(values: list[float]) -> float | None:
    """That what these were drawn from has a mean above 0: Student's t, nothing known before; None of fewer than two."""
    if len(values) < 2:
        return None
    found = spread(values)
    if found["std"] == 0:
        return 0.5 * (1 + (found["mean"] > 0) - (found["mean"] < 0))
    from scipy.stats import t

    return float(t.cdf(found["mean"] * sqrt(len(values)) / found["std"], len(values) - 1))


def pairs_needed(std: float) -> int:
    """Of runs whose differences have this standard deviation: how many make the half 95 % interval 0.1 points."""
    from scipy.stats import t

    pairs = max(2, ceil((1.96 * std / _TELLING) ** 2))
    while t.ppf(0.975, pairs - 1) * std > _TELLING * sqrt(pairs):
        pairs += 1
    return pairs


def percent(value: dict | None, signed: bool = False) -> str:
    """A spread of fractions in percent, with its interval."""
    if value is None:
        return "-"
    text = f"{100 * value['mean']:{'+' if signed else ''}.2f}"
    return text if value["ci95"] is None else f"{text} +-{100 * value['ci95']:.2f}"


COLUMNS = ("variant", "n", "accuracy %", "difference", "seconds", "speed", "PFLOP")
_WIDTHS = (22, 3, 13, 13, 8, 6, 7)
RULER_COLUMNS = ("variant", "cross-entropy", "margin", "better %", "by CE %", "pairs")
_RULER_WIDTHS = (22, 17, 14, 8, 8, 6)
STEM_COLUMNS = ("variant", "features", "channels", "output", "kMAC/image", "stem ms", "of first")


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells under COLUMNS; every +- is half of a 95 % t interval."""
    return (
        row.variant,
        str(row.accuracy["n"]),
        percent(row.accuracy),
        percent(row.difference, signed=True),
        f"{row.seconds['mean']:.1f}",
        "1" if row.ratio is None else f"{row.ratio['mean']:.2f}x",
        f"{row.pflop:.4f}",
    )


def ruler_cells(row: Row) -> tuple[str, ...]:
    """A row's cells under RULER_COLUMNS: of the first variant what its runs have, of others the paired differences."""
    first = row.difference is None
    found, sign = (row.rulers, "") if first else (row.ruler_differences, "+")

    def cell(ruler: str, digits: int) -> str:
        value = found.get(ruler)
        if value is None:
            return "-"
        text = f"{value['mean']:{sign}.{digits}f}"
        return text if first or value["ci95"] is None else f"{text} +-{value['ci95']:.{digits}f}"

    chances = ("-" if p is None else f"{100 * p:.1f}" for p in (row.better, row.better_by_entropy))
    std = None if first else row.difference["std"]
    return (
        row.variant,
        cell("cross_entropy", 4),
        cell("margin", 3),
        *chances,
        "-" if std is None else str(pairs_needed(std)),
    )


def noise(rows: list[Row]) -> list[str]:
    """How much the rulers of variants of many seeds vary by the seed alone."""
    out = []
    for row in rows:
        if row.rulers and row.rulers["margin"]["n"] >= _MANY_SEEDS:
            stds = ", ".join(f"{ruler.replace('_', '-')} {row.rulers[ruler]['std']:.4f}" for ruler in _RULERS)
            out += [
                f"noise of {row.variant!r} over seeds (std, n = {row.rulers['margin']['n']}):",
                f"  accuracy {100 * row.accuracy['std']:.2f} points, {stds}",
            ]
    return out


def stem_cells(row: Row, baseline: Row) -> tuple[str, ...]:
    """A row's cells under STEM_COLUMNS."""
    stem = row.stem
    side = "x".join(str(n) for n in stem["output"])
    milliseconds = f"{stem['milliseconds']:.2f}", f"{stem['milliseconds'] / baseline.stem['milliseconds']:.2f}x"
    return row.variant, str(stem["features"]), str(stem["channels"]), side, f"{stem['macs'] / 1e3:.0f}", *milliseconds


def machine(shared: dict) -> str:
    """Where and how runs of these conditions were trained."""
    power = shared["power_limit"] or f"{shared['threads']} thread{'s' if shared['threads'] != 1 else ''}"
    return (
        f"{shared['device']}, {power}, {shared['dtype']}, {shared['kernels']}, torch {shared['torch']}, "
        f"triton {shared['triton']}"
    )


def heading(shared: dict, rows: list[Row]) -> str:
    """One line that names what the table's runs share, n included."""
    counts = sorted({row.accuracy["n"] for row in rows})
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    width = "full width" if shared["width"] == 1 else f"{shared['width']:g} x the channels"
    epochs = "the recipes' epochs" if shared["epochs"] == 1 else f"{shared['epochs']:g} x the epochs"
    return f"{n}; {shared['data']}; {width}, {epochs}; {machine(shared)}"


def _epochs_saved(rows: list[Row], name: str, rungs: tuple[str, ...]) -> list[str]:
    """How many epochs the rungs' recipe needs for the accuracy of `name`, by linear interpolation.

    rungs: variants that differ in their epochs only.
    """
    by_name = {row.variant: row for row in rows}
    if name not in by_name:
        return []
    if not all(rung in by_name for rung in rungs) or not any(decided(by_name[rung]) for rung in rungs[1:]):
        return [f"{name}: too few runs to tell {', '.join(map(repr, rungs))} apart, so no equal budget can be named"]
    target = by_name[name].accuracy["mean"]
    points = sorted((by_name[rung].epochs, by_name[rung].accuracy["mean"]) for rung in rungs)
    for (e0, a0), (e1, a1) in pairwise(points):
        if min(a0, a1) <= target <= max(a0, a1) and a0 != a1:
            needed = e0 + (e1 - e0) * (target - a0) / (a1 - a0)
            return [
                f"{name}: the accuracy of {by_name[name].epochs:.3g} epochs, for which {rungs[0]!r} takes {needed:.3g} "
                "(linear interpolation of the means)"
            ]
    return [f"{name}: its accuracy lies outside that of {', '.join(rungs)}, so no equal budget can be named"]


def _stem_claims(rows: list[Row], before: str, after: str) -> list[str]:
    """What hlb-CIFAR10's author said of the change, and what was measured here."""
    by_name = {row.variant: row for row in rows}
    if before not in by_name or after not in by_name:
        return []
    old, new = by_name[before], by_name[after]
    pixels = [prod(row.stem["output"]) for row in (old, new)]
    seconds, saved = old.seconds["mean"], old.seconds["mean"] - new.seconds["mean"]
    lost = f", here {percent(new.difference, signed=True)} points" if decided(new) else ": too few runs here to tell"
    return [
        f"claimed of {before} -> {after}, beside what is measured here:",
        f"- 27 -> 12 features: {old.stem['features']} -> {new.stem['features']}",
        f"- 4/9 of the kernel's cost: {new.stem['macs'] / old.stem['macs']:.2f}x the stem's multiply-adds, "
        f"{new.stem['milliseconds'] / old.stem['milliseconds']:.2f}x its time",
        f"- fewer pixels: {pixels[0]} -> {pixels[1]}, {pixels[1] / pixels[0]:.2f}x",
        f"- over a second saved of about ten: {saved:.1f} s of {seconds:.1f} s, {100 * saved / seconds:.1f} %",
        f"- accuracy lost, which squeeze-and-excite pays back{lost}",
    ]


def footers(rows: list[Row], plan: Plan) -> list[str]:
    """What a plan says below its table."""
    out = _stem_claims(rows, *plan.stems) if plan.stems else []
    return out + (_epochs_saved(rows, *plan.ladder) if plan.ladder else [])


def lines(shared: dict, records: list[dict], plan: Plan) -> list[str]:
    """One comparable group as text of at most 80 columns but for its heading."""
    rows = compare(records, plan)
    out = ["", heading(shared, rows), *(fixed(line, _WIDTHS, " ") for line in (COLUMNS, *map(cells, rows)))]
    if plan.stems:
        widths = (22, *(max(8, len(name)) for name in STEM_COLUMNS[1:]))
        out += ["", *(fixed(line, widths, " ") for line in (STEM_COLUMNS, *(stem_cells(row, rows[0]) for row in rows)))]
    if any(row.better is not None for row in rows):
        out += ["", *(fixed(line, _RULER_WIDTHS, " ") for line in (RULER_COLUMNS, *map(ruler_cells, rows)))]
    return out + noise(rows) + footers(rows, plan)


def decided(row: Row) -> bool:
    """Whether the runs tell this variant from the first one: the interval of the difference does not hold 0."""
    return (
        row.difference is not None
        and row.difference["ci95"] is not None
        and (abs(row.difference["mean"]) > row.difference["ci95"])
    )


def markdown(shared: dict, records: list[dict], plan: Plan) -> str:
    """The same as Markdown under its heading, of the variants only that the runs tell from the first."""
    rows = compare(records, plan)
    first, told = rows[0], [row for row in rows if decided(row)]
    open_ones = [row.variant for row in rows[1:] if row not in told]
    parts = [heading(shared, rows) + "\n"]
    if told:
        parts.append(table(COLUMNS, map(cells, [first, *told])))
    if open_ones:
        parts.append(f"Too few runs to tell from {first.variant!r}: {', '.join(open_ones)}.\n")
    # without an interval a difference says nothing
    ruled = [row for row in rows[1:] if row.ruler_differences and row.ruler_differences["margin"]["n"] > 1]
    if ruled:
        parts.append(table(RULER_COLUMNS, map(ruler_cells, [first, *ruled])))
    if plan.stems:
        parts.append(table(STEM_COLUMNS, [stem_cells(row, first) for row in rows]))
    below = "".join(f"{line}\n" for line in noise(rows) + footers(rows, plan))
    return "\n".join([*parts, below] if below else parts)
