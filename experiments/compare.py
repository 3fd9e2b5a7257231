"""From the runs of a plan to its table: each variant against the first, paired by machine and seed, with 95 %
intervals.
"""

import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod, sqrt

from blink.errors import UserError
from blink.experiments.plans import Plan
from blink.experiments.pool import Pool, machine_of, pair_of, same_recipe
from blink.tables import fixed
from blink.tables import markdown as table
from blink.training.results import spread

# a difference of accuracy that is worth knowing
_TELLING = 0.001
# an interval around 0 that is narrower bounds a difference
EQUIVALENT = 0.004
# what rounding leaves of a standard deviation of 0
_NOTHING = 1e-9
# from so many seeds on the noise of a ruler is told
_MANY_SEEDS = 8
_RULERS = ("cross_entropy", "margin")


@dataclass(frozen=True)
class Row:
    """One variant. accuracy, difference, seconds, ratio: mean, std, ci95 and n as `results.spread` gives them.

    first: whether it is the baseline. difference: accuracy less the baseline's on the same machine with the same seed;
    ratio: the baseline's seconds there over these; both None for the baseline itself and where nothing is shared.
    seconds: None where the table's runs are of several machines. pflop: counted for a run. rulers: those of
    `results.HeldOut`, ruler_differences: less the baseline's, by name, as far as the runs have them. better: the
    probability that it is the more accurate one, better_by_entropy: that its cross-entropy is lower. stem_ratio: the
    stem's milliseconds over the baseline's on the same machine, the mean over these.
    """

    variant: str
    first: bool
    accuracy: dict
    difference: dict | None
    rulers: dict[str, dict]
    ruler_differences: dict[str, dict]
    better: float | None
    better_by_entropy: float | None
    seconds: dict | None
    ratio: dict | None
    pflop: float
    stem: dict | None
    stem_ratio: float | None
    epochs: float

    @property
    def pairs(self) -> int:
        return 0 if self.difference is None else self.difference["n"]


def compare(records: list[dict], plan: Plan) -> list[Row]:
    """Rows of one pool's runs in the plan's order; the first is the baseline.

    Of a machine's seed that occurs twice the first run counts. Raises UserError when a variant's runs are of different
    recipes.
    """
    runs: dict[str, dict[tuple[str, int], dict]] = {name: {} for name in plan.variants}
    for record in records:
        name = record["variant"]
        seen = runs.setdefault(name, {})
        if seen and not same_recipe(next(iter(seen.values())), record):
            raise UserError(f"the runs of {name!r} are of two recipes or budgets; keep those of one")
        seen.setdefault(pair_of(record), record)
    runs = {name: seen for name, seen in runs.items() if seen}
    baseline = next(iter(runs.values()))
    one_machine = len({machine for seen in runs.values() for machine, _ in seen}) == 1
    rows = []
    for name, seen in runs.items():
        shared = [at for at in seen if at in baseline and seen is not baseline]
        gains = [seen[at]["accuracy"] - baseline[at]["accuracy"] for at in shared]
        ratios = [baseline[at]["seconds"] / seen[at]["seconds"] for at in shared]
        some = next(iter(seen.values()))
        measured = {at: run["held_out"] for at, run in seen.items() if run.get("held_out")}
        base = {at: run["held_out"] for at, run in baseline.items() if run.get("held_out")}
        both = [at for at in shared if at in measured and at in base]
        differences = {ruler: [measured[at][ruler] - base[at][ruler] for at in both] for ruler in _RULERS}
        rows.append(
            Row(
                name,
                seen is baseline,
                spread([r["accuracy"] for r in seen.values()]),
                spread(gains) if shared else None,
                {ruler: spread([each[ruler] for each in measured.values()]) for ruler in _RULERS if measured},
                {ruler: spread(values) for ruler, values in differences.items() if values},
                probability_above_zero(gains),
                probability_above_zero([-value for value in differences["cross_entropy"]]),
                spread([r["seconds"] for r in seen.values()]) if one_machine else None,
                spread(ratios) if shared else None,
                some["flops"]["total"] / 1e15,
                next((run["stem"] for run in seen.values() if run.get("stem")), None),
                _stem_ratio(seen, baseline),
                some["budget"]["total_steps"] / some["budget"]["steps_per_epoch"],
            )
        )
    return rows


