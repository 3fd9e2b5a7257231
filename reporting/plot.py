"""Draw the curves of trainings that have ended over each other: loss, accuracy and learning rate by epoch, means over
runs with 95 % intervals.
"""

import argparse
from pathlib import Path

from blink.errors import UserError
from blink.files import check_output, replacing
from blink.optional import needed
from blink.reporting.curves import picture
from blink.reporting.trainings import check, read_all

EXAMPLES = (
    "blink plot runs/photographs",
    "blink plot runs/blink runs/hlb other.json -o compared.png",
)
_FORMS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trainings", nargs="+", type=Path, metavar="DIR|JSON",
        help="a folder of blink train --out, or a file of its --json")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("plot.png"), metavar="FILE",
        help="a .png, .svg or .pdf (default: %(default)s in this folder)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    path = options.output
    if path.suffix.lower() not in _FORMS:
        raise UserError(f"{path} is no picture's name; expected one that ends in {', '.join(_FORMS)}")
    check(options.trainings)
    needed("matplotlib", "blink plot")
    check_output(path)
    trainings = read_all(options.trainings)
    try:
        with replacing(path) as temporary:
            picture(trainings, temporary, path.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); name another file") from error
    print(f"wrote {path}")
    return 0
