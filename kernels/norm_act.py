"""BatchNorm -> activation, fused: `excite_norm_act_add` without a gate and a residual, on the same kernels.

Sources: batch normalization, Ioffe and Szegedy 2015; GELU, Hendrycks and Gimpel 2016.
"""

from torch import Tensor

from . import _batch_norm, _checks, _options
from .differentiation import differentiable_once
from .excite_norm_act_add import ExciteNormActAdd, cost, gradients
from .registry import Arguments, data, fp32, op


class NormAct(ExciteNormActAdd):
    """The same under this op's name."""

    @staticmethod
    @differentiable_once("norm_act")
    def backward(ctx, dy):
        return gradients(ctx, dy)


def _arguments(batch: int, channels: int, height: int, width: int, weight: bool = False) -> Arguments:
    x = data(batch, channels, height, width)
    return {"x": x, "bias": fp32(channels), **_batch_norm.statistics(channels, weight)}


@op(
    arguments=_arguments,
    cost=cost,
    differentiable=("x", "bias", "weight"),
    updates=("running_mean", "running_var"),
    options=_batch_norm.OPTIONS,
    small=[dict(batch=2, channels=12, height=3, width=5), dict(batch=2, channels=12, height=3, width=5, weight=True)],
    # the second as in a ResNet
    further=[
        dict(channels=128, height=15, width=15),
        dict(channels=256, height=14, width=14, weight=True, activation="relu"),
    ],
)
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
    """act(batch_norm(x) * weight + bias).

    x: [B, C, H, W] float32, float16 or bfloat16, channels_last.
    bias: [C] floating, of any strides; weight: the same, or None for a scale fixed at 1.
    running_mean, running_var: [C] float32, contiguous, or both None; updated in training, used in evaluation, as
        BatchNorm2d does.
    momentum: the new batch's weight, 0 to 1; eps: positive.
    activation: a key of `reference.ACTIVATIONS`.
    Returns y like x, channels_last. Arithmetic is float32, rounded once at the end.

    With N = B * H * W, r = 1 / sqrt(var + eps), xhat = (x - mean) * r and g = dy * act'(xhat * weight + bias), backward
    is
        dx = r * weight * (g - sum(g) / N - xhat * sum(g * xhat) / N)      (evaluation: dx = r * weight * g)
        dbias = sum(g)     dweight = sum(g * xhat)
    Saved: x, bias, weight, mean, var. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout, activation, momentum or eps, an empty batch, one value per channel in
    training, or running statistics that share memory with another argument; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "norm_act"
    _checks.activation(op, activation)
    _options.batch_norm(op, momentum, eps)
    _checks.images(op, "x", x, _checks.FLOATS)
    batch, channels, height, width = x.shape
    bias, weight = _checks.affine(op, bias, weight, channels)
    statistics = _checks.running_statistics(op, running_mean, running_var, channels, training)
    _checks.enough_values(op, batch * height * width, training)
    _checks.device(op, x, bias, weight, running_mean, running_var)
    return NormAct.apply(x, None, bias, weight, None, *statistics, momentum, eps, activation)