def _stem_ratio(seen: dict[tuple[str, int], dict], baseline: dict[tuple[str, int], dict]) -> float | None:
    """Of runs by (machine, seed): a stem is measured once on a machine, so any of its runs there stands for it."""
    own, other = (
        {machine: run["stem"]["milliseconds"] for (machine, _), run in reversed(runs.items()) if run.get("stem")}
        for runs in (seen, baseline)
    )
    ratios = [own[machine] / other[machine] for machine in own if machine in other]
    return statistics.fmean(ratios) if ratios else None


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
_WIDTHS = (22, 5, 13, 13, 8, 6, 7)
RULER_COLUMNS = ("variant", "cross-entropy", "margin", "better %", "by CE %", "pairs")
_RULER_WIDTHS = (22, 17, 14, 8, 8, 6)
STEM_COLUMNS = ("variant", "features", "channels", "output", "kMAC/image", "stem ms", "of first")


def cells(row: Row, timed: bool = False) -> tuple[str, ...]:
    """A row's cells under COLUMNS; +- is half of a 95 % t interval; n: runs, or pairs/runs where some have no pair.

    timed: with intervals of seconds and speed, for which a terminal has no room.
    """
    n = row.accuracy["n"]
    return (
        row.variant,
        str(n) if row.first or row.pairs == n else f"{row.pairs}/{n}",
        percent(row.accuracy),
        percent(row.difference, signed=True),
        figure(row.seconds, 1, interval=timed),
        "1" if row.first else figure(row.ratio, 2, unit="x", interval=timed),
        f"{row.pflop:.4f}",
    )


def figure(value: dict | None, digits: int, sign: str = "", interval: bool = True, unit: str = "") -> str:
    """A spread's mean, with its interval unless that is unknown or not asked for."""
    if value is None:
        return "-"
    text = f"{value['mean']:{sign}.{digits}f}{unit}"
    return f"{text} +-{value['ci95']:.{digits}f}" if interval and value["ci95"] is not None else text


