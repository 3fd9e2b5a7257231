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
    return torch.ops.aten.convolution(x, weight, None, *_GEOMETRY.values())


def _gradient(dy: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """The gradient of x (which = 0) or of the weight (1)."""
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *_GEOMETRY.values(), mask)[which]


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """In dy's dtype, as weight is; of x only shape and layout matter."""
    return _gradient(dy, torch.empty_like(x, dtype=dy.dtype), weight, 0)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """In dy's dtype, as x is; of the weight only shape and layout matter."""
    return _gradient(dy, x, torch.empty_like(weight, dtype=dy.dtype), 1)


class Passes(NamedTuple):
    """How the three are computed: functions with the arguments of these."""

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
        work = arithmetic_dtype(x)
        # the weight is rounded to the activations' dtype first, as autocast does
        return passes.convolve(x.to(work), weight.to(x.dtype).to(work)).to(x.dtype)

    @staticmethod
    @differentiable_once("conv3x3", instead="plain_conv3x3")
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        work = arithmetic_dtype(x)
        dx = dweight = None
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dy = dy.to(work)
        if needs_weight:
            with record_function("wgrad"):
                dweight = ctx.passes.weight_gradient(dy, x.to(work), weight).to(weight.dtype)
        if needs_x:
            with record_function("dgrad"):
                dx = ctx.passes.input_gradient(dy, x, weight.to(x.dtype).to(work)).to(x.dtype)
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
