"""What the commands that train share: arguments, device, kernels, data, and a mistake's one line."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model import backend as backends
from training import data
from training.errors import UserError


class Parser(argparse.ArgumentParser):
    """A mistake on the command line gets one line and exit code 2."""

    def error(self, message: str):
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def positive(kind: type):
    def parse_positive(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
        return value

    return parse_positive


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., not {text!r}")
    return int(text)


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here; expected cpu, cuda or cuda:N of a GPU here") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; expected cpu or cuda")
    return device


def choose_backend(kernels: str, device: torch.device) -> backends.Backend:
    try:
        return backends.select(kernels, device)
    except ValueError as error:
        raise UserError(f"--kernels {kernels}: {error}") from error


def choose_graph(choice: str, device: torch.device) -> bool:
    """Whether the training step is captured as a CUDA graph; auto: on a GPU."""
    if choice == "on" and device.type != "cuda":
        raise UserError(f"--graph on needs a GPU, and the device is {device.type}; leave it out, or use --graph off")
    return choice != "off" and device.type == "cuda"


def set_determinism(deterministic: bool) -> None:
    """cudnn picks its fastest algorithm by trying, unless runs must be bitwise repeatable."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def load_data(source: str | None, console: Console, notes: list[str]):
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("decoding", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, description="decoding images", completed=done, total=total, visible=True)

        def note(line: str) -> None:
            notes.append(line)
            bar.update(task, description=line, visible=True)

        return data.load(source, progress, note)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make the folder {path} ({error.strerror}); name another") from error