def ruler_cells(row: Row) -> tuple[str, ...]:
    """A row's cells under RULER_COLUMNS: of the first variant what its runs have, of others the paired differences."""
    found, form = (row.rulers, ("", False)) if row.first else (row.ruler_differences, ("+", True))
    chances = ("-" if p is None else f"{100 * p:.1f}" for p in (row.better, row.better_by_entropy))
    std = None if row.difference is None else row.difference["std"]
    return (
        row.variant,
        figure(found.get("cross_entropy"), 4, *form),
        figure(found.get("margin"), 3, *form),
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


def stem_cells(row: Row) -> tuple[str, ...]:
    """A row's cells under STEM_COLUMNS; milliseconds of one machine only, as seconds."""
    stem = row.stem
    side = "x".join(str(n) for n in stem["output"])
    milliseconds = "-" if row.seconds is None else f"{stem['milliseconds']:.2f}"
    cost = f"{stem['macs'] / 1e3:.0f}", milliseconds, _times(row.stem_ratio)
    return row.variant, str(stem["features"]), str(stem["channels"]), side, *cost


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def machine(shared: dict, how: str | None = None) -> str:
    """A machine and its software in a few words; how: how it computed, if that is to stand there too."""
    power = shared["power_limit"] or f"{shared['threads']} thread{'s' if shared['threads'] != 1 else ''}"
    parts = shared["device"], power, how, f"torch {shared['torch']}", f"triton {shared['triton']}"
    return ", ".join(filter(None, parts))


def how(shared: dict) -> str:
    """How runs of these conditions compute."""
    words = [shared["dtype"], shared["kernels"]]
    return ", ".join(words + [word for word in ("graph", "deterministic") if shared.get(word)])


def heading(pool: Pool, rows: list[Row]) -> str:
    """One line that names what the table's runs share, n included, and how many came from which machine."""
    shared, counts = pool.shared, sorted({row.accuracy["n"] for row in rows})
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    width = "full width" if shared["width"] == 1 else f"{shared['width']:g} x the channels"
    epochs = "the recipes' epochs" if shared["epochs"] == 1 else f"{shared['epochs']:g} x the epochs"
    machines = Counter(machine(machine_of(run["environment"])) for run in pool.runs)
    origins = (f"{count} run{'s' if count != 1 else ''} on {name}" for name, count in machines.items())
    return f"{n}; {shared['data']}; {width}, {epochs}; {how(shared)}; {'; '.join(origins)}"


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
    known = old.stem_ratio is not None and new.stem_ratio is not None
    time = _times(new.stem_ratio / old.stem_ratio if known else None)
    if old.seconds is None:
        faster = [1.0 if row.first else row.ratio and row.ratio["mean"] for row in (old, new)]
        saved = f"{100 * (1 - faster[0] / faster[1]):.1f} %" if all(faster) else "no machine trained both"
    else:
        seconds, less = old.seconds["mean"], old.seconds["mean"] - new.seconds["mean"]
        saved = f"{less:.1f} s of {seconds:.1f} s, {100 * less / seconds:.1f} %"
    operations = f"by operations {100 * (1 - new.pflop / old.pflop):.1f} %"
    lost = f", here {percent(new.difference, signed=True)} points" if decided(new) else ": too few runs here to tell"
    return [
        f"claimed of {before} -> {after}, beside what is measured here:",
        f"- 27 -> 12 features: {old.stem['features']} -> {new.stem['features']}",
        f"- 4/9 of the kernel's cost: {new.stem['macs'] / old.stem['macs']:.2f}x the stem's multiply-adds, "
        f"{time} its time",
        f"- fewer pixels: {pixels[0]} -> {pixels[1]}, {pixels[1] / pixels[0]:.2f}x",
        f"- over a second saved of about ten: {saved}; {operations}",
        f"- accuracy lost, which squeeze-and-excite pays back{lost}",
    ]


def footers(rows: list[Row], plan: Plan) -> list[str]:
    """What a plan says below its table."""
    out = _stem_claims(rows, *plan.stems) if plan.stems else []
    return out + (_epochs_saved(rows, *plan.ladder) if plan.ladder else [])


def interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of the difference, as fractions of the test images.

    None of fewer than two pairs, and where all differ by the same: so few that they tell nothing of the noise.
    """
    found = row.difference
    if found is None or found["std"] is None or found["std"] < _NOTHING:
        return None
    return found["mean"] - found["ci95"], found["mean"] + found["ci95"]


def decided(row: Row) -> bool:
    """Whether the runs tell this variant from the first one: the interval of the difference does not hold 0."""
    bounds = interval(row)
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]


def verdict(row: Row) -> str | None:
    """What the interval of the difference says of a variant; None where it says nothing yet."""
    bounds = interval(row)
    if decided(row):
        return "better" if bounds[0] > 0 else "worse"
    if bounds is None or bounds[1] - bounds[0] >= EQUIVALENT:
        return None
    # upwards, so that it stays true
    most = ceil(1e4 * max(map(abs, bounds)) - 1e-6) / 100
    return f"no more than {most:.2f} points either way"


def lines(pool: Pool, plan: Plan) -> list[str]:
    """One pool as text of at most 80 columns but for its heading."""
    rows = compare(pool.runs, plan)
    out = ["", heading(pool, rows), *(fixed(line, _WIDTHS, " ") for line in (COLUMNS, *map(cells, rows)))]
    if plan.stems:
        widths = (22, *(max(8, len(name)) for name in STEM_COLUMNS[1:]))
        out += ["", *(fixed(line, widths, " ") for line in (STEM_COLUMNS, *map(stem_cells, rows)))]
    if any(row.better is not None for row in rows):
        out += ["", *(fixed(line, _RULER_WIDTHS, " ") for line in (RULER_COLUMNS, *map(ruler_cells, rows)))]
    return out + noise(rows) + footers(rows, plan)


def markdown(pool: Pool, plan: Plan, origin: str) -> str:
    """The same as Markdown under its heading, of the variants only that the runs have a verdict on.

    origin: a paragraph to stand below the heading.
    """
    rows = compare(pool.runs, plan)
    first, told = rows[0], [row for row in rows if verdict(row)]
    open_ones = [row.variant for row in rows[1:] if row not in told]
    parts = [f"{heading(pool, rows)}\n", origin]
    if told:
        parts.append(table(COLUMNS, [cells(row, timed=True) for row in (first, *told)]))
    if open_ones:
        parts.append(f"Too few runs to tell from {first.variant!r}: {', '.join(open_ones)}.\n")
    # without an interval a difference says nothing
    ruled = [row for row in rows[1:] if row.ruler_differences and row.ruler_differences["margin"]["n"] > 1]
    if ruled:
        parts.append(table(RULER_COLUMNS, map(ruler_cells, [first, *ruled])))
    if plan.stems:
        parts.append(table(STEM_COLUMNS, map(stem_cells, rows)))
    below = "".join(f"{line}\n" for line in noise(rows) + footers(rows, plan))
    return "\n".join([*parts, below] if below else parts)
