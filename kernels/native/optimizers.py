"""The updates of lists of tensors, compiled: `sgd_nesterov` and `muon`; and `newton_schulz`, its products PyTorch's."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _options, reference
from . import _takes
from .library import Library, load


def _dense(x: Tensor) -> bool:
    """Whether x fills one piece of memory, whose first dimension is the slowest."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _library(
    params: list[Tensor], grads: list[Tensor | None], buffers: list[Tensor], lr: Tensor, dtype: torch.dtype
) -> Library | None:
    """The compiled updates if they take these lists."""
    alike = len(params) == len(grads) == len(buffers) > 0 and _takes.plain_call() and _takes.plain(lr)
    if not alike or lr.numel() not in (1, len(params)) or dtype not in _takes.FLOATS:
        return None
    for p, g, b in zip(params, grads, buffers):
        float32 = all(_takes.plain(t) and t.dtype == torch.float32 for t in (p, b))
        if not float32 or not _dense(p) or b.shape != p.shape or b.stride() != p.stride():
            return None
        if g is not None and not (_takes.plain(g) and g.shape == p.shape and g.is_floating_point()):
            return None
    return load("optimizers", None, dtype)


def _as_laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """grad in float32 and in param's memory layout."""
    grad = grad.detach()
    if grad.dtype == torch.float32 and grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, requires_grad=False).copy_(grad)


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def sgd_nesterov(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> None:
    """One step of torch.optim.SGD(nesterov=True): see `kernels.sgd_nesterov`. Compiled for float32 parameters."""
    library = _library(params, grads, momentum_buffers, lr, torch.float32)
    if library is None:
        options = dict(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        return reference.sgd_nesterov(params, grads, momentum_buffers, lr, **options)
    _options.update("sgd_nesterov", momentum, weight_decay)
    rates = lr.reshape(-1).expand(len(params)).tolist()
    entries = zip(params, grads, momentum_buffers, rates)
    given = [(p, _as_laid_out(g, p), b, rate) for p, g, b, rate in entries if g is not None]
    if given:
        p, g, b, rate = map(list, zip(*given))
        sizes = (ctypes.c_int64 * len(p))(*(t.numel() for t in p))
        library.sgd_step(
            _pointers(p), _pointers(g), _pointers(b), sizes, (ctypes.c_float * len(rate))(*rate), len(p),
            float(momentum), float(weight_decay), nesterov, torch.get_num_threads(),
        )  # fmt: skip


def _iterated(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """x [m, k] of norm 1 after the steps, in its dtype and contiguous."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        # a, b and c multiply sums that are not rounded yet
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).contiguous()


def newton_schulz(
    matrices: list[Tensor],
    *,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """The standard iteration, every product in `dtype`, sums fused into the products: see `kernels.newton_schulz`."""
    taken = dtype in _takes.FLOATS and _takes.plain_call() and _takes.plain(*matrices)
    if not taken or any(m.dtype == torch.float64 or m.numel() == 0 for m in matrices):
        return reference.newton_schulz(matrices, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)
    _options.iteration("newton_schulz", steps, coefficients, eps)
    results = []
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        for matrix in matrices:
            x = matrix.detach().float()
            results.append(_iterated((x / (x.norm() + eps)).to(dtype), steps, coefficients).to(matrix.dtype))
    return results


def muon(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    renormalize: bool = True,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
    nesterov: bool = True,
    averaged: bool = False,
    shape_factor: str | None = None,
) -> None:
    """One Muon step: see `kernels.muon`. Compiled for float32 parameters and `dtype` float32 or bfloat16.

    A matrix's columns are taken in the order of memory: the orthogonalization commutes with permutations of columns.
    """
    library = _library(params, grads, momentum_buffers, lr, dtype)
    if library is None or any(p.dim() < 2 or p.numel() == 0 for p in params):
        return reference.muon(
            params, grads, momentum_buffers, lr, momentum=momentum, weight_decay=weight_decay, renormalize=renormalize,
            steps=steps, coefficients=coefficients, eps=eps, dtype=dtype, nesterov=nesterov, averaged=averaged,
            shape_factor=shape_factor,
        )  # fmt: skip
    _options.update("muon", momentum, weight_decay)
    _options.iteration("muon", steps, coefficients, eps)
    _options.shape_factor("muon", shape_factor)
    rates, threads = lr.reshape(-1).expand(len(params)).tolist(), torch.get_num_threads()
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        for p, grad, buffer, rate in zip(params, grads, momentum_buffers, rates):
            if grad is None:
                continue
            rows, size = len(p), p.numel()
            g, x = torch.empty(size), torch.empty(rows, size // rows, dtype=dtype)
            share = 1 - momentum if averaged else 1.0
            options = (float(momentum), float(share), float(eps), nesterov, threads)
            library.muon_momentum(_as_laid_out(grad, p), buffer, g, x, size, *options)
            update = _iterated(x, steps, coefficients)
            norm = rows**0.5 if renormalize else 0.0
            adjusted = rate * reference._shape_factor(rows, size // rows, shape_factor)
            library.muon_update(p, update, size, norm, 1 - rate * weight_decay, adjusted, threads)
