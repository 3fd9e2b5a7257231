"""How an op is judged: forward, every gradient and every updated buffer against the float64 reference.

The largest error must be within the stated tolerance, and the root mean square error within twice that of PyTorch's
own ops in the same dtype (or half a unit in the last place, whichever is larger; root mean squares, because the ratio
of two largest errors is mostly luck). Errors are relative to the largest magnitude of the true result.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blink.kernels import HAS_TRITON, reference
from blink.kernels.examine.cases import Case, Tensors, mapped, named

# tests of what must work without triton take the device from here
if HAS_TRITON:
    from blink.kernels import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter computes bfloat16 wrongly, so bfloat16 is judged on a GPU only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


@dataclass(frozen=True)
class Tolerance:
    """Largest error relative to the result's scale, of the forward pass and buffers and of the gradients."""

    forward: float
    backward: float

    def loosened(self, factor: float) -> "Tolerance":
        """For drawn shapes: with few values the result can be smaller than what it was summed from."""
        return Tolerance(self.forward * factor, self.backward * factor)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(case: Case, ops, tensors: dict, dtype: torch.dtype, upstream: Tensor) -> dict[str, Tensor]:
    """y, the buffers, and d<name> for every differentiable argument, after one forward and backward."""
    own = {}
    for name, value in tensors.items():
        if value is None:
            own[name] = None
            continue
        copy = value.detach().clone()
        own[name] = copy.requires_grad_() if name in case.differentiable else copy
    y = case.combined(ops, own, dtype)
    y.backward(upstream.to(y.dtype))
    results = {"y": y.detach()}
    results |= {name: own[name] for name in case.buffers if own[name] is not None}
    return results | {f"d{name}": own[name].grad for name in case.differentiable}


def captured(call: Callable[[], dict[str, Tensor]]) -> tuple["torch.cuda.CUDAGraph", dict[str, Tensor]]:
    """A CUDA graph of `call()` and its results, which every replay overwrites.

    Warmed up and captured on one stream: a backward pass runs where its forward pass did, and so does a leaf's part of
    it for as long as anything of an autograd graph through this leaf is alive. No such graph may be, made elsewhere.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, {name: value.detach() for name, value in results.items()}


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def in_float64(tensors: Tensors) -> Tensors:
    return {k: mapped(lambda t: t.double() if t.is_floating_point() else t, v) for k, v in tensors.items()}


def copies(tensors: Tensors) -> Tensors:
    return {k: mapped(lambda t: t.detach().clone(), v) for k, v in tensors.items()}


def updated(case: Case, ops, tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results y[i] and the updated buffers of an op on lists, which is not differentiable."""
    own = copies(tensors)
    results = named("y", case.call(ops, own, dtype))
    for name in case.buffers:
        results |= named(name, own[name])
    return results


def judge_lists(
    case: Case, tensors: Tensors, dtype: torch.dtype, tolerance: float, times_pytorch: float | None = 1.0, ops=None
) -> None:
    """Every result of an op on lists, of `ops`, by default fused, against float64: the largest error within tolerance,
    relative to the result's scale, and the root mean square error within times_pytorch of the reference's in `dtype`,
    or half a unit in the result's last place."""
    truth = updated(case, reference, in_float64(tensors), torch.float64)
    results = updated(case, ops or fused, tensors, dtype)
    pytorch = updated(case, reference, tensors, dtype)
    assert set(results) == set(truth)
    for name, want in truth.items():
        got = results[name]
        assert got.shape == want.shape and got.dtype == pytorch[name].dtype, f"{case.op} {case.label}: {name}"
        scale = max(want.abs().max().item(), 1e-30)
        error = (got.double() - want).abs().max().item() / scale
        what = f"{case.op} {case.label} {name_of(dtype)}: {name} is off by {error:.2e}"
        # written so that a NaN fails
        assert error <= tolerance, f"{what}, tolerance {tolerance:.2e}"
        if times_pytorch is not None and want.numel() >= 8:
            ours, theirs = (rms(value.double() - want) / scale for value in (got, pytorch[name]))
            bar = max(times_pytorch * theirs, torch.finfo(got.dtype).eps / 2)
            assert ours <= bar, f"{what}; its rms error is {ours:.2e}, PyTorch's {theirs:.2e}"


def judge(case: Case, dtype: torch.dtype, tolerance: Tolerance, versus_pytorch: bool = True, ops=None) -> None:
    """Run `ops`, by default fused, reference in the same dtype, and reference in float64 on the same data; compare.

    versus_pytorch=False leaves the comparison with PyTorch's error out: for drawn shapes, where either error may be
    that of a few values and their ratio luck.
    """
    torch.manual_seed(0)
    judge_on(case, case.make(DEVICE, dtype), dtype, tolerance, versus_pytorch, ops)


def judge_on(
    case: Case, tensors: dict, dtype: torch.dtype, tolerance: Tolerance, versus_pytorch: bool = True, ops=None
) -> None:
    exact = in_float64(tensors)
    # a copy, because the call moves the running statistics
    shape = case.combined(reference, in_float64(tensors), torch.float64).shape
    upstream = torch.randn(shape, device=DEVICE).to(dtype)
    truth = run(case, reference, exact, torch.float64, upstream)
    results = run(case, ops or fused, tensors, dtype, upstream)
    pytorch = run(case, reference, tensors, dtype, upstream) if versus_pytorch else {}
    assert set(results) == set(truth)
    for name, want in truth.items():
        got = results[name]
        assert got is not None, f"{case.op} {case.label}: {name} is missing"
        assert got.shape == want.shape, f"{case.op} {case.label}: {name} is {got.shape}, expected {want.shape}"
        scale = max(want.abs().max().item(), 1e-30)
        error = (got.double() - want).abs().max().item() / scale
        limit = tolerance.forward if name == "y" or name in case.buffers else tolerance.backward
        what = f"{case.op} {case.label} {name_of(dtype)}: {name} is off by {error:.2e}"
        # written so that a NaN fails
        assert error <= limit, f"{what}, tolerance {limit:.2e}"
        if versus_pytorch and want.numel() >= 8:
            ours, theirs = (rms(value.double() - want) / scale for value in (got, pytorch[name]))
            bar = max(2 * theirs, torch.finfo(got.dtype).eps / 2)
            assert ours <= bar, f"{what}; its rms error is {ours:.2e}, PyTorch's {theirs:.2e}"


def directional_derivative_matches(case: Case, step: float = 1e-2, tolerance: float = 5e-3) -> None:
    """The float32 gradient along a random direction against a central difference of the fused forward itself."""
    tensors = case.make(DEVICE, torch.float32)
    directions = {name: torch.randn_like(tensors[name]) for name in case.differentiable}
    shape = case.combined(fused, dict(tensors), torch.float32)
    upstream = torch.randn_like(shape)
    grads = run(case, fused, tensors, torch.float32, upstream)
    slope = sum((grads[f"d{name}"] * direction).double().sum() for name, direction in directions.items())

    def value(sign: float) -> Tensor:
        moved = {k: v + sign * step * directions[k] if k in directions else v for k, v in tensors.items()}
        return (case.combined(fused, moved, torch.float32).double() * upstream.double()).sum()

    difference = (value(1) - value(-1)) / (2 * step)
    scale = sum((grads[f"d{n}"].double().abs() * d.double().abs()).sum() for n, d in directions.items())
    assert abs((slope - difference).item()) <= tolerance * scale.item()
