"""What is raced: the fused ops, eager PyTorch, torch.compile and what torchvision and torch.optim offer for the same,
each admitted only if its results are right.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blink import kernels
from blink.command import python_path

from ... import reference
from ...environment import has_cxx_compiler
from ...squeeze_excitation import SqueezeExcite
from ..cases import Case, Tensors, mapped, named

# largest error against float64, relative to the result's scale: a few roundings in float32; for 16 bits the error of
# eager PyTorch, which rounds every intermediate, with room to spare. A wrong formula misses these by far.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Bound(NamedTuple):
    """A call that is ready to be made again and again, and the leaves that its gradients are taken for, in the order of
    the case's differentiable arguments.
    """

    call: Callable[[], object]
    leaves: list[Tensor]


# makes a case's tensors a call in the dtype of the activations; buffers that the op updates are updated in place
Bind = Callable[[Case, Tensors, torch.dtype], Bound]


class Provider(NamedTuple):
    """load: Bind for a case in a dtype; raises RuntimeError, with the reason, where it cannot run. ops: what it has."""

    load: Callable[[Case, torch.dtype], Bind]
    ops: tuple[str, ...] = reference.OPS


@dataclass(frozen=True)
class Verdict:
    """The largest relative error of any result, which result it is, and whether it is within tolerance."""

    error: float
    where: str
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


def functions(ops) -> Bind:
    """Calls of the op that is an attribute of `ops`."""

    def bind(case: Case, tensors: Tensors, dtype: torch.dtype) -> Bound:
        return Bound(lambda: case.call(ops, tensors, dtype), [tensors[name] for name in case.differentiable])

    return bind


def _fused(case: Case, dtype: torch.dtype) -> Bind:
    if not kernels.HAS_TRITON:
        raise RuntimeError("triton is not installed")
    from blink.kernels import fused

    return functions(fused)


def _eager(case: Case, dtype: torch.dtype) -> Bind:
    return functions(reference)


def _compile(case: Case, dtype: torch.dtype) -> Bind:
    if not torch.cuda.is_available() and not has_cxx_compiler():
        raise RuntimeError("torch.compile needs a C++ compiler here, and there is none")
    torch._dynamo.reset()
    # by default a compiled backward pass destroys its saved tensors, and could be timed once only
    torch._functorch.config.donated_buffer = False
    op = getattr(reference, case.op)

    def call(**arguments) -> Tensor:
        return op(**arguments)

    return functions(SimpleNamespace(**{case.op: torch.compile(call, fullgraph=True, dynamic=False)}))


def _torchvision(case: Case, dtype: torch.dtype) -> Bind:
    """torchvision's block, its parameters in the memory of the case's weights."""
    try:
        from torchvision.ops import SqueezeExcitation
    except ImportError as error:
        raise RuntimeError("torchvision is not installed") from error

    def bind(case: Case, tensors: Tensors, dtype: torch.dtype) -> Bound:
        x, *weights = (tensors[name] for name in case.differentiable)
        sizes = weights[0].shape[1], weights[0].shape[0]
        layers = SqueezeExcite(*sizes, *(case.all_options[name] for name in ("activation", "gate_activation")))
        block = SqueezeExcitation(*sizes, lambda: layers.activation, lambda: layers.scale_activation)
        own = iter(weights)
        for layer in (block.fc1, block.fc2):
            layer.weight = nn.Parameter(next(own).detach().reshape(layer.weight.shape))
            layer.bias = nn.Parameter(next(own).detach())
        return Bound(lambda: block(x), [x, *block.parameters()])

    return bind


def _optimizer(make: Callable[[list[dict], dict], torch.optim.Optimizer], view: Callable = Tensor.detach) -> Bind:
    """Steps of an optimizer with a group for each learning rate, whose parameters, gradients and momenta are `view`s of
    the case's. make: of groups and of all options of the call.
    """

    def bind(case: Case, tensors: Tensors, dtype: torch.dtype) -> Bound:
        params = [nn.Parameter(view(p)) for p in tensors["params"]]
        groups: dict[float, list[nn.Parameter]] = {}
        for p, grad, lr in zip(params, tensors["grads"], tensors["lr"].expand(len(params)).tolist()):
            p.grad = view(grad)
            groups.setdefault(lr, []).append(p)
        optimizer = make([{"params": own, "lr": lr} for lr, own in groups.items()], case.all_options)
        for p, buffer in zip(params, tensors["momentum_buffers"]):
            optimizer.state[p]["momentum_buffer"] = view(buffer)
        return Bound(optimizer.step, [])

    return bind


def _sgd(case: Case, dtype: torch.dtype, **variant: bool) -> Bind:
    def make(groups: list[dict], options: dict) -> torch.optim.Optimizer:
        own = {name: options[name] for name in ("momentum", "weight_decay", "nesterov")}
        return torch.optim.SGD(groups, **own, **variant)

    return _optimizer(make)


def _matrix(value: Tensor) -> Tensor:
    """[O, everything else] in the order of memory, in which the op takes filters too."""
    rows, columns = value.shape[0], value.numel() // value.shape[0]
    return value.detach().as_strided((rows, columns), (columns, 1))


def _muon(case: Case, dtype: torch.dtype) -> Bind:
    """torch.optim.Muon takes matrices only, and gets filters as such."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.optim.Muon")
    options = case.all_options
    if not options["averaged"] or options["renormalize"] or options["shape_factor"] is None:
        raise RuntimeError("it averages gradients, scales by shape, never renormalizes")
    if dtype == torch.float32:
        raise RuntimeError("it multiplies in bfloat16, too coarse for a float32 row")

    def make(groups: list[dict], options: dict) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            groups,
            **{name: options[name] for name in ("momentum", "weight_decay", "nesterov", "eps")},
            ns_steps=options["steps"],
            ns_coefficients=options["coefficients"],
            adjust_lr_fn=options["shape_factor"],
        )

    return _optimizer(make, _matrix)


