"""On what and how a command trains, whatever the recipe: device, kernels, dtype, graph, determinism."""

import argparse
import os
from dataclasses import dataclass

import torch

from blink.errors import UserError
from blink.kernels import environment
from blink.model import backend as backends
from blink.training import precision
from blink.training.allocator import keep_freed_memory

# cuBLAS needs this before it starts to be repeatable under --deterministic, and it costs nothing measurable
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Setting:
    """graph: whether each step is a CUDA graph; environment: the machine and its software, ready for JSON;
    interpreted: whether Triton interprets the kernels.
    """

    device: torch.device
    backend: backends.Backend
    compute: precision.Precision
    graph: bool
    deterministic: bool
    environment: dict
    interpreted: bool


def choose_setting(options: argparse.Namespace) -> Setting:
    """What `add_setting_arguments` was given, made effective in this process. Raises UserError for what cannot be."""
    device = choose_device(options.device)
    try:
        backend = backends.select(options.kernels, device, options.deterministic)
    except ValueError as error:
        raise UserError(f"--kernels {options.kernels}: {error}") from error
    interpreted = backend.name == "fused" and device.type != "cuda"
    compute = precision.choose(options.dtype, device, interpreted)
    if interpreted and compute.name == "bf16":
        raise UserError("Triton's interpreter computes bf16 wrongly; use --dtype fp32 or fp16, or a GPU")
    if options.graph == "on" and device.type != "cuda":
        raise UserError(f"--graph on needs a GPU, and the device is {device.type}; leave it out, or use --graph off")
    graph = options.graph != "off" and device.type == "cuda"
    # cuDNN picks its fastest algorithm by trying, unless runs must be bitwise repeatable
    torch.backends.cudnn.deterministic = options.deterministic
    torch.backends.cudnn.benchmark = not options.deterministic
    if device.type == "cpu":
        keep_freed_memory()
    facts = environment.describe(device)
    return Setting(device, backend, compute, graph, options.deterministic, facts, interpreted)


def choose_device(name: str | None) -> torch.device:
    """A device that tensors can be made on, the current one from now on. Raises UserError."""
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
