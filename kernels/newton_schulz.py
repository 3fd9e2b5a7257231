"""Orthogonalization of matrices by Newton-Schulz iteration, all matrices in a dozen launches.

    X = G / (|G|_F + eps)      per step: A = X X^T,  B = b A + c A A,  X = a X + B X

Source: Muon, Jordan et al. 2024. Computed in Gram form, for which see `_gram_iteration`.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import _checks, _options, launching
from ._gram_iteration import Batch
from ._multi_tensor import FloatList, TensorList, check_list, groups, kind
from .launching import opaque_op
from .registry import Arguments, Cost, data, op


@opaque_op("newton_schulz")
def _orthogonalize(
    matrices: TensorList, steps: int, coefficients: FloatList, eps: float, dtype: torch.dtype
) -> TensorList:
    outs = [torch.empty_like(matrix) for matrix in matrices]
    for indices in groups([(*kind(m), m.shape[0] > m.shape[1]) for m in matrices]):
        batch = Batch([tuple(matrices[i].shape) for i in indices], matrices[0].device, eps, dtype)
        batch.gather(tuple(matrices[i] for i in indices))
        batch.store(tuple(outs[i] for i in indices), batch.iterate(steps, coefficients))
    return outs


@_orthogonalize.register_fake
def _(matrices, steps, coefficients, eps, dtype):
    return [torch.empty_like(matrix) for matrix in matrices]


def check_iteration(
    op: str, steps: int, coefficients: Sequence[float], eps: float, dtype: torch.dtype, device: torch.device
) -> None:
    _options.iteration(op, steps, coefficients, eps)
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, float16 or bfloat16, found {str(dtype).removeprefix('torch.')}")
    if dtype == torch.bfloat16 and device.type != "cuda" and not launching.capturing():
        raise RuntimeError(f"{op}: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")


def iteration_flops(matrices: list[tuple[int, ...]], steps: int) -> int:
    """Of the Gram form, whose products but the last are symmetric, half of a product each."""
    total = 0
    for rows, *others in matrices:
        m, k = sorted((rows, prod(others)))
        # X X^T and Q X; the first step makes P, PR, PRP, each further one PQ too, the last neither PR nor PRP
        total += m * m * k + 2 * m * m * k + (4 * steps - 3) * m**3
    return total


def _arguments(shapes: list[tuple[int, ...]]) -> Arguments:
    return {"matrices": [data(shape[0], prod(shape[1:])) for shape in shapes]}


def _cost(arguments: Arguments, options: dict, itemsize: int) -> dict[str, Cost]:
    matrices = arguments["matrices"]
    flops = iteration_flops([m.shape for m in matrices], options["steps"])
    # read for the norm, for R = X X^T and for Q X, write Q X
    return {"fwd": Cost(4 * sum(m.bytes(itemsize) for m in matrices), flops)}


@op(
    arguments=_arguments,
    cost=_cost,
    options={"steps": 3},
    small=[dict(shapes=[(12, 3, 3, 3), (7, 5)])],
    # the filters of airbench94_muon
    further=[dict(shapes=[(64, 216), (64, 576), (256, 576), *[(256, 2304)] * 3])],
)
def newton_schulz(
    matrices: list[Tensor],
    *,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """Each matrix with its singular values moved towards 1: U V^T, nearly, of a matrix U S V^T.

    matrices: [m, k] float32, float16 or bfloat16, contiguous; those with m > k are worked on as their transposes.
    steps, coefficients: of the iteration X <- (aI + bA + cA^2) X with A = X X^T from X = G / (|G|_F + eps). The
    coefficients must keep singular values of at most 1 bounded, as these do.
    dtype: in which X enters the two products with it, the sums being float32. float16 by default: X is scaled to a root
    mean square of 1, which it holds for every input, and its errors are an eighth of bfloat16's. float32 is exact to
    float32 and does without tensor cores.
    Returns matrices of the given ones' shapes and dtypes. A matrix of zeros stays one. Everything but the products with
    X is float32, or as good (22 bits). Deterministic. Not differentiable: the result never requires a gradient.

    Raises ValueError for no matrices, a wrong shape or layout or impossible options; TypeError for a wrong type or
    dtype; RuntimeError where the kernels cannot run.
    """
    op = "newton_schulz"
    check_list(op, "matrices", matrices)
    if not matrices:
        raise ValueError(f"{op}: matrices is empty; expected at least one matrix")
    for i, matrix in enumerate(matrices):
        _checks.tensor(op, f"matrices[{i}]", matrix)
        _checks.dtype(op, f"matrices[{i}]", matrix, _checks.FLOATS)
        if matrix.dim() != 2 or matrix.numel() == 0:
            raise ValueError(f"{op}: matrices[{i}] must be [m, k] and not empty, found {list(matrix.shape)}")
        if not matrix.is_contiguous():
            raise ValueError(f"{op}: matrices[{i}] must be contiguous, found strides {list(matrix.stride())}")
    check_iteration(op, steps, coefficients, eps, dtype, matrices[0].device)
    _checks.device(op, *matrices)
    return _orthogonalize([m.detach() for m in matrices], steps, [float(c) for c in coefficients], float(eps), dtype)
