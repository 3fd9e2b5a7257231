"""What the commands that train share: arguments, device, kernels, data, facts, and a mistake's one line."""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blink.errors import UserError
from blink.kernels import environment
from blink.model import backend as backends
from blink.training import data, precision
from blink.training.allocator import keep_freed_memory
from blink.training.data.dataset import Dataset
from blink.training.loop import Budget
from blink.training.recipes import Recipe


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
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {what} above 0, not {text!r}")
        return value

    return parse_positive


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ... below 2**63, not {text!r}")
    return int(text)


@dataclass(frozen=True)
class Setting:
    """On what and how a command trains, whatever the recipe."""

    device: torch.device
    backend: backends.Backend
    compute: precision.Precision
    graph: bool
    deterministic: bool
    environment: dict

    @property
    def interpreted(self) -> bool:
        return self.backend.name == "fused" and self.device.type != "cuda"


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kernels", choices=backends.CHOICES, default="auto", help="auto: fused on a GPU, reference elsewhere")
    add(
        "--graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="replay each step as a CUDA graph (auto: on a GPU)",
    )
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=precision.DTYPES, help="compute dtype (default: fp16 on a GPU; bf16 or fp32 on a CPU)")
    add("--deterministic", action="store_true", help="bitwise repeatable runs (slower convolutions)")


def choose_setting(options: argparse.Namespace) -> Setting:
    """What `add_setting_arguments` was given, made effective in this process. Raises UserError for what cannot be."""
    device = choose_device(options.device)
    backend = choose_backend(options.kernels, device)
    interpreted = backend.name == "fused" and device.type != "cuda"
    compute = precision.choose(options.dtype, device, interpreted)
    if interpreted and compute.name == "bf16":
        raise UserError("Triton's interpreter computes bf16 wrongly; use --dtype fp32 or fp16, or a GPU")
    graph = choose_graph(options.graph, device)
    set_determinism(options.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    return Setting(device, backend, compute, graph, options.deterministic, environment.describe(device))


def describe_stem(recipe: Recipe, backend: str) -> str:
    network = recipe.network
    size = f"{network.whiten_kernel}x{network.whiten_kernel}"
    if network.whiten_kernel is None:
        stem = "stem without whitening"
    elif not network.fused_stem:
        stem = f"{size} 'same' stem as plain convolution"
    else:
        stem = f"{size} unpadded stem {'fused' if backend == 'fused' else 'in PyTorch'}"
    return f"{stem}, SE {'off' if network.se_reduction is None else f'/{network.se_reduction}'}"


def count_flops(recipe: Recipe, budget: Budget, dataset: Dataset) -> dict:
    """FLOPs of a run by what they are spent on, and their total, ready for JSON."""
    from blink.training.flops import run_flops

    sizes = (len(dataset.train_images), len(dataset.test_images))
    flops = run_flops(recipe, budget, dataset.image_shape, len(dataset.classes), *sizes)
    return asdict(flops) | {"total": flops.total}


def describe(setting: Setting, recipe: Recipe, dataset: Dataset, budget: Budget) -> dict:
    """What a result must name besides its command and its seed, ready for JSON."""
    return {
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "generated": dataset.generated,
            "train": len(dataset.train_images),
            "test": len(dataset.test_images),
            "image_shape": dataset.image_shape,
            "classes": len(dataset.classes),
        },
        "recipe": asdict(recipe),
        "kernels": {
            "name": setting.backend.name,
            "interpreted": setting.interpreted,
            "stem": describe_stem(recipe, setting.backend.name),
        },
        "dtype": setting.compute.name,
        "graph": setting.graph,
        "deterministic": setting.deterministic,
        "budget": asdict(budget),
        "environment": setting.environment,
    }


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here; expected cpu, cuda or cuda:N of a GPU here") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; expected cpu or cuda")
    if device.type == "cuda" and device.index is not None:
        # streams, events and graphs are the current device's
        torch.cuda.set_device(device)
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
    """Make it and see that files can be made in it, before hours are spent on what goes there. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make the folder {path} ({error.strerror}); name another") from error
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to {path} ({error.strerror}); name another folder") from error


def check_output(path: Path, append: bool = False) -> None:
    """See that a file can be written, or added to, before hours are spent on what goes there. Raises UserError."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        if path.exists() and not path.is_file():
            # a pipe or a device takes what it gets when it gets it
            return
        if append and path.exists():
            with open(path, "ab"):
                return
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); name another file") from error
    make_folder(path.resolve().parent)
