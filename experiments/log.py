"""The log of the search, results/search.md: every variant of every plan that was run, against its plan's first."""

import textwrap
from collections.abc import Iterable

from blink.experiments import compare
from blink.experiments.compare import Row
from blink.experiments.plans import PLANS
from blink.experiments.pool import Pool
from blink.tables import markdown as table

_HEADER = """# Search log

Made by `blink tabulate`; nothing here is typed in. Every variant of every plan that was run, dead ends included,
against the first one of its plan. What was tried by hand, and why:
[how blink was found](../docs/how-blink-was-found.md). The tables behind the rows, with machines, commands, seeds and
commits: [README.md](README.md).

{firsts}
- n: pairs, of a run of each on the same machine with the same seed. On: images, dtype and kernels. Scale: times the
  channels, times the epochs. PFLOP: of a run of the variant.
- difference: of accuracy, in points; cross-entropy: its difference, of the test images, less is better; +- is half of a
  95 % t interval.
- The verdict is taken from the interval of the accuracy's difference alone. Better, worse: it does not hold 0. No more
  than X points either way: it holds 0, and is narrower than {bound:g} points. Open: neither, and no figures, since they
  would say nothing.
- Of twenty variants that change nothing, one is called better or worse by chance; one that stands out needs seeds of
  its own. What holds at a part of the channels or epochs need not hold at all of them.

To add to it:

    blink ablate PLAN --data PATH --runs N --json results/FILE.jsonl && blink tabulate

"""
COLUMNS = ("plan", "asked", "n", "on", "scale", "PFLOP", "difference", "cross-entropy", "verdict")


def cells(row: Row, pool: Pool, paired: bool) -> tuple[str, ...]:
    """A row's cells under COLUMNS. paired: whether what it was compared with is the plan's first."""
    verdict = compare.verdict(row) if paired else None
    figures = ("-", "-")
    if verdict is not None:
        entropy = row.ruler_differences.get("cross_entropy")
        figures = (
            compare.percent(row.difference, signed=True),
            compare.figure(entropy if entropy and entropy["n"] > 1 else None, 4, "+"),
        )
    pairs = row.pairs if paired else 0
    data = next(run["data"]["name"] for run in pool.runs)
    return (
        _links(pool, row.variant),
        row.variant,
        str(pairs),
        f"{data}, {compare.how(pool.shared)}",
        _scale(pool.shared),
        f"{row.pflop:.4f}",
        *figures,
        verdict or f"open (n = {pairs})",
    )


def _links(pool: Pool, variant: str) -> str:
    """The plan's name as a link to the first file with runs of the variant, and numbers as links to the others."""
    files = [name for name, runs in pool.by_file.items() if any(run["variant"] == variant for run in runs)]
    names = [pool.shared["plan"], *map(str, range(2, len(files) + 1))]
    return " ".join(f"[{name}]({file})" for name, file in zip(names, files))


def _scale(shared: dict) -> str:
    return ", ".join("whole" if shared[key] == 1 else f"{shared[key]:g} x" for key in ("width", "epochs"))


def _item(text: str) -> str:
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False)


def markdown(pools: Iterable[Pool]) -> str:
    """The whole page, of pools of the plans in PLANS."""
    rows, untried = [], {name: list(plan.variants) for name, plan in PLANS.items()}
    by_plan: dict[str, list[Pool]] = {name: [] for name in PLANS}
    for pool in pools:
        by_plan[pool.shared["plan"]].append(pool)
    for name, found in by_plan.items():
        first = next(iter(PLANS[name].variants))
        for pool in found:
            compared = compare.compare(pool.runs, PLANS[name])
            paired = compared[0].variant == first
            rows += [cells(row, pool, paired) for row in compared if row.variant != first]
            ran = {row.variant for row in compared}
            untried[name] = [variant for variant in untried[name] if variant not in ran]
    firsts = ", ".join(f"{next(iter(plan.variants))!r} in {name}" for name, plan in PLANS.items())
    firsts = _item(f"asked: the variant; what it is compared with is {firsts}.")
    text = _HEADER.format(firsts=firsts, bound=100 * compare.EQUIVALENT) + table(COLUMNS, rows)
    items = (_item(f"{name}: {', '.join(map(repr, variants))}") for name, variants in untried.items() if variants)
    left = "".join(f"{item}\n" for item in items)
    return text + (f"\nIn a plan, without a run on file:\n\n{left}" if left else "")
