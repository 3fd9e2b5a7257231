"""The compiled libraries of this package: each C++ file compiled on this machine, for this processor, when first used.

A library is kept below the cache folder under a name made from all that it is compiled from: another source, compiler
or processor has another one. It is written whole or not at all, so that processes that start together may all make it.
Where it cannot be made, `load` says so once and its callers do without.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

import torch
from torch.profiler import record_function

from blink.files import cache_folder, remove_leftovers, replacing

from ..dispatch import say_once
from ..environment import cpu_flags

# how a profile names what runs here, which is no operator of PyTorch's
KERNEL = "native:"

_SOURCES = Path(__file__).parent
# errno and floating-point exceptions are read by nobody; infinities, NaN and the order of sums stay as they are written
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 120
_FAILURES = (OSError, AttributeError, subprocess.SubprocessError, RuntimeError)

_POINTER, _SIZE, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_LETTERS = {"p": _POINTER, "l": _SIZE, "d": _NUMBER, "i": _COUNT}
# of every function its arguments, in order: p a tensor or None, l an integer, d a float, i an integer of 32 bits
_FUNCTIONS = {
    "batch_norm": {
        "norm_act_forward": "pppppppppppp" + "lll" + "ddi",
        "pool_norm_act_forward": "pppppppppppp" + "p" + "llll" + "ddi",
        "norm_act_backward": "ppppppppppppp" + "llll" + "idi",
    },
    "matrix_units": {
        "matrix_units_permitted": "p",
        "matrix_units_filter_gradient": "ppp" + "lllll" + "i",
    },
    "optimizers": {
        "sgd_step": "pppppl" + "ddii",
        "muon_momentum": "ppppl" + "dddii",
        "muon_update": "ppl" + "dddi",
    },
    "stem": {
        "whiten_forward": "pppppppp" + "ppp" + "lllllll" + "i",
        "whiten_backward": "ppppppppp" + "ppp" + "lllllll" + "i",
        "whiten_norm_act_forward": "pppppppp" + "ppppppppp" + "lllllll" + "ddi",
        "whiten_norm_act_backward": "ppppppppp" + "ppppp" + "lllllll" + "idi",
    },
    "winograd": {
        "winograd_convolve": "ppp" + "lllll" + "i",
        "winograd_filter_gradient": "ppp" + "lllll" + "i",
    },
}

# the files that an activation is compiled into, and those of convolutions, made when a shape first comes
_ACTIVATED = {"batch_norm", "stem"}
_LATE = {"matrix_units", "winograd"}


class Library:
    """The functions of one file as attributes, which take tensors as they are and None for a null pointer."""

    def __init__(self, path: Path, functions: dict[str, str]):
        loaded = ctypes.CDLL(str(path))
        for name, letters in functions.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = [_LETTERS[letter] for letter in letters], None
            setattr(self, name, _with_tensors(name, function))


def _with_tensors(name: str, function: Callable) -> Callable:
    def call(*arguments) -> None:
        with record_function(KERNEL + name):
            function(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))

    return call


@cache
def load(name: str, activation: str | None = None, dtype: torch.dtype = torch.float32) -> Library | None:
    """The library of `name`.cpp for this activation and these values, or None where there is none, which is said once.

    dtype: float32 or bfloat16.
    """
    try:
        (path,) = _made([(name, activation, dtype)])
        return Library(path, _FUNCTIONS[name])
    except _FAILURES as error:
        said = str(error).strip().splitlines()
        say_once(f"no compiled kernels, plain PyTorch runs in their place: {said[0] if said else type(error).__name__}")
        return None


def compile_all(activation: str | None) -> bool:
    """Make the libraries of all ops, for this activation where one has it, side by side; False, which is said, if that
    fails. The convolution's, which take as long as all of them, are made when a shape first comes to try them for.
    """
    activations = {name: activation if name in _ACTIVATED else None for name in _FUNCTIONS if name not in _LATE}
    kinds = [(name, act, dtype) for name, act in activations.items() for dtype in (torch.float32, torch.bfloat16)]
    # what fails here fails in `load` again, and is said there
    with suppress(*_FAILURES):
        _made(kinds)
    return all(load(*kind) is not None for kind in kinds)


def digest_of_sources() -> str:
    """Of all files of this package that a compiled op comes from."""
    files = sorted(f for f in _SOURCES.iterdir() if f.suffix in (".cpp", ".hpp", ".py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _compiler() -> tuple[str, str]:
    """($CXX, else g++ or clang++; its version). Raises RuntimeError where there is none."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++"])), None)
    if found is None:
        raise RuntimeError(f"no C++ compiler ({named or 'g++, clang++'}); install g++ or set CXX")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    return found, version.stdout


def _made(kinds: list[tuple[str, str | None, torch.dtype]]) -> list[Path]:
    """The paths of these libraries; those that are not there are compiled, at the same time. Raises RuntimeError."""
    paths, running = [], []
    # processes, not threads of this one: a start in little memory has no room for their stacks
    with ExitStack() as opened:
        for kind in kinds:
            path, command = _build(*kind)
            paths.append(path)
            if not path.is_file():
                remove_leftovers(path.parent)
                temporary = opened.enter_context(replacing(path))
                pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                running.append(subprocess.Popen([*command, "-o", str(temporary)], **pipes))
                # before the file goes: one that failed leaves none behind that writes
                opened.callback(running[-1].kill)
        for process in running:
            _, said = process.communicate(timeout=_SECONDS)
            if process.returncode:
                lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
                reason = lines[0] if lines else f"exit code {process.returncode}"
                raise RuntimeError(f"{process.args[0]} failed: {reason}")
    return paths


def _build(name: str, activation: str | None, dtype: torch.dtype) -> tuple[Path, list[str]]:
    """Where a library is kept, and the command that makes it, but for where to."""
    compiler, version = _compiler()
    kind = {torch.float32: "float", torch.bfloat16: "BFloat16"}[dtype]
    # the struct of activations.hpp
    activation = (activation or "identity").title()
    flags = [*_FLAGS, f"-DACTIVATION={activation}", f"-DDTYPE={kind}"]
    if "avx512f" in cpu_flags():
        flags.append("-mprefer-vector-width=512")
    source = _SOURCES / f"{name}.cpp"
    digest = hashlib.sha256("\0".join([compiler, version, *flags, platform.machine(), *sorted(cpu_flags())]).encode())
    for file in (*sorted(_SOURCES.glob("*.hpp")), source):
        digest.update(file.read_bytes())
    path = folder() / f"{name}-{activation.lower()}-{kind.lower()}-{digest.hexdigest()[:24]}.so"
    return path, [compiler, *flags, str(source)]


def folder() -> Path:
    """Below the cache folder, else, for a user without one or who cannot write there, of this process alone."""
    if (kept := cache_folder()) is not None:
        folder = kept / "native"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            return Path(_own().name)
    return Path(_own().name)


@cache
def _own() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="blink-native-")
