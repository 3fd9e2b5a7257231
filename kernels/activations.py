"""The activations and gates of the kernels: by the names of `reference.ACTIVATIONS` and `reference.GATES`, the value
and its derivative times a gradient.

A new one is two functions and an entry here, and its definition in `reference`: the tests run over both tables.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._common import rounded_product


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_backward(dgate, gate):
    return rounded_product(dgate * gate, 1.0 - gate)


@triton.jit
def hardsigmoid(z):
    # a NaN fails both comparisons
    return tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, (z + 3.0) * 0.16666666666666666))


@triton.jit
def hardsigmoid_backward(dgate, gate):
    # a choice, not a product: an infinite dgate times 0 would be NaN
    return tl.where((gate > 0) & (gate < 1), dgate * 0.16666666666666666, 0.0)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_backward(dy, z):
    return dy


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_backward(dy, z):
    # a choice, not a product: an infinite dy times 0 would be NaN; a NaN z lets dy through
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_backward(dy, z):
    s = sigmoid(z)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def hardswish(z):
    return z * hardsigmoid(z)


@triton.jit
def hardswish_backward(dy, z):
    # a NaN z lets dy through, as in PyTorch
    return tl.where(z <= -3, 0.0, dy * tl.where(z < 3, z * 0.3333333333333333 + 0.5, 1.0))


@triton.jit
def gelu_parts(z):
    """(Phi(z), exp(-z^2 / 2)) with one exp and one reciprocal.

    Phi(-|z|) = exp(-z^2 / 2) P(t), t = 1 / (1 + 0.55 |z| / sqrt(2)): the form of Abramowitz and Stegun 7.1.26 with one
    more term and half its factors, fitted so that max(1, |z|) times the error is 1.7e-8 at most, which is below
    float32's rounding (7.1.26's own 1.5e-7 is not).
    """
    d = 1.0 + tl.abs(z) * 0.38890872965260115
    # a division, and tl.exp, take eight and five instructions, as they serve subnormal numbers too
    t = tl.rsqrt(d * d)
    e = tl.exp2(z * -0.7213475204444817 * z)
    p = -0.2572172153111593 + t * 0.05319669032864347
    p = -0.01862555922152061 + t * (0.3770982000405573 + t * p)
    h = e * (t * (0.15090677604015446 + t * (0.19464109117593972 + t * p)))
    return tl.where(z >= 0, 1.0 - h, h), e


@triton.jit
def gelu(z):
    cdf, _ = gelu_parts(z)
    return z * cdf


@triton.jit
def gelu_backward(dy, z):
    cdf, e = gelu_parts(z)
    return dy * (cdf + 0.3989422804014327 * (z * e))


class Activation(NamedTuple):
    """What a kernel takes, as a constexpr: act(z), where a NaN stays a NaN, or dy * d act(z) / dz, which for infinite
    and NaN dy or z is what PyTorch gives.
    """

    value: triton.JITFunction
    backward: triton.JITFunction


class Gate(NamedTuple):
    """What a kernel takes, as a constexpr: gate(logit), where a NaN stays a NaN, or the gradient of the logit from the
    gate's gradient and the gate itself, which is what backward passes have.
    """

    value: triton.JITFunction
    backward: triton.JITFunction


GATES = {
    "sigmoid": Gate(sigmoid, sigmoid_backward),
    "hardsigmoid": Gate(hardsigmoid, hardsigmoid_backward),
}

ACTIVATIONS = {
    None: Activation(identity, identity_backward),
    "relu": Activation(relu, relu_backward),
    "silu": Activation(silu, silu_backward),
    "gelu": Activation(gelu, gelu_backward),
    "hardswish": Activation(hardswish, hardswish_backward),
}
