"""The kernels of the Newton-Schulz iteration in Gram form, for which see `_gram_iteration`.

A matrix for a product with m x m matrices is, where it is split, two planes, high and low, of 16 bits: an element is
high + low / 2048 with both float16 (22 bits, down to 2^-35 of the unit that these matrices are scaled to), and for the
product with X, high + low in X's dtype.
"""

import triton
import triton.language as tl

from ._common import add_product, rounded_product
from ._multi_tensor import owner_of, select, select_int

PAD = tl.constexpr(64)  # a multiple of which matrices are padded to
GATHERED_ROWS = tl.constexpr(32)  # of a tile of the first pass
PRODUCT_COLS = tl.constexpr(32)  # of a tile of the products of m x m matrices
SLICE = tl.constexpr(16)  # rows, and twice as many columns, of a tile of the sum over chunks
CHUNK = tl.constexpr(256)  # columns of X that one program of R = X X^T sums over


@triton.jit
def _upper_tile(index):
    """(i, j) with i <= j of the index-th tile on or above the diagonal, counted column by column."""
    j = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # a root that was rounded
    j += (index >= (j + 1) * (j + 2) // 2).to(tl.int32)
    j -= (index < j * (j + 1) // 2).to(tl.int32)
    return index - j * (j + 1) // 2, j


@triton.jit
def _place(FIRST: tl.constexpr):
    """(matrix, which of its programs this is), where matrix i's programs begin at FIRST[i]."""
    program = tl.program_id(0)
    matrix = owner_of(program, FIRST)
    return matrix, program - select_int(FIRST, matrix).to(tl.int32)


@triton.jit
def _upper_tiles(m, TILE: tl.constexpr):
    """How many tiles of an m x m matrix are on or above the diagonal."""
    side = (m + TILE - 1) // TILE
    return side * (side + 1) // 2


@triton.jit
def _sum_of(values, count):
    """The sum of count float32 values, in a fixed order."""
    lane = tl.arange(0, 256)
    total = tl.zeros([256], dtype=tl.float32)
    for start in range(0, count, 256):
        total += tl.load(values + start + lane, mask=start + lane < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _scale_to_unit_rms(sums_ptr, matrix, eps, SIZES: tl.constexpr, N: tl.constexpr, N_AT: tl.constexpr):
    """What X is multiplied by as an operand: sqrt(m k), over the Frobenius norm unless that is divided out already."""
    # not sqrt_rn and div_rn, whose slow paths are calls and cost registers
    root = tl.sqrt(select_int(SIZES, matrix).to(tl.float32))
    if sums_ptr is not None:
        norm = tl.sqrt(_sum_of(sums_ptr + select_int(N_AT, matrix), select_int(N, matrix).to(tl.int32)))
        return root / (norm + eps)
    return root


@triton.jit
def _gather_kernel(
    matrix_ptrs, buffer_ptrs, param_ptrs, x_ptr, x_sums_ptr, p_sums_ptr, momentum,
    ROWS: tl.constexpr, COLS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, X_AT: tl.constexpr, N_AT: tl.constexpr,
    TRANSPOSED: tl.constexpr, NESTEROV: tl.constexpr, AVERAGED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Each matrix [ROWS, COLS] into the workspace, [M, K] float32, and a sum of squares a tile; of params too.

    With buffers, matrices are gradients, AVERAGED or summed in the momentum, and what goes on is the momentum or, if
    NESTEROV, the next one by the same gradient.
    """
    matrix, tile = _place(FIRST)
    m, k = select_int(M, matrix).to(tl.int32), select_int(K, matrix).to(tl.int32)
    # a transposed matrix has the long side first
    wide = k
    if TRANSPOSED:
        wide = m
    row = tile // (wide // PAD) * GATHERED_ROWS + tl.arange(0, GATHERED_ROWS)
    col = tile % (wide // PAD) * PAD + tl.arange(0, PAD)
    cols = select_int(COLS, matrix)
    mask = (row < select_int(ROWS, matrix))[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    g = tl.load(select(matrix_ptrs, matrix) + at, mask=mask, other=0.0).to(tl.float32)
    if buffer_ptrs is not None:
        buffer_ptr = select(buffer_ptrs, matrix)
        if AVERAGED:
            g *= 1.0 - momentum
        buffer = momentum * tl.load(buffer_ptr + at, mask=mask, other=0.0).to(tl.float32) + g
        tl.store(buffer_ptr + at, buffer.to(buffer_ptr.dtype.element_ty), mask=mask)
        if NESTEROV:
            g += momentum * buffer
        else:
            g = buffer
    sum_at = select_int(N_AT, matrix) + tile
    tl.store(x_sums_ptr + sum_at, tl.sum(tl.sum(rounded_product(g, g), 1), 0))
    if param_ptrs is not None:
        p = tl.load(select(param_ptrs, matrix) + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_sums_ptr + sum_at, tl.sum(tl.sum(rounded_product(p, p), 1), 0))
    x = x_ptr + select_int(X_AT, matrix)
    if TRANSPOSED:
        tl.store(x + tl.cast(col, tl.int64)[:, None] * k + row[None, :], tl.trans(g))
    else:
        tl.store(x + tl.cast(row, tl.int64)[:, None] * k + col[None, :], g)


@triton.jit
def _multiplied(acc, left, right, DTYPE: tl.constexpr):
    """acc + left right."""
    if tl.float32 == DTYPE:
        acc = add_product(acc, left, right)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _gram_kernel(
    x_ptr, x_sums_ptr, operand_ptr, partial_ptr, eps,
    SIZES: tl.constexpr, M: tl.constexpr, K: tl.constexpr, X_AT: tl.constexpr, N: tl.constexpr, N_AT: tl.constexpr,
    PARTIAL_AT: tl.constexpr, FIRST: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of m k X X^T / |X|^2 on and above the diagonal, each summed over a chunk of columns.

    Those on the diagonal leave the scaled X that was multiplied, in DTYPE, to the other product with it.
    """
    matrix, part = _place(FIRST)
    m, k = select_int(M, matrix).to(tl.int32), select_int(K, matrix).to(tl.int32)
    tiles = _upper_tiles(m, TILE)
    chunk, tile = part // tiles, part % tiles
    i, j = _upper_tile(tile)
    scale = _scale_to_unit_rms(x_sums_ptr, matrix, eps, SIZES, N, N_AT)
    lane = tl.arange(0, TILE)
    row, other = (i * TILE + lane)[:, None], (j * TILE + lane)[:, None]
    x = x_ptr + select_int(X_AT, matrix)
    left, right = x + tl.cast(row, tl.int64) * k, x + tl.cast(other, tl.int64) * k
    first, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, k)
    acc = tl.zeros([TILE, TILE], dtype=tl.float32)
    if i == j:
        operand = operand_ptr + select_int(X_AT, matrix) + tl.cast(row, tl.int64) * k
        for start in range(first, end, BLOCK_K):
            col = start + tl.arange(0, BLOCK_K)[None, :]
            a = (tl.load(left + col, mask=row < m, other=0.0) * scale).to(DTYPE)
            tl.store(operand + col, a, mask=row < m)
            acc = _multiplied(acc, a, tl.trans(a), DTYPE)
    else:
        for start in range(first, end, BLOCK_K):
            col = start + tl.arange(0, BLOCK_K)[None, :]
            a = (tl.load(left + col, mask=row < m, other=0.0) * scale).to(DTYPE)
            b = (tl.load(right + col, mask=other < m, other=0.0) * scale).to(DTYPE)
            acc = _multiplied(acc, a, tl.trans(b), DTYPE)
    partial = partial_ptr + select_int(PARTIAL_AT, matrix) + tl.cast(part, tl.int64) * (TILE * TILE)
    tl.store(partial + lane[:, None] * TILE + lane[None, :], acc)


@triton.jit
def _sum_chunks_kernel(
    partial_ptr, r_ptr,
    SIZES: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R_AT: tl.constexpr, PARTIAL_AT: tl.constexpr,
    FIRST: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """R = X X^T / |X|^2, whole and symmetric, from the sums over chunks in their order."""
    matrix, tile = _place(FIRST)
    m, k = select_int(M, matrix).to(tl.int32), select_int(K, matrix).to(tl.int32)
    tiles = _upper_tiles(m, TILE)
    i, j = _upper_tile(tile)
    inner = tl.program_id(1) % (TILE // SLICE) * SLICE + tl.arange(0, SLICE)
    lane = tl.program_id(1) // (TILE // SLICE) * (2 * SLICE) + tl.arange(0, 2 * SLICE)
    partial = partial_ptr + select_int(PARTIAL_AT, matrix) + tl.cast(tile, tl.int64) * (TILE * TILE)
    at = inner[:, None] * TILE + lane[None, :]
    acc = tl.zeros([SLICE, 2 * SLICE], dtype=tl.float32)
    for chunk in range((k + CHUNK - 1) // CHUNK):
        acc += tl.load(partial + tl.cast(chunk * tiles, tl.int64) * (TILE * TILE) + at)
    acc = acc * (1.0 / select_int(SIZES, matrix).to(tl.float32))
    r = r_ptr + select_int(R_AT, matrix)
    row, col = i * TILE + inner, j * TILE + lane
    _store_symmetric(r, acc, row, col, m, i != j, 2048.0, SPLIT)


@triton.jit
def _split(x, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """x = high + low / UNIT."""
    high = x.to(DTYPE)
    return high, ((x - high.to(tl.float32)) * UNIT).to(DTYPE)


@triton.jit
def _store_symmetric(out, value, row, col, m, mirrored, UNIT: tl.constexpr, SPLIT: tl.constexpr):
    """value into the rows and columns of an m x m matrix inside of it; if mirrored, into its columns and rows too."""
    at = row[:, None] * m + col[None, :]
    mask = (row < m)[:, None] & (col < m)[None, :]
    across = col[:, None] * m + row[None, :]
    mask_across = (col < m)[:, None] & (row < m)[None, :]
    if SPLIT:
        high, low = _split(value, UNIT, out.dtype.element_ty)
        tl.store(out + at, high, mask=mask)
        tl.store(out + m * m + at, low, mask=mask)
        if mirrored:
            tl.store(out + across, tl.trans(high), mask=mask_across)
            tl.store(out + m * m + across, tl.trans(low), mask=mask_across)
    else:
        tl.store(out + at, value, mask=mask)
        if mirrored:
            tl.store(out + across, tl.trans(value), mask=mask_across)


@triton.jit
def _product_kernel(
    left_ptrs, right_ptrs, out_ptrs, a, b, c,
    M: tl.constexpr, R_AT: tl.constexpr, FIRST: tl.constexpr, POLYNOMIAL: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = left right, or aI + b left + c left right, of commuting symmetric matrices, so symmetric itself.

    Tiles of PAD rows and PRODUCT_COLS columns; those in the squares on the diagonal are not mirrored.
    """
    matrix, tile = _place(FIRST)
    which = tl.program_id(1)
    m = select_int(M, matrix).to(tl.int32)
    i, j = _upper_tile(tile // (PAD // PRODUCT_COLS))
    first = select_int(R_AT, matrix)
    left = select(left_ptrs, which) + first
    right, out = select(right_ptrs, which) + first, select(out_ptrs, which) + first
    row = i * PAD + tl.arange(0, PAD)
    col = j * PAD + tile % (PAD // PRODUCT_COLS) * PRODUCT_COLS + tl.arange(0, PRODUCT_COLS)
    main = tl.zeros([PAD, PRODUCT_COLS], dtype=tl.float32)
    rest = tl.zeros([PAD, PRODUCT_COLS], dtype=tl.float32)
    for start in range(0, m, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        of_left = row[:, None] * m + inner[None, :]
        l = tl.load(left + of_left)
        if SPLIT:
            # a symmetric matrix' rows are its columns, and longer pieces of memory
            of_right = col[:, None] * m + inner[None, :]
            r = tl.trans(tl.load(right + of_right))
            main = tl.dot(l, r, main)
            rest = tl.dot(l, tl.trans(tl.load(right + m * m + of_right)), rest)
            rest = tl.dot(tl.load(left + m * m + of_left), r, rest)
        else:
            main = add_product(main, l, tl.load(right + inner[:, None] * m + col[None, :]))
    value = main + rest * (1.0 / 2048.0)
    if POLYNOMIAL:
        at = row[:, None] * m + col[None, :]
        own = tl.load(left + at).to(tl.float32)
        if SPLIT:
            own += tl.load(left + m * m + at).to(tl.float32) * (1.0 / 2048.0)
        value = b * own + c * value
        value += tl.where(row[:, None] == col[None, :], a, 0.0)
    _store_symmetric(out, value, row, col, m, i != j, UNIT, SPLIT)


@triton.jit
def _shape_factor(rows, cols, KIND: tl.constexpr):
    """What a rate is multiplied by for a matrix of this shape: see `muon`."""
    m, k = rows.to(tl.float32), cols.to(tl.float32)
    if KIND == "match_rms_adamw":
        factor = 0.2 * tl.sqrt(tl.maximum(m, k))
    else:
        factor = tl.sqrt(m / k)
        if KIND == "original":
            factor = tl.maximum(factor, 1.0)
    return factor


@triton.jit
def _finish_kernel(
    out_ptrs, q_ptr, operand_ptr, p_sums_ptr, lr_ptr, weight_decay,
    ROWS: tl.constexpr, COLS: tl.constexpr, SIZES: tl.constexpr, M: tl.constexpr, K: tl.constexpr, X_AT: tl.constexpr,
    R_AT: tl.constexpr, N: tl.constexpr, N_AT: tl.constexpr, FIRST: tl.constexpr, TRANSPOSED: tl.constexpr,
    LR_AT: tl.constexpr, DTYPE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """U = Q X, stored as each out [ROWS, COLS]. With a learning rate outs are weights, which become
    weights * shrink - lr * factor * U, the factor being what FACTOR names, renormalized where their sums of squares
    are given.
    """
    matrix, tile = _place(FIRST)
    m, k = select_int(M, matrix).to(tl.int32), select_int(K, matrix).to(tl.int32)
    across = k // TILE
    row, col = tile // across * PAD + tl.arange(0, PAD), tile % across * TILE + tl.arange(0, TILE)
    left = q_ptr + select_int(R_AT, matrix) + row[:, None] * m
    right = operand_ptr + select_int(X_AT, matrix) + col[None, :]
    u = tl.zeros([PAD, TILE], dtype=tl.float32)
    for start in range(0, m, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(right + tl.cast(inner, tl.int64)[:, None] * k)
        u = _multiplied(u, tl.load(left + inner[None, :]), x, DTYPE)
        if SPLIT:
            # where X has low rank, large elements of Q cancel, and with them must not go their lower bits
            u = tl.dot(tl.load(left + m * m + inner[None, :]), x, u)
    u = u * (1.0 / tl.sqrt(select_int(SIZES, matrix).to(tl.float32)))
    if TRANSPOSED:
        u = tl.trans(u)
        row, col = col, row
    rows, cols = select_int(ROWS, matrix), select_int(COLS, matrix)
    out_ptr = select(out_ptrs, matrix)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    if lr_ptr is not None:
        lr = tl.load(lr_ptr + select_int(LR_AT, matrix))
        shrink = 1.0 - lr * weight_decay
        if p_sums_ptr is not None:
            norm = tl.sqrt(_sum_of(p_sums_ptr + select_int(N_AT, matrix), select_int(N, matrix).to(tl.int32)))
            # a weight of zeros has no norm to set
            norm = tl.where(norm == 0, 1.0, norm)
            shrink *= tl.sqrt(rows.to(tl.float32)) / norm
        if FACTOR is not None:
            lr *= _shape_factor(rows, cols, FACTOR)
        p = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        u = shrink * p - lr * u
    tl.store(out_ptr + at, u.to(out_ptr.dtype.element_ty), mask=mask)
