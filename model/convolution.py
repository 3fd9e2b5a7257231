"""The 3x3 'same' convolution of every network: cuDNN or oneDNN, each gradient on its own and only where it is needed.

Own Function rather than F.conv2d for three reasons: input and weight gradient are separate calls, so that a profile
shows each; the weight gradient keeps the weight's dtype instead of the activations'; and the arithmetic may run in
another dtype than the activations where a processor is faster so.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from blink.kernels.differentiation import differentiable_once
from blink.kernels.environment import cpu_flags

_GEOMETRY = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1)


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 faster than fp32.

    amx_bf16 and Arm's bf16 do, and AMD's avx512_bf16. Intel's avx512_bf16 without AMX issues half as often as fp32's
    multiply-add: measured 166 against 330 GFLOP/s in a 2048^3 product on two cores.
    """
    flags = cpu_flags()
    return bool(flags & {"amx_bf16", "bf16"}) or {"avx512_bf16", "AuthenticAMD"} <= flags


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What the products run in. Rounded to x's dtype, float32 products are the same function as bf16 ones."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not fast_bf16():
        return torch.float32
    return x.dtype


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """y like x; weight has x's dtype."""
    work = arithmetic_dtype(x)
    return torch.ops.aten.convolution(x.to(work), weight.to(work), None, *_GEOMETRY.values()).to(x.dtype)


def _gradient(dy: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """The gradient of x (which = 0) or of the weight (1)."""
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *_GEOMETRY.values(), mask)[which]


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Like x, of which only shape and layout matter; dy and weight have its dtype."""
    work = arithmetic_dtype(dy)
    return _gradient(dy.to(work), torch.empty_like(x, dtype=work), weight.to(work), 0).to(dy.dtype)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """In the dtype that products run in; dy and x have the same; of the weight only shape and layout matter."""
    work = arithmetic_dtype(dy)
    return _gradient(dy.to(work), x.to(work), torch.empty_like(weight, dtype=work), 1)


class Passes(NamedTuple):
    """How the three are computed: functions with the arguments of these, on activations and weights of one dtype."""

    convolve: Callable[[Tensor, Tensor], Tensor] = convolve
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = input_gradient
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = weight_gradient


_PLAIN = Passes()


class _Conv3x3(torch.autograd.Function):
    """Saved for backward: x and the weight as given."""

    @staticmethod
    def forward(ctx, x, weight, passes):
        ctx.save_for_backward(x, weight)
        ctx.passes = passes
        # the weight is rounded to the activations' dtype, as autocast does
        return passes.convolve(x, weight.to(x.dtype))

    @staticmethod
    @differentiable_once("conv3x3", instead="plain_conv3x3")
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if needs_weight:
            with record_function("wgrad"):
                dweight = ctx.passes.weight_gradient(dy, x, weight).to(weight.dtype)
        if needs_x:
            with record_function("dgrad"):
                dx = ctx.passes.input_gradient(dy, x, weight.to(x.dtype))
        return dx, dweight, None


def conv3x3(x: Tensor, weight: Tensor, passes: Passes = _PLAIN) -> Tensor:
    """conv2d(x, weight, padding=1) with x [B, C, H, W] and weight [O, C, 3, 3] of any floating dtypes, y like x.

    Under autocast x is brought to autocast's dtype first. Differentiable once.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _Conv3x3.apply(x, weight, passes)


def plain_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The same by PyTorch's own function, autograd and autocast."""
    return F.conv2d(x, weight, padding=1)


class Conv3x3(nn.Conv2d):
    """A 3x3 'same' convolution without bias; op is `conv3x3` or `plain_conv3x3`."""

    def __init__(self, in_channels: int, channels: int, op: Callable):
        super().__init__(in_channels, channels, 3, padding=1, bias=False)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)
