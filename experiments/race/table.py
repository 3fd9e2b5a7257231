"""The race's records as tables: each contestant's accuracy and seconds, and its seconds over this project's."""

import statistics
from dataclasses import dataclass

from blink.experiments.compare import how, machine, percent
from blink.experiments.race.contest import OURS
from blink.tables import fixed, number
from blink.tables import markdown as table
from blink.training.results import spread

COLUMNS = ("trainer", "n", "accuracy %", "seconds", "our clock", "times blink's", "PFLOP")
_WIDTHS = (20, 4, 14, 9, 10, 14, 8)
MORE = ("trainer", "std %", "std s", "images/s", "peak GB", "cold s", "again s")


@dataclass(frozen=True)
class Row:
    """A contestant. accuracy, seconds, ours: as `report.spread` gives them; ratio: of its mean seconds in a block over
    those of this project in the same block; cold, again: whole-process seconds of a first process with empty compiler
    caches and of a second with those caches; images: trained on in a run.
    """

    name: str
    accuracy: dict
    seconds: dict
    ours: dict
    ratio: dict | None
    pflop: float | None
    images: int | None
    peak_bytes: int | None
    cold: float | None
    again: float | None


def rows(records: list[dict]) -> list[Row]:
    """This project first, then the others in order of appearance; one without a run has no row."""
    names = list(dict.fromkeys([OURS, *(record["contestant"] for record in records)]))
    blocks = {
        name: {r["block"]: r for r in records if r["contestant"] == name and r["kind"] == "block" and r["runs"]}
        for name in names
    }

    def mean(record: dict) -> float:
        return statistics.fmean(run["our_seconds"] for run in record["runs"])

    out = []
    for name in names:
        mine = blocks[name]
        runs = [run for record in mine.values() for run in record["runs"]]
        if not runs:
            continue
        own = [r for r in records if r["contestant"] == name]
        shared = [at for at in mine if at in blocks[OURS]] if name != OURS else []
        processes = {r["kind"]: r["process_seconds"] for r in own if r["kind"] in ("cold", "again") and r["runs"]}
        peaks = [r["peak_bytes"] for r in mine.values() if r["peak_bytes"]]
        out.append(
            Row(
                name,
                *(spread([run[key] for run in runs]) for key in ("accuracy", "seconds", "our_seconds")),
                spread([mean(mine[at]) / mean(blocks[OURS][at]) for at in shared]) if shared else None,
                own[0]["pflop"],
                own[0]["images"],
                max(peaks) if peaks else None,
                processes.get("cold"),
                processes.get("again"),
            )
        )
    return out


def cells(row: Row) -> tuple[str, ...]:
    """Under COLUMNS; every +- is half of a 95 % t interval."""
    ratio = "1" if row.ratio is None else f"{row.ratio['mean']:.2f}"
    if row.ratio is not None and row.ratio["ci95"] is not None:
        ratio += f" +-{row.ratio['ci95']:.2f}"
    seconds, ours = (f"{value['mean']:.3f}" for value in (row.seconds, row.ours))
    return row.name, str(row.accuracy["n"]), percent(row.accuracy), seconds, ours, ratio, number(row.pflop, ".4f")


def more_cells(row: Row) -> tuple[str, ...]:
    """Under MORE."""
    rate = None if row.images is None else row.images / row.seconds["mean"]
    accuracy_std = None if row.accuracy["std"] is None else 100 * row.accuracy["std"]
    return (
        row.name,
        number(accuracy_std, ".3f"),
        number(row.seconds["std"], ".4f"),
        number(rate, ",.0f"),
        number(row.peak_bytes, ".2f", 1e9),
        number(row.cold, ".1f"),
        number(row.again, ".1f"),
    )


def heading(shared: dict) -> str:
    """What all contestants had in common."""
    return f"{shared['data']}; {machine(shared, how(shared))}"


def notes(records: list[dict]) -> list[str]:
    """What a reader must know of some contestant, each once."""
    return list(dict.fromkeys(r["note"] for r in records if r.get("note")))


def markdown(records: list[dict], brief: bool = False) -> str:
    """The records of one file as Markdown tables under their heading; brief: without the second."""
    found = rows(records)
    out = f"{heading(records[0]['shared'])}\n\n{table(COLUMNS, [cells(row) for row in found])}"
    if not brief:
        out += f"\n{table(MORE, [more_cells(row) for row in found])}"
    return out + "".join(f"\nNote: {note}.\n" for note in notes(records))


def text(records: list[dict]) -> list[str]:
    """Lines of at most 80 columns but for the heading and what stands below."""
    found = rows(records)

    first, second = ((COLUMNS, *map(cells, found)), (MORE, *map(more_cells, found)))
    out = [heading(records[0]["shared"]), *(fixed(line, _WIDTHS) for line in first)]
    return [*out, "", *(fixed(line, _WIDTHS) for line in second), *(f"note: {note}" for note in notes(records))]
