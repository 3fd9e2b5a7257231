"""How kernels of this package are launched, and how torch.compile sees them.

Every launch goes through `launch`, so that the same launchers can also run "dry": inside `captured_launches` nothing
runs and each launch is recorded with its arguments, which is what the ahead-of-time compiler works from.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

# the package's own name, so that `kernels` and `blink_kernels` in one process do not overwrite each other
NAMESPACE = __name__.split(".")[0]

_recording: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its runtime arguments in order, its constexprs, its warps."""

    kernel: triton.JITFunction
    arguments: tuple
    constexprs: dict
    num_warps: int


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """Record launches instead of running them; outputs are left as allocated."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def capturing() -> bool:
    return _recording is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which was decided when this package was imported."""
    return _INTERPRETED


_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = 4, **constexprs) -> None:
    """Run `kernel` over `grid`. Tensor arguments, alone or in tuples, are dense and on one device."""
    if _recording is not None:
        _recording.append(Launch(kernel, arguments, constexprs, num_warps))
        return
    flat = (b for a in arguments for b in (a if isinstance(a, tuple) else (a,)))
    device = next(a.device for a in flat if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constexprs)
        return
    # fusing a multiply and an add rounds once instead of twice; stated, because Triton's default is changing
    kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constexprs)


def opaque_op(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    """Register a launcher as the operator `<package>::<name>`; its shape rule is added with `.register_fake`."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates)
