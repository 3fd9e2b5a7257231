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
    # a NaN z lets dy through, as in PyTorch's CUDA code
    return tl.where(z <= -3, 0.0, dy * tl.where(z < 3, z * 0.3333333333333333 + 0.5, 1.0))


@triton.jit
def _gelu_tail(m):
    """Phi(-m) for m >= 0, as 2^P(m); P falls for ever, so that the tail ends in 0.

    Fitted by Lawson's iteration so that max(1, m) times the error is 1.5e-8 at most, below float32's rounding.
    """
    p = 3.296825525467284e-05 + m * -2.2758897557650926e-06
    p = -0.00020247547945473343 + m * (-0.00015728003927506506 + m * p)
    p = -0.0525464303791523 + m * (0.007142776623368263 + m * p)
    p = -1.1511069536209106 + m * (-0.45919305086135864 + m * p)
    return tl.exp2(-0.9999999403953552 + m * p)


@triton.jit
def gelu(z):
    """z Phi(z) = max(z, 0) - |z| Phi(-|z|)."""
    # an infinite z has no product with a tail of 0
    m = tl.abs(tl.minimum(z, 16.0))
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - m * _gelu_tail(m)


@triton.jit
def gelu_backward(dy, z):
    """dy (Phi(z) + z phi(z)); with m = |z|, the sum is q = Phi(-m) - m phi(m) for negative z, else 1 - q."""
    m = tl.abs(z)
    # tl.exp would take a product more, which serves a base that this one has in its constant
    e = tl.exp2(z * -0.7213475204444817 * z)
    q = _gelu_tail(m) - 0.3989422804014327 * m * e
    return dy * tl.where(z < 0, q, 1.0 - q)


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
