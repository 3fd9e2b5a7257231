"""BatchNorm with what stands around it, compiled: `norm_act`, `excite_norm_act_add`, `pool_norm_act`.

Formulas and what backward saves are those of the fused kernels (kernels/pool_norm_act.py and its neighbours), but that
the index of a pooling's winner takes a byte. Statistics and sums are of chunks of images, float32 for at most 16 rows
and float64 above, merged in order: the same bits on any number of threads.
"""

import torch
from torch import Tensor

from .. import reference
from ..differentiation import differentiable_once
from . import _takes
from .library import Library, load


def _like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


class _NormAct(torch.autograd.Function):
    """Saved for backward: x (of a pooling the pooled values and the winners' index), gate, bias, weight, mean, var."""

    @staticmethod
    def forward(
        ctx, op, library, x, gate, bias, weight, residual, running_mean, running_var, training, momentum, eps, pooling,
        squeeze, fork,
    ):  # fmt: skip
        batch, channels, height, width = x.shape
        ctx.op, ctx.library, ctx.training, ctx.eps, ctx.pooling = op, library, training, eps, pooling
        ctx.size, ctx.squeeze, ctx.fork = (height, width), squeeze, fork
        save = any(ctx.needs_input_grad)
        vectors = (_takes.fp32(bias), _takes.fp32(weight))
        running = (running_mean, running_var)
        fixed, moving = ((None, None), running) if training else (running, (None, None))
        # in evaluation copies: training may move the running ones before backward runs
        mean, var = (torch.empty(channels) for _ in range(2)) if training else (t.clone() for t in running)
        options = (float(momentum), float(eps), torch.get_num_threads())
        means = torch.empty(batch, channels) if squeeze else None
        if pooling:
            pooled, y = (_like(x, batch, channels, height // 2, width // 2) for _ in range(2))
            index = torch.empty(pooled.numel() if save else 0, dtype=torch.uint8)
            library.pool_norm_act_forward(
                x, *vectors, *fixed, *moving, mean, var, pooled, index if save else None, y, means,
                batch, height, width, channels, *options,
            )  # fmt: skip
            x = pooled
        else:
            y, index, rows = _like(x, *x.shape), None, height * width
            library.norm_act_forward(
                x, gate, residual, *vectors, *fixed, *moving, mean, var, y, batch, rows, channels, *options
            )
        ctx.save_for_backward(x, index, gate, bias, weight, mean, var)
        ctx.set_materialize_grads(False)
        # to autograd a view is an output of its own: two gradients arrive, not their sum
        outputs = (y, *([y.view_as(y)] if fork else []), *([means] if squeeze else []))
        return outputs if pooling else y

    @staticmethod
    def backward(ctx, *grads):
        return _BACKWARD[ctx.op](ctx, *grads)


def _gradients(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of every argument of `_NormAct`."""
    x, index, gate, bias, weight, mean, var = ctx.saved_tensors
    dsqueeze = grads[-1].contiguous() if ctx.squeeze and grads[-1] is not None else None
    dys = [dy.contiguous(memory_format=torch.channels_last) for dy in grads[: 2 if ctx.fork else 1] if dy is not None]
    if not dys and dsqueeze is None:
        return (None,) * 15
    dy, dy2 = [*dys, None][:2] if dys else (torch.zeros_like(x), None)
    batch, channels = x.shape[:2]
    height, width = ctx.size if ctx.pooling else (0, ctx.size[0] * ctx.size[1])
    needs_x, needs_gate, needs_bias, needs_weight, needs_residual = ctx.needs_input_grad[2:7]
    dx = _like(x, batch, channels, *ctx.size) if needs_x or needs_gate else None
    dgate, sums = None if gate is None else torch.empty_like(gate), torch.empty(2, channels)
    ctx.library.norm_act_backward(
        dy, dy2, dsqueeze, x, index, gate, _takes.fp32(bias), _takes.fp32(weight), mean, var, dx, dgate, sums,
        batch, height, width, channels, ctx.training, float(ctx.eps), torch.get_num_threads(),
    )  # fmt: skip
    return (
        None,
        None,
        dx if needs_x else None,
        dgate if needs_gate else None,
        sums[0].to(bias.dtype) if needs_bias else None,
        sums[1].to(weight.dtype) if needs_weight else None,
        dy if needs_residual else None,
        *[None] * 8,
    )


_BACKWARD = {op: differentiable_once(op)(_gradients) for op in ("norm_act", "excite_norm_act_add", "pool_norm_act")}


def _library(op: str, x: Tensor, vectors: tuple, pooled: bool = False, **options) -> Library | None:
    """The compiled kernels if they take this call; vectors: bias, weight and running statistics."""
    if not _takes.plain_call() or not _takes.images(x) or (pooled and min(x.shape[2:]) < 2):
        return None
    batch, channels, height, width = x.shape
    count = batch * ((height // 2) * (width // 2) if pooled else height * width)
    if not _takes.normalization(op, channels, count, *vectors, **options):
        return None
    return load("batch_norm", options["activation"], x.dtype)


def norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
) -> Tensor:
    """act(batch_norm(x)): see `kernels.norm_act`. Compiled for x [B, C, H, W] float32 or bfloat16, channels_last."""
    options = dict(training=training, momentum=momentum, eps=eps, activation=activation)
    library = _library("norm_act", x, (bias, weight, running_mean, running_var), **options)
    if library is None:
        return reference.norm_act(x, bias, running_mean, running_var, weight=weight, **options)
    return _NormAct.apply(
        "norm_act", library, x, None, bias, weight, None, running_mean, running_var, training, momentum, eps,
        False, False, False,
    )  # fmt: skip


def excite_norm_act_add(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
) -> Tensor:
    """act(batch_norm(x * gate)) + residual: see `kernels.excite_norm_act_add`.

    Compiled for x and residual [B, C, H, W] float32 or bfloat16, channels_last, and gate [B, C] float32.
    """
    op = "excite_norm_act_add"
    options = dict(training=training, momentum=momentum, eps=eps, activation=activation)
    library = _library(op, x, (bias, weight, running_mean, running_var), **options)
    gated = gate is None or (_takes.plain(gate) and gate.shape == x.shape[:2] and gate.dtype == torch.float32)
    added = residual is None or (_takes.images(residual, (x.dtype,)) and residual.shape == x.shape)
    if library is None or not gated or not added:
        statistics = (running_mean, running_var)
        return reference.excite_norm_act_add(x, gate, bias, residual, *statistics, weight=weight, **options)
    gate = None if gate is None else gate.contiguous()
    return _NormAct.apply(
        op, library, x, gate, bias, weight, residual, running_mean, running_var, training, momentum, eps,
        False, False, False,
    )  # fmt: skip


def pool_norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    squeeze: bool = True,
    fork: bool = False,
) -> tuple[Tensor | None, ...]:
    """(y, mean of y over H and W) with y = act(batch_norm(max_pool2d(x, 2))): see `kernels.pool_norm_act`.

    Compiled for x [B, C, H, W] float32 or bfloat16, channels_last.
    """
    options = dict(training=training, momentum=momentum, eps=eps, activation=activation)
    library = _library("pool_norm_act", x, (bias, weight, running_mean, running_var), pooled=True, **options)
    if library is None:
        wanted = dict(squeeze=squeeze, fork=fork)
        return reference.pool_norm_act(x, bias, running_mean, running_var, weight=weight, **wanted, **options)
    outputs = _NormAct.apply(
        "pool_norm_act", library, x, None, bias, weight, None, running_mean, running_var, training, momentum, eps,
        True, squeeze, fork,
    )  # fmt: skip
    return outputs if squeeze else (*outputs, None)