PROVIDERS = {
    "fused": Provider(_fused),
    "eager": Provider(_eager),
    "compile": Provider(_compile),
    "torchvision": Provider(_torchvision, ("squeeze_excite",)),
    "optim-foreach": Provider(partial(_sgd, foreach=True), ("sgd_nesterov",)),
    "optim-fused": Provider(partial(_sgd, fused=True), ("sgd_nesterov",)),
    "optim-muon": Provider(_muon, ("muon",)),
}


def load(name: str, case: Case, dtype: torch.dtype) -> Bind:
    """Raises RuntimeError, with the reason, where a provider cannot run."""
    return PROVIDERS[name].load(case, dtype)


def fresh(case: Case, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """A copy whose differentiable arguments require gradients; floating ones in `dtype` if one is given."""

    def copied(value: Tensor) -> Tensor:
        copy = value.detach().clone()
        return copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy

    out = {name: mapped(copied, value) for name, value in tensors.items()}
    for name in case.differentiable:
        out[name].requires_grad_()
    return out


def results(case: Case, bind: Bind, tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the updated buffers and every gradient, for a fixed random upstream one."""
    call, leaves = bind(case, tensors, dtype)
    y = case.combine(call(), tensors)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, leaves, upstream) if leaves else ()
    out = {"y": y.detach()}
    for name in case.buffers:
        out |= named(name, tensors[name])
    # of a module's parameters, which have shapes of their own
    return out | {f"d{name}": grad.reshape_as(tensors[name]) for name, grad in zip(case.differentiable, grads)}


def judge(case: Case, bind: Bind, tensors: Tensors, dtype: torch.dtype, truth: dict[str, Tensor]) -> Verdict:
    """Compare every result with the float64 truth; a NaN, a missing result or a wrong shape is an infinite error."""
    worst, where = 0.0, "y"
    got = results(case, bind, fresh(case, tensors), dtype)
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
    return results(case, functions(reference), fresh(case, tensors, torch.float64), torch.float64)


def first_call_seconds(case: Case, bind: Bind, tensors: Tensors, dtype: torch.dtype) -> float:
    """Wall time of the first forward and backward, which is mostly compilation."""
    begin = time.perf_counter()
    results(case, bind, fresh(case, tensors), dtype)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def calls_of(case: Case, bind: Bind, sets: list[Tensors], dtype: torch.dtype, backward: bool):
    """One call per set of arguments: the forward pass, or the backward pass alone of a forward pass made now."""
    bounds = [bind(case, fresh(case, tensors), dtype) for tensors in sets]
    if not backward:
        return [bound.call for bound in bounds]
    calls = []
    for call, leaves in bounds:
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [y for y in outputs if y is not None and y.requires_grad]
        # randn_like keeps the memory format
        upstream = [torch.randn_like(y) for y in outputs]
        calls.append(lambda ys=outputs, ls=leaves, gs=upstream: torch.autograd.grad(ys, ls, gs, retain_graph=True))
    return calls


def reexecute_interpreted(command: str, arguments: list[str]) -> None:
    """Off a GPU the fused ops are checked in the interpreter, which must be chosen before they are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTHONPATH"] = python_path()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "blink", command, *arguments])
