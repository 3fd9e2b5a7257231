"""The squeeze-and-excite gate, fused: Linear -> activation -> Linear -> sigmoid, on the squeezed [B, C].

    hidden = s W1^T + b1          gate = sigmoid(act(hidden) W2^T + b2)

One launch forward and two backward (the input's gradient, then the weights'), where eager PyTorch takes about five and
nine: at [512, 512] the arithmetic is nothing and the launches are everything. The gate stays float32, because
gate (1 - gate), which its gradient needs, is lost in 16 bits from a logit of about 8 on. Sources: Hu et al. 2018;
reduction 16 and GELU, hlb-CIFAR10.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks
from ._common import activate, activation_backward, block_of, sigmoid
from ._launch import launch, opaque_op
from .differentiation import differentiable_once

_BLOCK_B = 16
_BLOCK_C = 64
_WEIGHT_BLOCK_B = 64
_WEIGHT_BLOCK_C = 16


@triton.jit
def _fwd_kernel(
    squeeze_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gate_ptr, hidden_ptr, batch,
    C: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_B images; stores the gate and the hidden pre-activation."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    r = tl.arange(0, BLOCK_R)
    in_b, in_r = b < batch, r < R
    hidden = tl.zeros([BLOCK_B, BLOCK_R], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_c = c < C
        s = tl.load(squeeze_ptr + b[:, None] * C + c[None, :], mask=in_b[:, None] & in_c[None, :], other=0.0)
        w1 = tl.load(w1_ptr + r[None, :] * C + c[:, None], mask=in_c[:, None] & in_r[None, :], other=0.0)
        hidden = tl.dot(s, w1.to(tl.float32), acc=hidden, input_precision="ieee")
    hidden += tl.load(b1_ptr + r, mask=in_r, other=0.0).to(tl.float32)[None, :]
    tl.store(hidden_ptr + b[:, None] * R + r[None, :], hidden, mask=in_b[:, None] & in_r[None, :])
    # beyond R an infinite squeeze times a weight of 0 is NaN
    h = tl.where(in_r[None, :], activate(hidden, ACT), 0.0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_c = c < C
        w2 = tl.load(w2_ptr + c[None, :] * R + r[:, None], mask=in_r[:, None] & in_c[None, :], other=0.0)
        logit = tl.dot(h, w2.to(tl.float32), input_precision="ieee")
        logit += tl.load(b2_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        mask = in_b[:, None] & in_c[None, :]
        tl.store(gate_ptr + b[:, None] * C + c[None, :], sigmoid(logit), mask=mask)


@triton.jit
def _bwd_kernel(
    dgate_ptr, gate_ptr, hidden_ptr, w1_ptr, w2_ptr, dsqueeze_ptr, dhidden_ptr, batch,
    C: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dhidden = (dlogit W2) act'(hidden) and dsqueeze = dhidden W1, with dlogit = dgate gate (1 - gate)."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    r = tl.arange(0, BLOCK_R)
    in_b, in_r = b < batch, r < R
    dh = tl.zeros([BLOCK_B, BLOCK_R], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_c = c < C
        at = b[:, None] * C + c[None, :]
        mask = in_b[:, None] & in_c[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
        dlogit = tl.load(dgate_ptr + at, mask=mask, other=0.0) * gate * (1.0 - gate)
        w2 = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=in_c[:, None] & in_r[None, :], other=0.0)
        dh = tl.dot(dlogit, w2.to(tl.float32), acc=dh, input_precision="ieee")
    at = b[:, None] * R + r[None, :]
    mask = in_b[:, None] & in_r[None, :]
    # beyond R an infinite gradient times a weight of 0 is NaN
    dh = tl.where(mask, activation_backward(dh, tl.load(hidden_ptr + at, mask=mask, other=0.0), ACT), 0.0)
    tl.store(dhidden_ptr + at, dh, mask=mask)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_c = c < C
        w1 = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=in_r[:, None] & in_c[None, :], other=0.0)
        ds = tl.dot(dh, w1.to(tl.float32), input_precision="ieee")
        tl.store(dsqueeze_ptr + b[:, None] * C + c[None, :], ds, mask=in_b[:, None] & in_c[None, :])


@triton.jit
def _weight_grad_kernel(
    dgate_ptr, gate_ptr, hidden_ptr, dhidden_ptr, squeeze_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, batch,
    C: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dW2 = dlogit^T act(hidden), dW1 = dhidden^T s, for BLOCK_C channels over the whole batch, in order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    in_c, in_r = c < C, r < R
    dw1 = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dw2 = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    db1 = tl.zeros([BLOCK_R], dtype=tl.float32)
    db2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        in_b = b < batch
        at_c = b[:, None] * C + c[None, :]
        mask_c = in_b[:, None] & in_c[None, :]
        at_r = b[:, None] * R + r[None, :]
        mask_r = in_b[:, None] & in_r[None, :]
        gate = tl.load(gate_ptr + at_c, mask=mask_c, other=0.0)
        dlogit = tl.load(dgate_ptr + at_c, mask=mask_c, other=0.0) * gate * (1.0 - gate)
        hidden = tl.load(hidden_ptr + at_r, mask=mask_r, other=0.0)
        dhidden = tl.load(dhidden_ptr + at_r, mask=mask_r, other=0.0)
        s = tl.load(squeeze_ptr + at_c, mask=mask_c, other=0.0)
        dw2 = tl.dot(tl.trans(dlogit), activate(hidden, ACT), acc=dw2, input_precision="ieee")
        dw1 = tl.dot(tl.trans(dhidden), s, acc=dw1, input_precision="ieee")
        db1 += tl.sum(dhidden, 0)
        db2 += tl.sum(dlogit, 0)
    tl.store(dw1_ptr + r[:, None] * C + c[None, :], dw1, mask=in_r[:, None] & in_c[None, :])
    tl.store(dw2_ptr + c[:, None] * R + r[None, :], dw2, mask=in_c[:, None] & in_r[None, :])
    tl.store(db2_ptr + c, db2, mask=in_c)
    # every program sums the same dhidden in the same order; one stores it
    if tl.program_id(0) == 0:
        tl.store(db1_ptr + r, db1, mask=in_r)


def _block_r(hidden: int) -> int:
    return max(16, triton.next_power_of_2(hidden))


def weight_gradients(
    dgate: Tensor, gate: Tensor, hidden: Tensor, dhidden: Tensor, squeeze: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dW1 [R, C], db1 [R], dW2 [C, R], db2 [C]), float32. All arguments float32: [B, C] or [B, R]."""
    batch, channels = gate.shape
    width = hidden.shape[1]
    dw1, db1 = gate.new_empty(width, channels), gate.new_empty(width)
    dw2, db2 = gate.new_empty(channels, width), gate.new_empty(channels)
    launch(
        _weight_grad_kernel, (triton.cdiv(channels, _WEIGHT_BLOCK_C),), dgate, gate, hidden, dhidden, squeeze,
        dw1, db1, dw2, db2, batch, C=channels, R=width, ACT=activation,
        BLOCK_B=_WEIGHT_BLOCK_B, BLOCK_C=_WEIGHT_BLOCK_C, BLOCK_R=_block_r(width),
    )  # fmt: skip
    return dw1, db1, dw2, db2


