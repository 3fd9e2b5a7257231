"""What is raced: the fused ops, eager PyTorch and torch.compile, each admitted only if its results are right."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import blink
from blink import kernels

from ... import reference
from ...environment import has_cxx_compiler
from ..cases import Case, Tensors, mapped, named

NAMES = ("fused", "eager", "compile")
# largest error against float64, relative to the result's scale: a few roundings in float32; for 16 bits the error of
# eager PyTorch, which rounds every intermediate, with room to spare. A wrong formula misses these by far.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verdict:
    """The largest relative error of any result, which result it is, and whether it is within tolerance."""

    error: float
    where: str
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


def load(name: str, case: Case):
    """Something with the op as an attribute. Raises RuntimeError, with the reason, where a provider cannot run."""
    if name == "eager":
        return reference
    if name == "fused":
        if not kernels.HAS_TRITON:
            raise RuntimeError("triton is not installed")
        return kernels
    if not torch.cuda.is_available() and not has_cxx_compiler():
        raise RuntimeError("torch.compile needs a C++ compiler here, and there is none")
    torch._dynamo.reset()
    # by default a compiled backward pass destroys its saved tensors, and could be timed once only
    torch._functorch.config.donated_buffer = False
    op = getattr(reference, case.op)

    def call(**arguments) -> Tensor:
        return op(**arguments)

    return SimpleNamespace(**{case.op: torch.compile(call, fullgraph=True, dynamic=False)})


def fresh(case: Case, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """A copy whose differentiable arguments require gradients; floating ones in `dtype` if one is given."""

    def copied(value: Tensor) -> Tensor:
        copy = value.detach().clone()
        return copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy

    out = {name: mapped(copied, value) for name, value in tensors.items()}
    for name in case.differentiable:
        out[name].requires_grad_()
    return out


def results(case: Case, ops, tensors: Tensors, dtype: torch.dtype, upstream: Tensor | None) -> dict[str, Tensor]:
    """y, the updated buffers and every gradient. upstream None stands for a fixed random one."""
    y = case.combined(ops, tensors, dtype)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = [tensors[name] for name in case.differentiable]
    grads = torch.autograd.grad(y, leaves, upstream.to(y.dtype)) if leaves else ()
    out = {"y": y.detach()}
    for name in case.buffers:
        out |= named(name, tensors[name])
    return out | {f"d{name}": grad for name, grad in zip(case.differentiable, grads)}


def judge(case: Case, ops, tensors: Tensors, dtype: torch.dtype, truth: dict[str, Tensor]) -> Verdict:
    """Compare every result with the float64 truth; a NaN, a missing result or a wrong shape is an infinite error."""
    worst, where = 0.0, "y"
    upstream = torch.randn(truth["y"].shape, generator=torch.Generator().manual_seed(1)).to(truth["y"].device)
    got = results(case, ops, fresh(case, tensors), dtype, upstream)
    for name, want in truth.items():
        value = got.get(name)
        if value is None or value.shape != want.shape:
            return Verdict(float("inf"), name, TOLERANCES[dtype])
        scale = max(want.abs().max().item(), 1e-30)
        error = (value.double() - want).abs().max().item() / scale
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name
    return Verdict(worst, where, TOLERANCES[dtype])


def truth_of(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """What the reference gives in float64."""
    return results(case, reference, fresh(case, tensors, torch.float64), torch.float64, None)


def first_call_seconds(case: Case, ops, tensors: Tensors, dtype: torch.dtype) -> float:
    """Wall time of the first forward and backward, which is mostly compilation."""
    begin = time.perf_counter()
    results(case, ops, fresh(case, tensors), dtype, None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def calls_of(case: Case, ops, sets: list[Tensors], dtype: torch.dtype, backward: bool):
    """One call per set of arguments: the forward pass, or the backward pass alone of a forward pass made now."""
    if not backward:
        owned = [fresh(case, tensors) for tensors in sets]
        return [lambda t=t: case.call(ops, t, dtype) for t in owned]
    calls = []
    for tensors in sets:
        own = fresh(case, tensors)
        outputs = case.call(ops, own, dtype)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if y is not None and y.requires_grad]
        # randn_like keeps the memory format
        upstream = [torch.randn_like(y) for y in outputs]
        leaves = [own[name] for name in case.differentiable]
        calls.append(lambda ys=outputs, ls=leaves, gs=upstream: torch.autograd.grad(ys, ls, gs, retain_graph=True))
    return calls


def reexecute_interpreted(command: str, arguments: list[str]) -> None:
    """Off a GPU the fused ops are checked in the interpreter, which must be chosen before they are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    # where this process found the package, installed or not
    root = str(Path(blink.__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "blink", command, *arguments])
