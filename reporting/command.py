"""Make one HTML page of trainings that have ended: curves, seconds, what was confused, pictures. It needs no network
and no other file; several trainings are drawn over each other.
"""

import argparse
import sys
from pathlib import Path

from blink.errors import UserError
from blink.files import check_output, replacing
from blink.optional import needed
from blink.reporting.trainings import Training, check, read_all

EXAMPLES = (
    "blink report runs/photographs",
    "blink report runs/blink runs/hlb other.json -o compared.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trainings", nargs="+", type=Path, metavar="DIR|JSON",
        help="a folder of blink train --out, or a file of its --json")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE",
        help="default: %(default)s in this folder")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    trainings, damaged = write_report(options.trainings, options.output)
    for training in trainings:
        for line in training.missing:
            print(f"{training.path}: {line}")
    for line in damaged:
        # the page is made without it
        print(f"blink: {line}", file=sys.stderr)
    print(f"wrote {options.output}")
    return 2 if damaged else 0


def write_report(paths: list[Path], output: Path) -> tuple[list[Training], list[str]]:
    """Write the page of these trainings: (they, a line on each file beside them that is damaged). Raises UserError."""
    check(paths)
    for library in ("jinja2", "matplotlib"):
        needed(library, "a report")
    check_output(output)
    trainings = read_all(paths)
    # only now: help and mistakes need no PyTorch
    from blink.reporting.page import render

    page, damaged = render(trainings)
    try:
        with replacing(output) as temporary:
            temporary.write_text(page)
    except OSError as error:
        raise UserError(f"could not write {output} ({error.strerror}); name another file") from error
    return trainings, damaged
