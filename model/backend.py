"""The one place that decides which implementation of the ops a network runs on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CHOICES = ("auto", "fused", "reference")


@dataclass(frozen=True)
class Backend:
    """The ops a network is built from. Both backends share parameters, so a checkpoint fits either."""

    name: str
    whiten_project_norm_act: Callable
    pool_norm_act: Callable
    se_gate: Callable
    excite_norm_act_add: Callable


def _collect(name: str, ops) -> Backend:
    return Backend(name, ops.whiten_project_norm_act, ops.pool_norm_act, ops.se_gate, ops.excite_norm_act_add)


def reference() -> Backend:
    """Plain PyTorch; runs anywhere."""
    from kernels import reference as ops

    return _collect("reference", ops)


def fused() -> Backend:
    """The hand-written Triton kernels; needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)."""
    import kernels as ops

    return _collect("fused", ops)


def select(choice: str, device: torch.device) -> Backend:
    """`auto` is fused on a GPU and reference elsewhere.

    Raises ValueError for an unknown choice, and for `fused` where the kernels can neither run nor be interpreted.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown kernels {choice!r}; expected one of {', '.join(CHOICES)}")
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):
        return reference()
    import kernels

    if not kernels.HAS_TRITON:
        raise ValueError("the fused kernels need triton, which is not installed; use --kernels reference")
    if device.type != "cuda" and not kernels.interpreting():
        raise ValueError(
            f"the fused kernels need a GPU, and the device is {device.type}; use --kernels reference, "
            "or set TRITON_INTERPRET=1 to interpret them on the CPU (slow; for checks)"
        )
    return fused()
