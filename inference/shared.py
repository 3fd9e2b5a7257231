"""What the commands that use a network share."""

from pathlib import Path

from blink import ending
from blink.errors import UserError
from blink.files import is_missing
from blink.model import saved

# of a data set
HALVES = ("train", "test", "all")


def add_model_argument(add) -> None:
    add("model", type=Path, metavar="MODEL", help="the .safetensors file of a run")


def check_model(path: Path) -> None:
    """Raises UserError where there is none."""
    if is_missing(path):
        raise saved.no_network(path)


def add_device_argument(add) -> None:
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")


class Complaints:
    """Says each on stderr as it comes, and counts them: the images that can be read are used all the same."""

    def __init__(self):
        self.count = 0

    def __call__(self, error: UserError) -> None:
        ending.complain(f"blink: {error}")
        self.count += 1


def printable(text: str) -> str:
    """Names that are no text are file names in another encoding."""
    return text.encode(errors="replace").decode()