@opaque_op("se_gate_fwd")
def _fwd(
    squeeze: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(gate [B, C], hidden pre-activation [B, R]), float32."""
    batch, channels = squeeze.shape
    width = weight1.shape[0]
    gate, hidden = torch.empty_like(squeeze), squeeze.new_empty(batch, width)
    launch(
        _fwd_kernel, (triton.cdiv(batch, _BLOCK_B),), squeeze, weight1, bias1, weight2, bias2, gate, hidden, batch,
        C=channels, R=width, ACT=activation,
        BLOCK_B=_BLOCK_B, BLOCK_C=max(16, block_of(channels, _BLOCK_C)), BLOCK_R=_block_r(width),
    )  # fmt: skip
    return gate, hidden


@_fwd.register_fake
def _(squeeze, weight1, bias1, weight2, bias2, activation):
    return torch.empty_like(squeeze), squeeze.new_empty(squeeze.shape[0], weight1.shape[0])


@opaque_op("se_gate_bwd")
def _bwd(
    dgate: Tensor, gate: Tensor, hidden: Tensor, squeeze: Tensor, weight1: Tensor, weight2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dsqueeze [B, C], dW1, db1, dW2, db2), float32."""
    batch, channels = gate.shape
    width = hidden.shape[1]
    dsqueeze, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
    launch(
        _bwd_kernel, (triton.cdiv(batch, _BLOCK_B),), dgate, gate, hidden, weight1, weight2, dsqueeze, dhidden, batch,
        C=channels, R=width, ACT=activation,
        BLOCK_B=_BLOCK_B, BLOCK_C=max(16, block_of(channels, _BLOCK_C)), BLOCK_R=_block_r(width),
    )  # fmt: skip
    return dsqueeze, *weight_gradients(dgate, gate, hidden, dhidden, squeeze, activation)


@_bwd.register_fake
def _(dgate, gate, hidden, squeeze, weight1, weight2, activation):
    channels, width = gate.shape[1], hidden.shape[1]
    return (
        torch.empty_like(gate),
        gate.new_empty(width, channels),
        gate.new_empty(width),
        gate.new_empty(channels, width),
        gate.new_empty(channels),
    )


class SEGate(torch.autograd.Function):
    """Saved for backward: squeeze, gate and hidden pre-activation (float32), weight1, weight2."""

    @staticmethod
    def forward(ctx, squeeze, weight1, bias1, weight2, bias2, activation):
        gate, hidden = _fwd(squeeze, weight1, bias1, weight2, bias2, activation)
        ctx.save_for_backward(squeeze, gate, hidden, weight1, weight2)
        ctx.activation, ctx.bias_dtypes = activation, (bias1.dtype, bias2.dtype)
        return gate

    @staticmethod
    @differentiable_once("se_gate")
    def backward(ctx, dgate):
        squeeze, gate, hidden, weight1, weight2 = ctx.saved_tensors
        grads = _bwd(dgate.contiguous(), gate, hidden, squeeze, weight1, weight2, ctx.activation)
        dtypes = (squeeze.dtype, weight1.dtype, ctx.bias_dtypes[0], weight2.dtype, ctx.bias_dtypes[1])
        return (
            *(g.to(d) if needed else None for g, d, needed in zip(grads, dtypes, ctx.needs_input_grad)),
            None,
        )


def check_gate_weights(
    op: str, channels: int, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight1 [R, C] and weight2 [C, R], or the same as 1x1 convolutions, and their biases; returns all contiguous,
    the weights as matrices."""
    weight1 = _checks.pointwise(op, "weight1", weight1, (None, channels))
    weight2 = _checks.pointwise(op, "weight2", weight2, (channels, len(weight1)))
    bias1 = _checks.operand(op, "bias1", bias1, (len(weight1),), _checks.FLOATS)
    bias2 = _checks.operand(op, "bias2", bias2, (channels,), _checks.FLOATS)
    return weight1, bias1, weight2, bias2


def se_gate(
    squeeze: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: str | None = "gelu",
) -> Tensor:
    """sigmoid(act(squeeze W1^T + b1) W2^T + b2).

    squeeze: [B, C] floating, of any strides: per-image channel means.
    weight1, bias1: [R, C] (or [R, C, 1, 1]) and [R]; weight2, bias2: [C, R] (or [C, R, 1, 1]) and [C]; floating,
        of any strides.
    activation: "gelu" (erf), "silu", "relu" or None.
    Returns the gate [B, C] float32. Arithmetic is float32 throughout.

    With dlogit = dgate gate (1 - gate) and h = act(hidden), backward is
        dW2 = dlogit^T h     db2 = sum dlogit     dhidden = (dlogit W2) act'(hidden)
        dW1 = dhidden^T s    db1 = sum dhidden    dsqueeze = dhidden W1
    Saved: squeeze, gate, hidden, both weights. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape or activation or an empty batch; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "se_gate"
    name = _checks.activation(op, activation)
    _checks.tensor(op, "squeeze", squeeze)
    if squeeze.dim() != 2 or squeeze.numel() == 0:
        raise ValueError(f"{op}: squeeze must be [B, C] and not empty, found {list(squeeze.shape)}")
    _checks.dtype(op, "squeeze", squeeze, _checks.FLOATS)
    weights = check_gate_weights(op, squeeze.shape[1], weight1, bias1, weight2, bias2)
    _checks.device(op, squeeze, *weights)
    return SEGate.apply(squeeze.float().contiguous(), *weights, name)
