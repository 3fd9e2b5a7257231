"""Tables as Markdown and as text."""

from collections.abc import Iterable


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, each line ended."""
    head = list(columns)
    return "".join("| " + " | ".join(values) + " |\n" for values in (head, ["---"] * len(head), *rows))


def fixed(values: Iterable[str], widths: Iterable[int], gap: str = "") -> str:
    """A row of text: the first cell to the left, the others to the right, each at least as wide as it is told."""
    first, *rest = zip(values, widths)
    return gap.join((f"{first[0]:<{first[1]}}", *(f"{value:>{width}}" for value, width in rest)))


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """value / scale in this format; a dash for what is not known."""
    return "-" if value is None else format(value / scale, form)
