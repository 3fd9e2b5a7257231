"""The whole squeeze-and-excite block, fused: squeeze -> Linear -> activation -> Linear -> gate -> excite.

    s = mean of x over H, W      gate = sigmoid(act(s W1^T + b1) W2^T + b2)      y = x * gate

One program owns an image: it reads it to squeeze it, forms the gate in registers, and reads it again, now from cache,
to scale it. One launch forward; three backward (x, then the weights as in `se_gate`). Where images are few and large,
each is cut into parts, whose sums take a launch more before either. Sources: Hu et al. 2018; hardsigmoid in place of
sigmoid, Howard et al. 2019 (MobileNetV3).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks
from ._common import rounded_product
from ._gate_weights import GATE_WEIGHTS, GateWeights, check_gate_weights, gate_arguments
from .activations import ACTIVATIONS, GATES
from .differentiation import differentiable_once
from .launching import launch, opaque_op, resident
from .registry import Arguments, Cost, data, op
from .se_gate import weight_gradients

# bytes of x that a program holds at a time; of a weight matrix it holds as many elements
_TILE_BYTES = 8192
# of the least part of an image that has a program of its own, and how many parts an image has at least, if several
_PART_BYTES = 65536
_LEAST_PARTS = 4


class _Sizes(NamedTuple):
    C: int
    R: int
    BLOCK_HW: int
    BLOCK_C: int
    BLOCK_R: int


@triton.jit
def _sum_of_image(x_ptr, dy_ptr, image, first, last, hw, S: tl.constexpr):
    """Sum over pixels first ... last - 1 of an image of x, or of dy x, [BLOCK_C]."""
    c = tl.arange(0, S.BLOCK_C)
    base = image.to(tl.int64) * hw * S.C
    acc = tl.zeros([S.BLOCK_HW, S.BLOCK_C], dtype=tl.float32)
    for start in range(first, last, S.BLOCK_HW):
        p = start + tl.arange(0, S.BLOCK_HW)
        mask = (p < last)[:, None] & (c < S.C)[None, :]
        at = base + p[:, None] * S.C + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            x *= tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        acc += x
    return tl.sum(acc, 0)


@triton.jit
def _sum_of_parts(partial_ptr, image, parts, S: tl.constexpr):
    """An image's sum, from those of its parts in their order."""
    c = tl.arange(0, S.BLOCK_C)
    total = tl.zeros([S.BLOCK_C], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + (image * parts + part) * S.C + c, mask=c < S.C, other=0.0)
    return total


@triton.jit
def _parts_kernel(x_ptr, dy_ptr, partial_ptr, hw, share, S: tl.constexpr):
    """Sums of x, or of dy x, over each image's parts of `share` pixels: partial [B, parts, C]."""
    image, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.arange(0, S.BLOCK_C)
    total = _sum_of_image(x_ptr, dy_ptr, image, part * share, tl.minimum(part * share + share, hw), hw, S)
    tl.store(partial_ptr + (image * parts + part) * S.C + c, total, mask=c < S.C)


