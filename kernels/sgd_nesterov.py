"""SGD with (Nesterov) momentum and weight decay over lists of tensors, in one pass of few launches.

    g = grad + weight_decay * p      buf = momentum * buf + g      p -= lr * (g + momentum * buf)

Every weight, gradient and momentum value is read once; weight and momentum are written once. Sources: Nesterov's
momentum as in Sutskever et al. 2013, in the form of torch.optim.SGD(nesterov=True).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._multi_tensor import (
    IntList,
    TensorList,
    check_separate,
    check_updates,
    groups,
    kind,
    owner_of,
    rates_at,
    running_sums,
    select,
    select_int,
    update_arguments,
)
from .launching import launch, opaque_op
from .registry import Arguments, Cost, op

_BLOCK = tl.constexpr(2048)


@triton.jit
def _update_kernel(
    param_ptrs, grad_ptrs, buffer_ptrs, lr_ptr, momentum, weight_decay,
    FIRST: tl.constexpr, SIZES: tl.constexpr, LR_AT: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """A program updates _BLOCK consecutive elements of one tensor; FIRST: each tensor's first program."""
    program = tl.program_id(0)
    index = owner_of(program, FIRST)
    start = (program - select_int(FIRST, index)) * _BLOCK
    left = select_int(SIZES, index) - start
    p_ptr, g_ptr, buffer_ptr = (
        select(param_ptrs, index) + start,
        select(grad_ptrs, index) + start,
        select(buffer_ptrs, index) + start,
    )
    at = tl.arange(0, _BLOCK)
    lr = tl.load(lr_ptr + select_int(LR_AT, index))
    # a mask of any length would cost the 16-byte accesses: only a tensor's last program has one
    if left >= _BLOCK:
        p = tl.load(p_ptr + at).to(tl.float32)
        g = tl.load(g_ptr + at).to(tl.float32) + weight_decay * p
        buffer = momentum * tl.load(buffer_ptr + at).to(tl.float32) + g
        ahead = g + momentum * buffer if NESTEROV else buffer
        tl.store(p_ptr + at, (p - lr * ahead).to(p_ptr.dtype.element_ty))
        tl.store(buffer_ptr + at, buffer.to(buffer_ptr.dtype.element_ty))
    else:
        mask = at < left
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) + weight_decay * p
        buffer = momentum * tl.load(buffer_ptr + at, mask=mask, other=0.0).to(tl.float32) + g
        ahead = g + momentum * buffer if NESTEROV else buffer
        tl.store(p_ptr + at, (p - lr * ahead).to(p_ptr.dtype.element_ty), mask=mask)
        tl.store(buffer_ptr + at, buffer.to(buffer_ptr.dtype.element_ty), mask=mask)


@opaque_op("sgd_nesterov", mutates=("params", "momentum_buffers"))
def _step(
    params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    lr: Tensor,
    positions: IntList,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    check_separate("sgd_nesterov", positions, params, grads, momentum_buffers, lr)
    for indices in groups([kind(*entry) for entry in zip(params, grads, momentum_buffers)]):
        p, g, buffer = (tuple(values[i] for i in indices) for values in (params, grads, momentum_buffers))
        sizes = tuple(t.numel() for t in p)
        first, programs = running_sums([triton.cdiv(size, _BLOCK.value) for size in sizes])
        constexprs = dict(FIRST=first, SIZES=sizes, LR_AT=rates_at(lr, positions, indices), NESTEROV=nesterov)
        launch(_update_kernel, (programs,), p, g, buffer, lr, momentum, weight_decay, **constexprs)


@_step.register_fake
def _(params, grads, momentum_buffers, lr, positions, momentum, weight_decay, nesterov):
    return None


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    # read weight, gradient and momentum, write weight and momentum
    return {"fwd": Cost(5 * sum(p.bytes(itemsize) for p in arguments["params"]))}


@op(
    arguments=update_arguments,
    cost=_cost,
    updates=("params", "momentum_buffers"),
    options={"momentum": 0.85, "weight_decay": 0.1},
    small=[dict(shapes=[(12, 3, 3, 3), (7, 5), (9,)])],
)
def sgd_nesterov(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> None:
    """One step of torch.optim.SGD(nesterov=True) on lists of tensors, in place.

    params: any shapes, float32, float16 or bfloat16, contiguous, channels_last or any other dense memory. They may
    require gradients: the step is not recorded.
    grads: of params' shapes, each in its parameter's dtype or float32; one in another layout is copied into its
    parameter's first. Where one is None, parameter and momentum stay as they are.
    momentum_buffers: of params' shapes and layouts, each in its parameter's dtype or float32; zeros before the first
    step.
    lr: float32 on the parameters' device, one element or [len(params)], one for each; read by the kernels, so that a
    captured CUDA graph follows it.
    momentum, weight_decay: 0 or more. nesterov: False: the momentum of torch.optim.SGD(nesterov=False).
    With g = grad + weight_decay * p:  buf = momentum * buf + g,  p -= lr * (g + momentum * buf), or p -= lr * buf.
    Arithmetic is float32, each result rounded once. Tensors of equal dtypes share a launch, 16 at a time.
    Deterministic. Not differentiable.

    Raises ValueError for lists of different lengths or none, a wrong shape or layout, options out of range, or
    parameters and momenta that share memory with each other, a gradient or lr; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    *tensors, positions = check_updates("sgd_nesterov", params, grads, momentum_buffers, lr, momentum, weight_decay)
    if positions:
        with torch.no_grad():
            _step(*tensors, positions, float(momentum), float(weight_decay), nesterov)
