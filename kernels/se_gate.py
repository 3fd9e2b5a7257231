"""The squeeze-and-excite gate, fused: Linear -> activation -> Linear -> sigmoid or hardsigmoid, on the squeezed [B, C].

    hidden = s W1^T + b1          gate = sigmoid(act(hidden) W2^T + b2)

One launch forward and three backward (the input's gradient, then the weights', of parts of the batch, then their sum),
where eager PyTorch takes about five and nine: at [512, 512] the arithmetic is nothing and the launches are everything.
Matrix products are of four images a program, in registers: tiles large enough to be read seldom from shared memory
would make too few programs. The gate stays float32, because gate (1 - gate), which its gradient needs, is lost in 16
bits from a logit of about 8 on. Sources: Hu et al. 2018; reduction 16 and GELU, hlb-CIFAR10; hardsigmoid, Howard et al.
2019 (MobileNetV3).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks
from ._common import add_product, block_of
from ._gate_weights import GATE_WEIGHTS, GateWeights, check_gate_weights, empty_gradients, gate_arguments
from .activations import ACTIVATIONS, GATES
from .differentiation import differentiable_once
from .launching import launch, opaque_op, resident
from .registry import Arguments, Cost, fp32, op

# a program's images, where there are enough, and what it holds of a weight matrix at a time: more would spill registers
_BLOCK_B = 4
_BLOCK_R = 32
_TILE = 2048
_WEIGHT_BLOCK_B = 16
_WEIGHT_BLOCK_C = 64
_SUM_BLOCK = 512
# what the compile report would otherwise report as accesses that are narrower than the layout allows
_NARROW = "64-lane waves share tiles that are sized for 32-lane warps"
NARROW_ACCESS = {"_fwd_kernel:gfx942": _NARROW, "_bwd_kernel:gfx942": _NARROW}


@triton.jit
def _load_matrix(ptr, row, column, in_row, in_column, COLUMNS: tl.constexpr):
    """float32 [rows, columns] of a matrix with COLUMNS columns; 0 outside."""
    at = row[:, None] * COLUMNS + column[None, :]
    return tl.load(ptr + at, mask=in_row[:, None] & in_column[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_transposed(ptr, row, column, in_row, in_column, COLUMNS: tl.constexpr):
    """The same as [columns, rows]."""
    at = row[None, :] * COLUMNS + column[:, None]
    return tl.load(ptr + at, mask=in_row[None, :] & in_column[:, None], other=0.0).to(tl.float32)


@triton.jit
def _load_dlogit(dgate_ptr, gate_ptr, b, c, in_b, in_c, C: tl.constexpr, DGATE: tl.constexpr):
    """The gradient of what the gate is made of."""
    gate = _load_matrix(gate_ptr, b, c, in_b, in_c, C)
    return DGATE(_load_matrix(dgate_ptr, b, c, in_b, in_c, C), gate)


class _Sizes(NamedTuple):
    C: int
    R: int
    BLOCK_B: int
    BLOCK_C: int
    BLOCK_R: int


@triton.jit
def _fwd_kernel(
    squeeze_ptr, layers, gate_ptr, hidden_ptr, activated_ptr, batch, S: tl.constexpr, ACT: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_B images; stores the hidden pre-activation, what is activated of it, and the gate."""
    b = tl.program_id(0) * S.BLOCK_B + tl.arange(0, S.BLOCK_B)
    in_b = b < batch
    for first in range(0, S.R, S.BLOCK_R):
        r = first + tl.arange(0, S.BLOCK_R)
        in_r = r < S.R
        products = tl.zeros([S.BLOCK_B, S.BLOCK_C, S.BLOCK_R], dtype=tl.float32)
        for start in range(0, S.C, S.BLOCK_C):
            c = start + tl.arange(0, S.BLOCK_C)
            in_c = c < S.C
            s = _load_matrix(squeeze_ptr, b, c, in_b, in_c, S.C)
            w1 = _load_transposed(layers.w1, r, c, in_r, in_c, S.C)
            products = tl.fma(s[:, :, None], w1[None, :, :], products)
        hidden = tl.sum(products, 1) + tl.load(layers.b1 + r, mask=in_r, other=0.0).to(tl.float32)[None, :]
        at, mask = b[:, None] * S.R + r[None, :], in_b[:, None] & in_r[None, :]
        tl.store(hidden_ptr + at, hidden, mask=mask)
        # once: in the loop below every warp would activate all of them
        tl.store(activated_ptr + at, ACT(hidden), mask=mask)
    # the hidden units are read back by other warps than wrote them
    tl.debug_barrier()
    for start in range(0, S.C, S.BLOCK_C):
        c = start + tl.arange(0, S.BLOCK_C)
        in_c = c < S.C
        products = tl.zeros([S.BLOCK_B, S.BLOCK_R, S.BLOCK_C], dtype=tl.float32)
        for first in range(0, S.R, S.BLOCK_R):
            r = first + tl.arange(0, S.BLOCK_R)
            in_r = r < S.R
            h = _load_matrix(activated_ptr, b, r, in_b, in_r, S.R)
            w2 = _load_transposed(layers.w2, c, r, in_c, in_r, S.R)
            products = tl.fma(h[:, :, None], w2[None, :, :], products)
        logit = tl.sum(products, 1) + tl.load(layers.b2 + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        tl.store(gate_ptr + b[:, None] * S.C + c[None, :], GATE(logit), mask=in_b[:, None] & in_c[None, :])


@triton.jit
def _bwd_kernel(
    dgate_ptr, gate_ptr, hidden_ptr, layers, dsqueeze_ptr, dhidden_ptr, batch, S: tl.constexpr, DACT: tl.constexpr,
    DGATE: tl.constexpr,
):  # fmt: skip
    """dhidden = (dlogit W2) act'(hidden) and dsqueeze = dhidden W1, dlogit from dgate and gate."""
    b = tl.program_id(0) * S.BLOCK_B + tl.arange(0, S.BLOCK_B)
    in_b = b < batch
    for first in range(0, S.R, S.BLOCK_R):
        r = first + tl.arange(0, S.BLOCK_R)
        in_r = r < S.R
        products = tl.zeros([S.BLOCK_B, S.BLOCK_C, S.BLOCK_R], dtype=tl.float32)
        for start in range(0, S.C, S.BLOCK_C):
            c = start + tl.arange(0, S.BLOCK_C)
            in_c = c < S.C
            dlogit = _load_dlogit(dgate_ptr, gate_ptr, b, c, in_b, in_c, S.C, DGATE)
            w2 = _load_matrix(layers.w2, c, r, in_c, in_r, S.R)
            products = tl.fma(dlogit[:, :, None], w2[None, :, :], products)
        dh = DACT(tl.sum(products, 1), _load_matrix(hidden_ptr, b, r, in_b, in_r, S.R))
        tl.store(dhidden_ptr + b[:, None] * S.R + r[None, :], dh, mask=in_b[:, None] & in_r[None, :])
    # as in the forward pass
    tl.debug_barrier()
    for start in range(0, S.C, S.BLOCK_C):
        c = start + tl.arange(0, S.BLOCK_C)
        in_c = c < S.C
        products = tl.zeros([S.BLOCK_B, S.BLOCK_R, S.BLOCK_C], dtype=tl.float32)
        for first in range(0, S.R, S.BLOCK_R):
            r = first + tl.arange(0, S.BLOCK_R)
            in_r = r < S.R
            dh = _load_matrix(dhidden_ptr, b, r, in_b, in_r, S.R)
            w1 = _load_matrix(layers.w1, r, c, in_r, in_c, S.C)
            products = tl.fma(dh[:, :, None], w1[None, :, :], products)
        ds = tl.sum(products, 1)
        tl.store(dsqueeze_ptr + b[:, None] * S.C + c[None, :], ds, mask=in_b[:, None] & in_c[None, :])


@triton.jit
def _weight_grad_kernel(
    dgate_ptr, gate_ptr, hidden_ptr, dhidden_ptr, squeeze_ptr, partials, batch, share, S: tl.constexpr,
    ACT: tl.constexpr, DGATE: tl.constexpr,
):  # fmt: skip
    """dW2 = dlogit^T act(hidden), dW1 = dhidden^T s: a tile of each a program, over `share` images in order."""
    c = tl.program_id(0) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    r = tl.program_id(1) * S.BLOCK_R + tl.arange(0, S.BLOCK_R)
    in_c, in_r = c < S.C, r < S.R
    dw1 = tl.zeros([S.BLOCK_R, S.BLOCK_C], dtype=tl.float32)
    dw2 = tl.zeros([S.BLOCK_C, S.BLOCK_R], dtype=tl.float32)
    db1 = tl.zeros([S.BLOCK_R], dtype=tl.float32)
    db2 = tl.zeros([S.BLOCK_C], dtype=tl.float32)
    part = tl.program_id(2)
    for start in range(part * share, tl.minimum(part * share + share, batch), S.BLOCK_B):
        b = start + tl.arange(0, S.BLOCK_B)
        in_b = b < batch
        dlogit = _load_dlogit(dgate_ptr, gate_ptr, b, c, in_b, in_c, S.C, DGATE)
        h = ACT(_load_matrix(hidden_ptr, b, r, in_b, in_r, S.R))
        dhidden = _load_matrix(dhidden_ptr, b, r, in_b, in_r, S.R)
        s = _load_matrix(squeeze_ptr, b, c, in_b, in_c, S.C)
        dw2 = add_product(dw2, tl.trans(dlogit), h)
        dw1 = add_product(dw1, tl.trans(dhidden), s)
        db1 += tl.sum(dhidden, 0)
        db2 += tl.sum(dlogit, 0)
    matrix = part.to(tl.int64) * (S.R * S.C)
    tl.store(partials.w1 + matrix + r[:, None] * S.C + c[None, :], dw1, mask=in_r[:, None] & in_c[None, :])
    tl.store(partials.w2 + matrix + c[:, None] * S.R + r[None, :], dw2, mask=in_c[:, None] & in_r[None, :])
    # programs that share hidden units or channels have the same sums of them; one stores each
    if tl.program_id(0) == 0:
        tl.store(partials.b1 + part * S.R + r, db1, mask=in_r)
    if tl.program_id(1) == 0:
        tl.store(partials.b2 + part * S.C + c, db2, mask=in_c)


@triton.jit
def _sum_entries(partial_ptr, out_ptr, first, parts, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of out [SIZE] from `first` on, of partial sums [parts, SIZE] in their order."""
    at = first + tl.arange(0, BLOCK)
    mask = (at >= 0) & (at < SIZE)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + tl.cast(part, tl.int64) * SIZE + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, total, mask=mask)


@triton.jit
def _sum_weight_grads_kernel(partials, grads, parts, C: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients from those of the batch's parts: a block of one of them a program, matrices first."""
    of_matrix: tl.constexpr = (R * C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < of_matrix:
        _sum_entries(partials.w1, grads.w1, program * BLOCK, parts, R * C, BLOCK)
    elif program < 2 * of_matrix:
        _sum_entries(partials.w2, grads.w2, (program - of_matrix) * BLOCK, parts, R * C, BLOCK)
    else:
        first = (program - 2 * of_matrix) * BLOCK
        _sum_entries(partials.b1, grads.b1, first, parts, R, BLOCK)
        _sum_entries(partials.b2, grads.b2, first, parts, C, BLOCK)


def _rows(batch: int, channels: int, hidden: int, device: torch.device) -> tuple[tuple[int], _Sizes]:
    """(grid, sizes) of the kernels of which a program owns BLOCK_B images."""
    block_b = _BLOCK_B
    while block_b > 1 and 4 * triton.cdiv(batch, block_b) < 3 * resident(device, 1):
        block_b //= 2
    block_r = block_of(hidden, _BLOCK_R)
    sizes = _Sizes(channels, hidden, block_b, block_of(channels, _TILE // block_r), block_r)
    return (triton.cdiv(batch, block_b),), sizes


def weight_gradients(
    dgate: Tensor,
    gate: Tensor,
    hidden: Tensor,
    dhidden: Tensor,
    squeeze: Tensor,
    activation: str | None,
    gate_activation: str,
) -> GateWeights:
    """(dW1 [R, C], db1 [R], dW2 [C, R], db2 [C]), float32. All arguments float32: [B, C] or [B, R]."""
    batch, channels = gate.shape
    width = hidden.shape[1]
    blocks = (max(16, block_of(size, most)) for size, most in ((channels, _WEIGHT_BLOCK_C), (width, _BLOCK_R)))
    sizes = _Sizes(channels, width, _WEIGHT_BLOCK_B, *blocks)
    tiles = (triton.cdiv(channels, sizes.BLOCK_C), triton.cdiv(width, sizes.BLOCK_R))
    # as many parts of the batch as make programs for all processors, if there are blocks of images for them
    blocks_of_images = triton.cdiv(batch, sizes.BLOCK_B)
    share = triton.cdiv(blocks_of_images, max(1, resident(gate.device, 1) // (tiles[0] * tiles[1]))) * sizes.BLOCK_B
    parts = triton.cdiv(batch, share)
    partials = empty_gradients(gate, channels, width, parts)
    arguments = (dgate, gate, hidden, dhidden, squeeze, partials, batch, share)
    functions = dict(ACT=ACTIVATIONS[activation].value, DGATE=GATES[gate_activation].backward)
    launch(_weight_grad_kernel, (*tiles, parts), *arguments, S=sizes, **functions, maxnreg=255)
    if parts == 1:
        return GateWeights(*(partial[0] for partial in partials))
    grads = GateWeights(*(partial[0] for partial in empty_gradients(gate, channels, width, 1)))
    programs = 2 * triton.cdiv(channels * width, _SUM_BLOCK) + triton.cdiv(max(channels, width), _SUM_BLOCK)
    launch(
        _sum_weight_grads_kernel,
        (programs,),
        partials,
        grads,
        parts,
        C=channels,
        R=width,
        BLOCK=_SUM_BLOCK,
        num_warps=2,
    )
    return grads


@opaque_op("se_gate_fwd")
def _fwd(
    squeeze: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor]:
    """(gate [B, C], hidden pre-activation [B, R]), float32."""
    batch, channels = squeeze.shape
    width = weight1.shape[0]
    gate, hidden = torch.empty_like(squeeze), squeeze.new_empty(batch, width)
    grid, sizes = _rows(batch, channels, width, gate.device)
    weights = GateWeights(weight1, bias1, weight2, bias2)
    functions = dict(ACT=ACTIVATIONS[activation].value, GATE=GATES[gate_activation].value)
    arguments = (squeeze, weights, gate, hidden, torch.empty_like(hidden), batch)
    launch(_fwd_kernel, grid, *arguments, S=sizes, **functions, maxnreg=255)
    return gate, hidden


@_fwd.register_fake
def _(squeeze, weight1, bias1, weight2, bias2, activation, gate_activation):
    return torch.empty_like(squeeze), squeeze.new_empty(squeeze.shape[0], weight1.shape[0])


@opaque_op("se_gate_bwd")
def _bwd(
    dgate: Tensor,
    gate: Tensor,
    hidden: Tensor,
    squeeze: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str | None,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dsqueeze [B, C], dW1, db1, dW2, db2), float32."""
    batch, channels = gate.shape
    width = hidden.shape[1]
    dsqueeze, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
    grid, sizes = _rows(batch, channels, width, gate.device)
    arguments = (dgate, gate, hidden, GateWeights(weight1, None, weight2, None), dsqueeze, dhidden, batch)
    functions = dict(DACT=ACTIVATIONS[activation].backward, DGATE=GATES[gate_activation].backward)
    launch(_bwd_kernel, grid, *arguments, S=sizes, **functions, maxnreg=255)
    return dsqueeze, *weight_gradients(dgate, gate, hidden, dhidden, squeeze, activation, gate_activation)


@_bwd.register_fake
def _(dgate, gate, hidden, squeeze, weight1, weight2, activation, gate_activation):
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
    def forward(ctx, squeeze, weight1, bias1, weight2, bias2, *activations):
        gate, hidden = _fwd(squeeze, weight1, bias1, weight2, bias2, *activations)
        ctx.save_for_backward(squeeze, gate, hidden, weight1, weight2)
        ctx.activations, ctx.bias_dtypes = activations, (bias1.dtype, bias2.dtype)
        return gate

    @staticmethod
    @differentiable_once("se_gate")
    def backward(ctx, dgate):
        squeeze, gate, hidden, weight1, weight2 = ctx.saved_tensors
        grads = _bwd(dgate.contiguous(), gate, hidden, squeeze, weight1, weight2, *ctx.activations)
        dtypes = (squeeze.dtype, weight1.dtype, ctx.bias_dtypes[0], weight2.dtype, ctx.bias_dtypes[1])
        return (
            *(g.to(d) if needed else None for g, d, needed in zip(grads, dtypes, ctx.needs_input_grad)),
            None,
            None,
        )


def _arguments(batch: int, channels: int, hidden: int) -> Arguments:
    return {"squeeze": fp32(batch, channels), **gate_arguments(channels, hidden)}


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    (batch, channels), hidden = arguments["squeeze"].shape, arguments["weight1"].shape[0]
    table, narrow = 4 * batch * channels, 4 * batch * hidden  # float32 [B, C] and [B, R]
    weights = 2 * channels * hidden
    read_write = 3 * table + 2 * narrow
    product = 2 * batch * channels * hidden
    return {
        # read squeeze and both weights, write gate and hidden
        "fwd": Cost(2 * table + narrow + weights * itemsize, 2 * product),
        # read dgate, gate, hidden, weights, write dsqueeze and dhidden; then, for the weights' gradients, read
        # dgate, gate, squeeze, hidden, dhidden and write both gradients in float32
        "bwd": Cost(read_write + weights * itemsize + read_write + 4 * weights, 4 * product),
    }


@op(
    arguments=_arguments,
    cost=_cost,
    differentiable=("squeeze", *GATE_WEIGHTS),
    options={"activation": "gelu"},
    small=[dict(batch=3, channels=20, hidden=5)],
    # as wide as hlb's with reduction 4, and the widest of RegNet's and MobileNetV3's
    further=[
        dict(channels=512, hidden=128),
        dict(channels=2000, hidden=500),
        dict(channels=960, hidden=240, activation="relu", gate_activation="hardsigmoid"),
    ],
)
def se_gate(
    squeeze: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: str | None = "gelu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """sigmoid(act(squeeze W1^T + b1) W2^T + b2), or another gate than the sigmoid.

    squeeze: [B, C] floating, of any strides: per-image channel means.
    weight1, bias1: [R, C] (or [R, C, 1, 1]) and [R]; weight2, bias2: [C, R] (or [C, R, 1, 1]) and [C]; floating,
        of any strides.
    activation: a key of `reference.ACTIVATIONS`; gate_activation: a key of `reference.GATES`.
    Returns the gate [B, C] float32. Arithmetic is float32 throughout.

    With dlogit = dgate gate (1 - gate) (hardsigmoid: dgate / 6 where 0 < gate < 1) and h = act(hidden), backward is
        dW2 = dlogit^T h     db2 = sum dlogit     dhidden = (dlogit W2) act'(hidden)
        dW1 = dhidden^T s    db1 = sum dhidden    dsqueeze = dhidden W1
    Saved: squeeze, gate, hidden, both weights. Deterministic. Differentiable once.

    Raises ValueError for a wrong shape or activation or an empty batch; TypeError for a wrong type or dtype;
    RuntimeError where the kernels cannot run.
    """
    op = "se_gate"
    _checks.activation(op, activation)
    _checks.gate_activation(op, gate_activation)
    _checks.tensor(op, "squeeze", squeeze)
    if squeeze.dim() != 2 or squeeze.numel() == 0:
        raise ValueError(f"{op}: squeeze must be [B, C] and not empty, found {list(squeeze.shape)}")
    _checks.dtype(op, "squeeze", squeeze, _checks.FLOATS)
    weights = check_gate_weights(op, squeeze.shape[1], weight1, bias1, weight2, bias2)
    _checks.device(op, squeeze, *weights)
    return SEGate.apply(squeeze.float().contiguous(), *weights, activation, gate_activation)
