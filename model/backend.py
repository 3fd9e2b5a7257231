"""The one place that decides which implementation of the ops a network and its training run on."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from blink import kernels
from blink.kernels.environment import has_c_compiler, has_cxx_compiler
from blink.model import convolution, native_convolution
from blink.model.config import CHOICES


@dataclass(frozen=True)
class Backend:
    """The ops a training is built from. All backends share parameters, so a checkpoint fits each.

    compile: whether the forward pass and loss go through torch.compile as a whole; cpu_iteration: what Muon's iteration
    multiplies in on a CPU.
    """

    name: str
    conv3x3: Callable
    whiten: Callable
    whiten_project_norm_act: Callable
    pool_norm_act: Callable
    se_gate: Callable
    excite_norm_act_add: Callable
    cross_entropy: Callable
    sgd_nesterov: Callable
    muon: Callable
    compile: bool = False
    cpu_iteration: torch.dtype = torch.float32


_OPS = tuple(f.name for f in fields(Backend) if f.type is Callable and f.name != "conv3x3")


def _collect(name: str, ops, conv3x3: Callable = convolution.conv3x3, **options) -> Backend:
    return Backend(name, conv3x3, **{op: getattr(ops, op) for op in _OPS}, **options)


def reference() -> Backend:
    """Plain PyTorch; runs anywhere."""
    return _collect("reference", kernels.reference)


def native(trusted: bool = False) -> Backend:
    """The kernels that this machine's C++ compiler makes for its processor; for a CPU.

    Without `trusted` an op is taken only if it was found right, and no slower than the reference, on this machine. Muon
    iterates in bfloat16, as its authors do, where that is faster.
    """
    from blink.kernels import native as ops
    from blink.kernels.native import trial

    iteration = torch.bfloat16 if convolution.fast_bf16() else torch.float32
    if trusted:
        return _collect("native", ops, native_convolution.conv3x3, cpu_iteration=iteration)
    return _collect("native", trial.passed(_OPS), native_convolution.conv3x3, cpu_iteration=iteration)


def compiled() -> Backend:
    """The reference under torch.compile: what a user would otherwise pick."""
    return _collect("compiled", kernels.reference, convolution.plain_conv3x3, compile=True)


def eager() -> Backend:
    """Plain PyTorch with its own convolution too: what a CPU's step is raced against, and what is exported."""
    return _collect("eager", kernels.reference, convolution.plain_conv3x3)


def fused() -> Backend:
    """The hand-written Triton kernels; needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)."""
    from blink.kernels import fused as ops

    return _collect("fused", ops)


def select(choice: str, device: torch.device, repeatable: bool = False) -> Backend:
    """`auto` is fused on a GPU and, of each op, the faster of native and reference on a CPU;
    if runs must be repeatable all that are native, as a trial may end otherwise at the next start.

    Raises ValueError for an unknown choice, for `fused` where the kernels can neither run nor be interpreted, for
    `native` on a GPU, and where Triton or torch.compile lacks its compiler.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}; expected one of {', '.join(CHOICES)}")
    if choice == "reference":
        return reference()
    if choice == "native" and device.type != "cpu":
        raise ValueError(f"the native kernels are a CPU's, and the device is {device.type}; use --device cpu")
    if choice == "native" or (choice == "auto" and device.type != "cuda"):
        return native(trusted=choice == "native" or repeatable)
    if device.type == "cuda" and kernels.HAS_TRITON and not has_c_compiler():
        raise ValueError(
            "Triton needs a C compiler to launch kernels and finds none; install gcc (or set CC), "
            "or use --kernels reference"
        )
    if choice == "compiled":
        if device.type != "cuda" and not has_cxx_compiler():
            raise ValueError(
                "torch.compile needs a C++ compiler here and finds none; install g++ (or set CXX), "
                "or use --kernels reference"
            )
        if device.type == "cuda" and not kernels.HAS_TRITON:
            raise ValueError("torch.compile needs triton here, which is not installed; use --kernels reference")
        return compiled()
    if not kernels.HAS_TRITON:
        raise ValueError("the fused kernels need triton, which is not installed; use --kernels reference")
    if device.type != "cuda" and not kernels.interpreting():
        raise ValueError(
            f"the fused kernels need a GPU, and the device is {device.type}; use --kernels reference, "
            "or set TRITON_INTERPRET=1 to interpret them on the CPU (slow; for checks)"
        )
    return fused()