@triton.jit
def _fwd_kernel(
    x_ptr, layers, y_ptr, squeeze_ptr, gate_ptr, hidden_ptr, partial_ptr, hw, share, S: tl.constexpr,
    ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One program per image; or, where sums over its parts are there already, per part of `share` pixels."""
    image, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    base = image.to(tl.int64) * hw * S.C
    if partial_ptr is None:
        s = _sum_of_image(x_ptr, None, image, 0, hw, hw, S) / hw
    else:
        s = _sum_of_parts(partial_ptr, image, tl.num_programs(1), S) / hw
    # all parts of an image compute its gate, and one stores it
    tl.store(squeeze_ptr + image * S.C + c, s, mask=in_c & (part == 0))
    logit = tl.load(layers.b2 + c, mask=in_c, other=0.0).to(tl.float32)
    for start in range(0, S.R, S.BLOCK_R):
        r = start + tl.arange(0, S.BLOCK_R)
        in_r = r < S.R
        both = in_r[:, None] & in_c[None, :]
        w1 = tl.load(layers.w1 + r[:, None] * S.C + c[None, :], mask=both, other=0.0).to(tl.float32)
        hidden = tl.sum(rounded_product(w1, s[None, :]), 1) + tl.load(layers.b1 + r, mask=in_r, other=0.0).to(
            tl.float32
        )
        tl.store(hidden_ptr + image * S.R + r, hidden, mask=in_r & (part == 0))
        w2 = tl.load(layers.w2 + c[None, :] * S.R + r[:, None], mask=both, other=0.0).to(tl.float32)
        # beyond R an infinite squeeze times a weight of 0 is NaN
        h = tl.where(in_r, ACT(hidden), 0.0)
        logit += tl.sum(rounded_product(w2, h[:, None]), 0)
    gate = GATE(logit)
    tl.store(gate_ptr + image * S.C + c, gate, mask=in_c & (part == 0))
    last = tl.minimum(part * share + share, hw)
    for start in range(part * share, last, S.BLOCK_HW):
        p = start + tl.arange(0, S.BLOCK_HW)
        mask = (p < last)[:, None] & in_c[None, :]
        at = base + p[:, None] * S.C + c[None, :]
        y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, layers, gate_ptr, hidden_ptr, dx_ptr, dgate_ptr, dhidden_ptr, partial_ptr, hw, share,
    S: tl.constexpr, DACT: tl.constexpr, DGATE: tl.constexpr,
):  # fmt: skip
    """One program per image, or per part as in the forward pass: dgate = sum dy x, then the gate backwards to ds, then
    dx = dy gate + ds / (H W).
    """
    image, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, S.BLOCK_C)
    in_c = c < S.C
    base = image.to(tl.int64) * hw * S.C
    if partial_ptr is None:
        dgate = _sum_of_image(x_ptr, dy_ptr, image, 0, hw, hw, S)
    else:
        dgate = _sum_of_parts(partial_ptr, image, tl.num_programs(1), S)
    tl.store(dgate_ptr + image * S.C + c, dgate, mask=in_c & (part == 0))
    gate = tl.load(gate_ptr + image * S.C + c, mask=in_c, other=0.0)
    dlogit = DGATE(dgate, gate)
    ds = tl.zeros([S.BLOCK_C], dtype=tl.float32)
    for start in range(0, S.R, S.BLOCK_R):
        r = start + tl.arange(0, S.BLOCK_R)
        in_r = r < S.R
        both = in_r[:, None] & in_c[None, :]
        w2 = tl.load(layers.w2 + c[None, :] * S.R + r[:, None], mask=both, other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + image * S.R + r, mask=in_r, other=0.0)
        dh = tl.sum(rounded_product(w2, dlogit[None, :]), 1)
        # beyond R an infinite gradient times a weight of 0 is NaN
        dhidden = tl.where(in_r, DACT(dh, hidden), 0.0)
        tl.store(dhidden_ptr + image * S.R + r, dhidden, mask=in_r & (part == 0))
        w1 = tl.load(layers.w1 + r[:, None] * S.C + c[None, :], mask=both, other=0.0).to(tl.float32)
        ds += tl.sum(rounded_product(w1, dhidden[:, None]), 0)
    ds = ds / hw
    last = tl.minimum(part * share + share, hw)
    for start in range(part * share, last, S.BLOCK_HW):
        p = start + tl.arange(0, S.BLOCK_HW)
        mask = (p < last)[:, None] & in_c[None, :]
        at = base + p[:, None] * S.C + c[None, :]
        dx = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * gate[None, :] + ds[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, hidden: int) -> dict:
    channels, hw = x.shape[1], x.shape[2] * x.shape[3]
    block_c = triton.next_power_of_2(channels)
    rows = max(1, _TILE_BYTES // x.element_size() // block_c)
    block_hw, block_r = min(rows, triton.next_power_of_2(hw)), min(rows, triton.next_power_of_2(hidden), 16)
    sizes = _Sizes(channels, hidden, block_hw, block_c, block_r)
    # stated for wide tiles: the assembler would aim at a program more on a processor, and spill
    return dict(S=sizes, **(dict(num_warps=8, maxnreg=80) if block_c >= 256 else dict(num_warps=4)))


def _in_parts(x: Tensor, dy: Tensor | None, sizes: dict) -> tuple[tuple[int, int], Tensor | None, int]:
    """(grid, sums over parts of images, pixels a part) of a pass over x; no sums where a part is an image.

    A launch more pays where images are few and large: each part reads all weights.
    """
    batch, channels, hw = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    parts = min(resident(x.device, 1) // batch, hw * channels * x.element_size() // _PART_BYTES)
    if parts < _LEAST_PARTS:
        return (batch, 1), None, hw
    block = sizes["S"].BLOCK_HW
    share = triton.cdiv(triton.cdiv(hw, parts), block) * block
    grid = (batch, triton.cdiv(hw, share))
    partial = torch.empty(*grid, channels, dtype=torch.float32, device=x.device)
    launch(_parts_kernel, grid, x, dy, partial, hw, share, **sizes)
    return grid, partial, share


@opaque_op("squeeze_excite_fwd")
def _fwd(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, squeeze [B, C], gate [B, C], hidden pre-activation [B, R]); the latter three float32."""
    batch, channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    squeeze = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    gate, hidden = torch.empty_like(squeeze), squeeze.new_empty(batch, weight1.shape[0])
    sizes = _sizes(x, weight1.shape[0])
    grid, partial, share = _in_parts(x, None, sizes)
    weights = GateWeights(weight1, bias1, weight2, bias2)
    arguments = (x, weights, y, squeeze, gate, hidden, partial, height * width, share)
    functions = dict(ACT=ACTIVATIONS[activation].value, GATE=GATES[gate_activation].value)
    launch(_fwd_kernel, grid, *arguments, **functions, **sizes)
    return y, squeeze, gate, hidden


@_fwd.register_fake
def _(x, weight1, bias1, weight2, bias2, activation, gate_activation):
    squeeze = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    hidden = squeeze.new_empty(x.shape[0], weight1.shape[0])
    return torch.empty_like(x, memory_format=torch.channels_last), squeeze, torch.empty_like(squeeze), hidden


@opaque_op("squeeze_excite_bwd")
def _bwd(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    squeeze: Tensor,
    gate: Tensor,
    hidden: Tensor,
    activation: str | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx like x, dW1, db1, dW2, db2 float32)"""
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dgate, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
    weights, hw = GateWeights(weight1, None, weight2, None), x.shape[2] * x.shape[3]
    sizes = _sizes(x, weight1.shape[0])
    grid, partial, share = _in_parts(x, dy, sizes)
    arguments = (dy, x, weights, gate, hidden, dx, dgate, dhidden, partial, hw, share)
    functions = dict(DACT=ACTIVATIONS[activation].backward, DGATE=GATES[gate_activation].backward)
    launch(_bwd_kernel, grid, *arguments, **functions, **sizes)
    return dx, *weight_gradients(dgate, gate, hidden, dhidden, squeeze, activation, gate_activation)


@_bwd.register_fake
def _(dy, x, weight1, weight2, squeeze, gate, hidden, activation, gate_activation):
    channels, width = gate.shape[1], hidden.shape[1]
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        gate.new_empty(width, channels),
        gate.new_empty(width),
        gate.new_empty(channels, width),
        gate.new_empty(channels),
    )


class SqueezeExciteFunction(torch.autograd.Function):
    """Saved for backward: x, both weights, and squeeze, gate, hidden pre-activation (float32, [B, C] and [B, R])."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, *activations):
        y, squeeze, gate, hidden = _fwd(x, weight1, bias1, weight2, bias2, *activations)
        ctx.save_for_backward(x, weight1, weight2, squeeze, gate, hidden)
        ctx.activations, ctx.bias_dtypes = activations, (bias1.dtype, bias2.dtype)
        return y

    @staticmethod
    @differentiable_once("squeeze_excite")
    def backward(ctx, dy):
        x, weight1, weight2, *tables = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        grads = _bwd(dy, x, weight1, weight2, *tables, *ctx.activations)
        dtypes = (x.dtype, weight1.dtype, ctx.bias_dtypes[0], weight2.dtype, ctx.bias_dtypes[1])
        return (
            *(g.to(d) if needed else None for g, d, needed in zip(grads, dtypes, ctx.needs_input_grad)),
            None,
            None,
        )


def _arguments(batch: int, channels: int, height: int, width: int, hidden: int) -> Arguments:
    return {"x": data(batch, channels, height, width), **gate_arguments(channels, hidden)}


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    x = arguments["x"].bytes(itemsize)
    batch, product = arguments["x"].shape[0], 2 * arguments["weight1"].numel
    return {
        # read x, write y; the image is still cached when it is scaled
        "fwd": Cost(2 * x, 2 * batch * product),
        # read dy and x, write dx; dy again from cache
        "bwd": Cost(3 * x, 4 * batch * product),
    }


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("x", *GATE_WEIGHTS),
    options={"activation": "relu"},
    small=[dict(batch=3, channels=20, height=3, width=5, hidden=5)],
    # after hlb's two gated groups, in EfficientNet, and the widest of RegNet's and MobileNetV3's
    further=[
        dict(channels=128, height=15, width=15, hidden=8, activation="gelu"),
        dict(channels=512, height=3, width=3, hidden=32, activation="gelu"),
        dict(channels=1152, height=7, width=7, hidden=48, activation="silu"),
        dict(channels=2000, height=7, width=7, hidden=500),
        dict(channels=960, height=7, width=7, hidden=240, gate_activation="hardsigmoid"),
        # few and large images
        dict(batch=2, channels=40, height=61, width=60, hidden=10, activation="silu"),
    ],
)
def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: str | None = "relu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """x * sigmoid(act(mean(x) W1^T + b1) W2^T + b2), the mean over H and W, or another gate than the sigmoid.

    x: [B, C, H, W] float32, float16 or bfloat16, channels_last.
    weight1, bias1: [R, C] (or [R, C, 1, 1]) and [R]; weight2, bias2: [C, R] (or [C, R, 1, 1]) and [C]; floating,
        of any strides.
    activation: a key of `reference.ACTIVATIONS`; gate_activation: a key of `reference.GATES`; the defaults are those of
        torchvision.ops.SqueezeExcitation.
    Returns y like x, channels_last. Arithmetic is float32, rounded once at the end.

    Backward: dgate = sum over H, W of dy x; through the gate as in `se_gate` to ds; dx = dy gate + ds / (H W).
    Saved: x, weights, squeeze, gate, hidden. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape, layout or activation or an empty batch; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "squeeze_excite"
    _checks.activation(op, activation)
    _checks.gate_activation(op, gate_activation)
    _checks.images(op, "x", x, _checks.FLOATS)
    weights = check_gate_weights(op, x.shape[1], weight1, bias1, weight2, bias2)
    _checks.device(op, x, *weights)
    return SqueezeExciteFunction.apply(x, *weights, activation, gate_activation)
