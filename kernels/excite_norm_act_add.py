"""The tail of a squeeze-and-excite residual block, fused: gate -> BatchNorm -> activation -> add.

    v = x * gate        z = (v - mean(v)) / sqrt(var(v) + eps) * weight + bias        y = act(z) + residual

Moves 2 reads and 1 write of x forward (training), 4 reads and 1 write backward, where eager PyTorch materializes v,
its normalization, the activation and the sum. Without a gate and a residual it is BatchNorm + activation; without a
weight the scale is 1.
Sources: squeeze-and-excite, Hu et al. 2018; its place before the last BatchNorm, hlb-CIFAR10; batch normalization,
Ioffe and Szegedy 2015.
"""

import torch
from torch import Tensor

from . import _batch_norm, _checks, _options
from ._batch_norm import Norm
from .differentiation import differentiable_once
from .launching import opaque_op
from .registry import Arguments, Cost, data, fp32, op


@opaque_op("excite_norm_act_add_fwd", mutates=("running_mean", "running_var"))
def _fwd(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fixed_mean: Tensor | None,
    fixed_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, batch mean [C], batch variance [C]); both empty in evaluation mode, which has fixed statistics."""
    if fixed_mean is None:
        _checks.separate(
            "excite_norm_act_add",
            {"running_mean": running_mean, "running_var": running_var},
            {"x": x, "gate": gate, "bias": bias, "weight": weight, "residual": residual},
        )
        mean, var = _batch_norm.batch_statistics(x, gate, running_mean, running_var, momentum)
        return _batch_norm.forward(x, gate, Norm(mean, var, bias, eps, weight), activation, residual), mean, var
    y = _batch_norm.forward(x, gate, Norm(fixed_mean, fixed_var, bias, eps, weight), activation, residual)
    nothing = x.new_empty(0, dtype=torch.float32)
    return y, nothing, torch.empty_like(nothing)


@_fwd.register_fake
def _(x, gate, bias, weight, residual, running_mean, running_var, fixed_mean, fixed_var, momentum, eps, activation):
    statistics = (x.shape[1],) if fixed_mean is None else (0,)
    mean = torch.empty(statistics, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, torch.empty_like(mean)


@opaque_op("excite_norm_act_add_bwd")
def _bwd(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm.backward(dy, x, gate, Norm(mean, var, bias, eps, weight), training, activation)


@_bwd.register_fake
def _(dy, x, gate, bias, weight, mean, var, training, eps, activation):
    dgate = torch.empty(gate.shape if gate is not None else (0,), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.channels_last), dgate, mean.new_empty(2 * x.shape[1])


def gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of every argument of `ExciteNormActAdd`, or of `NormAct`, whose node `ctx` is."""
    x, gate, bias, weight, mean, var = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dgate, sums = _bwd(dy, x, gate, bias, weight, mean, var, ctx.training, ctx.eps, ctx.activation)
    needs_x, needs_gate, needs_bias, needs_weight, needs_residual = ctx.needs_input_grad[:5]
    return (
        dx if needs_x else None,
        dgate if needs_gate else None,
        *_batch_norm.parameter_gradients(sums, bias, weight, needs_bias, needs_weight),
        dy if needs_residual else None,
        *[None] * 7,
    )


class ExciteNormActAdd(torch.autograd.Function):
    """Saved for backward: x, gate, bias, weight and the statistics used ([C] each); z is recomputed."""

    @staticmethod
    def forward(
        ctx,
        x,
        gate,
        bias,
        weight,
        residual,
        running_mean,
        running_var,
        fixed_mean,
        fixed_var,
        momentum,
        eps,
        activation,
    ):
        statistics = (running_mean, running_var, fixed_mean, fixed_var)
        y, mean, var = _fwd(x, gate, bias, weight, residual, *statistics, momentum, eps, activation)
        ctx.training, ctx.eps, ctx.activation = fixed_mean is None, eps, activation
        if not ctx.training and any(ctx.needs_input_grad):
            mean, var = _batch_norm.kept(fixed_mean, fixed_var)
        ctx.save_for_backward(x, gate, bias, weight, mean, var)
        return y

    @staticmethod
    @differentiable_once("excite_norm_act_add")
    def backward(ctx, dy):
        return gradients(ctx, dy)


def _arguments(
    batch: int, channels: int, height: int, width: int, gate: bool = True, residual: bool = True, weight: bool = False
) -> Arguments:
    x = data(batch, channels, height, width)
    return {
        "x": x,
        "gate": fp32(batch, channels) if gate else None,
        "bias": fp32(channels),
        "residual": x if residual else None,
        **_batch_norm.statistics(channels, weight),
    }


def cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    x = arguments["x"].bytes(itemsize)
    # training reads x twice, as z needs the batch statistics
    reads = (2 if options["training"] else 1) + (arguments.get("residual") is not None)
    # twice over dy and x, as dx needs the sums of g and of g * xhat; write dx (the residual's gradient is dy)
    return {"fwd": Cost(x * (reads + 1)), "bwd": Cost(x * (2 * 2 + 1))}


@op(
    arguments=_arguments,
    cost=cost,
    differentiable=("x", "gate", "bias", "residual", "weight"),
    updates=("running_mean", "running_var"),
    options=_batch_norm.OPTIONS,
    small=[dict(batch=2, channels=12, height=3, width=5), dict(batch=2, channels=12, height=3, width=5, weight=True)],
)
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
    """act(batch_norm(x * gate) * weight + bias) + residual.

    x: [B, C, H, W] float32, float16 or bfloat16, channels_last.
    gate: [B, C] float32 (from `se_gate`), or None for no gate.
    bias: [C] floating; weight: the same, or None for a scale fixed at 1. Gate, bias and weight may have any strides.
    residual: like x, or None.
    running_mean, running_var: [C] float32, contiguous, or both None. In training the batch's statistics are used and
        these move by `momentum` (PyTorch's: the weight of the new batch; the variance is the unbiased one). In
        evaluation they are the statistics.
    momentum: 0 to 1; eps: positive.
    activation: a key of `reference.ACTIVATIONS`.
    Returns y like x, channels_last. Arithmetic is float32, rounded once at the end.

    With N = B * H * W, r = 1 / sqrt(var + eps), xhat = (v - mean) * r and g = dy * act'(z), backward is
        dv = r * weight * (g - sum(g) / N - xhat * sum(g * xhat) / N)      (evaluation: dv = r * weight * g)
        dx = dv * gate     dgate = sum over H, W of dv * x     dresidual = dy
        dbias = sum(g)     dweight = sum(g * xhat)
    Saved: x, gate, bias, weight, mean, var. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout, activation, momentum or eps, an empty batch, one value per channel in
    training, or running statistics that share memory with another argument; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "excite_norm_act_add"
    _checks.activation(op, activation)
    _options.batch_norm(op, momentum, eps)
    _checks.images(op, "x", x, _checks.FLOATS)
    batch, channels, height, width = x.shape
    if gate is not None:
        gate = _checks.operand(op, "gate", gate, (batch, channels), (torch.float32,))
    bias, weight = _checks.affine(op, bias, weight, channels)
    if residual is not None:
        _checks.matches(op, "residual", residual, x.shape, (x.dtype,))
        _checks.images(op, "residual", residual, (x.dtype,))
    statistics = _checks.running_statistics(op, running_mean, running_var, channels, training)
    _checks.enough_values(op, batch * height * width, training)
    _checks.device(op, x, gate, bias, weight, residual, running_mean, running_var)
    return ExciteNormActAdd.apply(x, gate, bias, weight, residual, *statistics, momentum, eps, activation)
