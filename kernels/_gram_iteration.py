"""The Newton-Schulz iteration of many matrices at once, in Gram form, shared by `newton_schulz` and `muon`.

The standard iteration X <- (aI + bA + cA^2) X with A = X X^T multiplies by X, [m, k], in every step. As X only ever
gains factors that are polynomials in A, it can as well run on m x m matrices:

    R = X X^T      per step: P = aI + bR + cR^2,  Q = PQ,  R = PRP      at the end: X <- Q X

where every product is symmetric: the tiles on and above the diagonal are computed and mirrored. X enters the two
products with it in `dtype`, scaled to a root mean square of 1, which float16 holds for every input. The m x m matrices
are pairs of float16 (22 bits), multiplied on tensor cores (three products), because float32 products do without tensor
cores; only where `dtype` is float32 are they these. Both are converted once, by what makes them, so that what
multiplies them loads them as they go into the tensor cores. Rounding makes R drift away from X X^T, by most where
singular values are small, so X is formed anew every _STEPS_A_GRAM steps (for float32 every step, which is the standard
iteration).

Matrices of all shapes share each launch. They are zero-padded to whole tiles in a float32 workspace: zero rows and
columns of X stay zero, and a padded P or Q is only ever multiplied with those.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gram_kernels import (
    CHUNK,
    GATHERED_ROWS,
    PAD,
    PRODUCT_COLS,
    SLICE,
    _finish_kernel,
    _gather_kernel,
    _gram_kernel,
    _product_kernel,
    _sum_chunks_kernel,
)
from ._multi_tensor import running_sums
from .launching import launch, tensor_cores

_STEPS_A_GRAM = 3
Tensors = tuple[Tensor, ...]
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Batch:
    """Matrices [rows, cols], all with rows <= cols or all with rows > cols, and where each lies in the workspace."""

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device, eps: float, dtype: torch.dtype):
        self._eps = eps
        # float32 is for accuracy: the standard iteration, whose products do without tensor cores and take registers
        self._full = dtype == torch.float32
        self._steps_a_gram = 1 if self._full else _STEPS_A_GRAM
        rows, cols = zip(*shapes)
        pad = PAD.value
        # of the products with X: large tiles read it less often, where tensor cores leave the registers to sums
        self._large = not self._full and tensor_cores(device)
        tile = 2 * pad if self._large else pad
        self._m = tuple(triton.cdiv(min(shape), pad) * pad for shape in shapes)
        self._k = tuple(triton.cdiv(max(shape), tile) * tile for shape in shapes)
        self._x_sizes = [m * k for m, k in zip(self._m, self._k)]
        high = [triton.cdiv(m, tile) for m in self._m]
        upper = [n * (n + 1) // 2 for n in high]
        parts = [n * triton.cdiv(k, CHUNK.value) for n, k in zip(upper, self._k)]
        small = [m // pad * (m // pad + 1) // 2 * (pad // PRODUCT_COLS.value) for m in self._m]
        sums = tuple(size // (GATHERED_ROWS.value * pad) for size in self._x_sizes)
        self._programs = {
            _gather_kernel: running_sums(sums),
            _gram_kernel: running_sums(parts),
            _sum_chunks_kernel: running_sums(upper),
            _product_kernel: running_sums(small),
            _finish_kernel: running_sums([m // pad * (k // tile) for m, k in zip(self._m, self._k)]),
        }
        x_at, x_size = running_sums(self._x_sizes)
        r_at, self._r_size = running_sums([m * m * (1 if self._full else 2) for m in self._m])
        n_at, n_size = running_sums(sums)
        partial_at, partial_size = running_sums([n * tile**2 for n in parts])
        self._slices = (tile // SLICE.value) ** 2 // 2
        self._layout = dict(
            ROWS=rows, COLS=cols, TRANSPOSED=rows[0] > cols[0], SIZES=tuple(a * b for a, b in shapes), M=self._m,
            K=self._k, X_AT=x_at, R_AT=r_at, PARTIAL_AT=partial_at, N=sums, N_AT=n_at, DTYPE=_DTYPES[dtype],
            SPLIT=not self._full, TILE=tile, LR_AT=(0,), NESTEROV=True, AVERAGED=False, FACTOR=None,
        )  # fmt: skip
        self._x, self._partial, self._x_sums, self._p_sums = (
            torch.empty(size, dtype=torch.float32, device=device) for size in (x_size, partial_size, n_size, n_size)
        )
        self._operand = torch.empty(x_size, dtype=dtype, device=device)

    def gather(
        self,
        matrices: Tensors,
        buffers: Tensors | None = None,
        params: Tensors | None = None,
        momentum: float = 0.0,
        **kinds: bool,
    ) -> None:
        """Fill the workspace; from gradients, if there are momentum buffers of the given kinds (NESTEROV, AVERAGED).
        params: sum their squares too.
        """
        arguments = (matrices, buffers, params, self._x, self._x_sums, self._p_sums, momentum)
        self._launch(_gather_kernel, *arguments, **kinds)

    def iterate(self, steps: int, coefficients: Sequence[float]) -> Tensor:
        """The Q that is left to be multiplied with X."""
        while steps > self._steps_a_gram:
            q = self._polynomial(self._gram(), self._steps_a_gram, coefficients)
            x = torch.empty_like(self._x)
            self._finish(x.split(self._x_sizes), q, ROWS=self._m, COLS=self._k, TRANSPOSED=False)
            # what X was has been divided by its norm
            self._x, self._x_sums = x, None
            steps -= self._steps_a_gram
        return self._polynomial(self._gram(), steps, coefficients)

    def store(self, outs: Tensors, q: Tensor) -> None:
        """outs = Q X."""
        self._finish(outs, q)

    def update(
        self,
        params: Tensors,
        q: Tensor,
        lr: Tensor,
        lr_at: tuple[int, ...],
        weight_decay: float,
        renormalize: bool,
        shape_factor: str | None,
    ) -> None:
        """params = params * shrink - lr * factor * Q X, each weight's rate being lr[lr_at]."""
        sums = self._p_sums if renormalize else None
        self._finish(params, q, sums, lr, weight_decay, LR_AT=lr_at, FACTOR=shape_factor)

    def _gram(self) -> Tensor:
        arguments = (self._x, self._x_sums, self._operand, self._partial, self._eps)
        self._launch(_gram_kernel, *arguments, BLOCK_K=32, num_warps=4 if self._full else 8)
        r = self._x.new_empty(self._r_size, dtype=torch.float32 if self._full else torch.float16)
        self._launch(_sum_chunks_kernel, self._partial, r, copies=self._slices, num_warps=2)
        return r

    def _polynomial(self, r: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
        """The product of `steps` steps' P, as the product with X takes it."""
        q = None
        for _ in range(steps - 1):
            (p,) = self._multiply([(r, r)], coefficients)
            products = self._multiply([(p, r)] if q is None else [(p, q), (p, r)])
            q = p if q is None else products[0]
            (r,) = self._multiply([(products[-1], p)])
        (p,) = self._multiply([(r, r)], coefficients, last=q is None)
        return p if q is None else self._multiply([(p, q)], last=True)[0]

    def _multiply(
        self, pairs: list[tuple[Tensor, Tensor]], polynomial: Sequence[float] | None = None, last: bool = False
    ) -> list[Tensor]:
        """Each pair's product, or the polynomial of a pair that is one matrix twice; last: for the product with X."""
        lefts, rights = zip(*pairs)
        outs = [torch.empty_like(left, dtype=self._operand.dtype if last else None) for left in lefts]
        arguments = (lefts, rights, tuple(outs), *map(float, polynomial or (0, 0, 1)))
        sizes = dict(POLYNOMIAL=polynomial is not None, UNIT=1.0 if last else 2048.0, BLOCK_K=32 if self._full else 64)
        # stated for where there are no tensor cores
        self._launch(_product_kernel, *arguments, copies=len(pairs), maxnreg=255, **sizes)
        return outs

    def _finish(
        self,
        outs: Sequence[Tensor],
        q: Tensor,
        p_sums: Tensor | None = None,
        lr: Tensor | None = None,
        weight_decay: float = 0.0,
        **constexprs,
    ) -> None:
        arguments = (tuple(outs), q, self._operand, p_sums, lr, weight_decay)
        options = dict(BLOCK_K=16 if self._full else 32, num_warps=4 if self._full or self._large else 8)
        if self._large:
            # or the assembler aims at a program more on a processor, and spills
            options["maxnreg"] = 168
        self._launch(_finish_kernel, *arguments, **options, **constexprs)

    def _launch(self, kernel, *arguments, copies: int = 1, **constexprs) -> None:
        """With what the kernel takes of the layout, and a program for each of its tiles, `copies` times."""
        first, programs = self._programs[kernel]
        layout = {name: value for name, value in self._layout.items() if name in kernel.arg_names}
        launch(kernel, (programs, copies), *arguments, **{**layout, **constexprs, "FIRST": first})
