"""The Muon update of convolution filters or matrices: momentum, orthogonalization and the weights, a dozen launches.

    buf = momentum * buf + grad      g = grad + momentum * buf      U = newton_schulz(g as [O, everything else])
    p = p * sqrt(O) / |p|_F          p = p * (1 - lr * weight_decay) - lr * factor(shape) * U

The first pass updates the momentum and hands on g and the sums of squares of g and p; the last product of the iteration
updates the weights where it forms U. Sources: Muon, Jordan et al. 2024, in the form of airbench94_muon; options for
that of torch.optim.Muon; the factors "match_rms_adamw", Liu et al. 2025, and "spectral_unclamped", Bernstein 2025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _options
from ._gram_iteration import Batch
from ._multi_tensor import (
    FloatList,
    IntList,
    TensorList,
    check_separate,
    check_updates,
    groups,
    kind,
    layout_of,
    rates_at,
    update_arguments,
)
from .launching import opaque_op
from .newton_schulz import check_iteration, iteration_flops
from .registry import Arguments, Cost, op


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    return param.shape[0], param.numel() // param.shape[0]


@opaque_op("muon", mutates=("params", "momentum_buffers"))
def _step(
    params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    lr: Tensor,
    positions: IntList,
    momentum: float,
    weight_decay: float,
    renormalize: bool,
    steps: int,
    coefficients: FloatList,
    eps: float,
    dtype: torch.dtype,
    nesterov: bool,
    averaged: bool,
    shape_factor: str | None,
) -> None:
    check_separate("muon", positions, params, grads, momentum_buffers, lr)
    entries = list(zip(params, grads, momentum_buffers))
    for indices in groups([(*kind(*e), e[0].shape[0] ** 2 > e[0].numel()) for e in entries]):
        p, g, buffer = (tuple(values[i] for i in indices) for values in (params, grads, momentum_buffers))
        batch = Batch([_matrix_shape(t) for t in p], lr.device, eps, dtype)
        batch.gather(g, buffer, p if renormalize else None, momentum, NESTEROV=nesterov, AVERAGED=averaged)
        q = batch.iterate(steps, coefficients)
        batch.update(p, q, lr, rates_at(lr, positions, indices), weight_decay, renormalize, shape_factor)


@_step.register_fake
def _(params, grads, momentum_buffers, lr, positions, *options):
    return None


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    params = arguments["params"]
    # read weight, gradient and momentum, write momentum and X; read X for R; read X and weight, write weight
    moved = 9 * sum(p.bytes(itemsize) for p in params)
    return {"fwd": Cost(moved, iteration_flops([p.shape for p in params], options["steps"]))}


@op(
    arguments=update_arguments,
    cost=_cost,
    updates=("params", "momentum_buffers"),
    options={"momentum": 0.6},
    small=[dict(shapes=[(12, 3, 3, 3), (7, 5)])],
)
def muon(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    renormalize: bool = True,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
    nesterov: bool = True,
    averaged: bool = False,
    shape_factor: str | None = None,
) -> None:
    """One Muon step on a list of weights, in place.

    params: [O, ...] of two dimensions or more, float32, float16 or bfloat16, in any dense memory whose slowest
    dimension is O (contiguous and channels_last both are). Each is one matrix [O, everything else] with columns in the
    order of memory: the orthogonalization commutes with permutations of columns. They may require gradients: the step
    is not recorded.
    grads: of params' shapes, each in its parameter's dtype or float32; one in another layout is copied into its
    parameter's first. Where one is None, parameter and momentum stay as they are.
    momentum_buffers: of params' shapes and layouts, each in its parameter's dtype or float32; zeros before the first
    step.
    lr: float32 on the parameters' device, one element or [len(params)], one for each; read by the kernels, so that a
    captured CUDA graph follows it.
    momentum, weight_decay: 0 or more, the decay decoupled. renormalize: first bring each weight to the Frobenius norm
    sqrt(O); zeros stay zeros.
    steps, coefficients, eps, dtype: see `newton_schulz`.
    nesterov: False: g = buf. averaged: buf is the gradients' moving average, that is (1 - momentum) * grad takes the
    place of grad. shape_factor: what multiplies lr for a matrix [O, K], not the decay: "original", sqrt(max(1, O / K));
    "match_rms_adamw", 0.2 sqrt(max(O, K)); "spectral_unclamped", sqrt(O / K); None, 1.
    Computes buf = momentum * buf + grad, g = grad + momentum * buf, U = newton_schulz(g),
    p = p * sqrt(O) / |p|_F * (1 - lr * weight_decay) - lr * factor * U. Arithmetic is float32 but for the products with
    g; buf, where it goes on into g, and U are not rounded. Deterministic. Not differentiable.

    Raises ValueError for lists of different lengths or none, a wrong shape or layout, impossible options, or parameters
    and momenta that share memory with each other, a gradient or lr; TypeError for a wrong type or dtype; RuntimeError
    where the kernels cannot run.
    """
    op = "muon"
    *tensors, positions = check_updates(op, params, grads, momentum_buffers, lr, momentum, weight_decay)
    for i, param in enumerate(params):
        if param.dim() < 2:
            raise ValueError(f"{op}: params[{i}] must be [O, ...] of at least 2 dimensions, found {list(param.shape)}")
        if layout_of(param)[0] not in (0, param.numel() // param.shape[0]):
            raise ValueError(
                f"{op}: params[{i}] must have its first dimension slowest in memory, found strides "
                f"{list(param.stride())}"
            )
    check_iteration(op, steps, coefficients, eps, dtype, lr.device)
    _options.shape_factor(op, shape_factor)
    if positions:
        coefficients = [float(c) for c in coefficients]
        options = (float(momentum), float(weight_decay), renormalize, steps, coefficients, float(eps), dtype)
        with torch.no_grad():
            _step(*tensors, positions, *options, nesterov, averaged, shape_factor)
