"""Tables as Markdown and as aligned text."""

from collections.abc import Iterable


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, each line ended."""
    head = list(columns)
    return "".join("| " + " | ".join(values) + " |\n" for values in (head, ["---"] * len(head), *rows))


def aligned(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right, each as wide as its widest cell."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
