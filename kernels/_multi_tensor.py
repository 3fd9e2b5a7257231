"""Many tensors in one launch: their pointers are kernel parameters, so that a CUDA graph needs no table in memory.

A kernel takes tuples of pointers and constexpr tuples of their sizes, finds out which tensor a program works on, and
selects. Tensors are flat memory: the entries of one list may have any dense layout, the same across lists.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import List  # noqa: UP035

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, _options
from .registry import Argument, Arguments, fp32

# in an operator's signature: older torch infers no schema from list[Tensor]
TensorList = List[Tensor]  # noqa: UP006
FloatList = List[float]  # noqa: UP006
IntList = List[int]  # noqa: UP006

# tensors of one list that a launch takes: three lists of as many pointers stay far below 4 KiB of kernel parameters
_MOST = 16


@triton.jit
def select(pointers, index):
    """pointers[index] of a tuple of pointers to one dtype."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        if index == i:
            chosen = pointers[i]
    return chosen


@triton.jit
def select_int(VALUES: tl.constexpr, index):
    """VALUES[index] of a constexpr tuple, as int64; what divides all of them the compiler knows to divide it."""
    chosen = tl.cast(VALUES[0], tl.int64)
    for i in tl.static_range(1, len(VALUES)):
        if index == i:
            chosen = tl.cast(VALUES[i], tl.int64)
    return chosen


@triton.jit
def owner_of(program, FIRST: tl.constexpr):
    """Which tensor a program works on, where tensor i's programs begin at FIRST[i]."""
    index = tl.cast(0, tl.int32)
    for i in tl.static_range(1, len(FIRST)):
        index += (program >= FIRST[i]).to(tl.int32)
    return index


def groups(keys: Sequence[Hashable]) -> Iterator[list[int]]:
    """Indices of equal keys in order, as many as a launch takes at a time."""
    by_key: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        by_key.setdefault(key, []).append(index)
    for indices in by_key.values():
        for start in range(0, len(indices), _MOST):
            yield indices[start : start + _MOST]


def kind(*tensors: Tensor) -> tuple:
    """What the tensors of one launch have in common: each one's dtype, and whether all can be moved 16 bytes at once.

    A launch with one unaligned pointer would move all of its tensors in small pieces.
    """
    return (*(t.dtype for t in tensors), all(t.data_ptr() % 16 == 0 for t in tensors))


def rates_at(lr: Tensor, positions: Sequence[int], indices: Sequence[int]) -> tuple[int, ...]:
    """Where in `lr`, of one element or of one for each position, the rates of the tensors at these indices are."""
    return tuple(positions[i] if lr.numel() > 1 else 0 for i in indices)


def running_sums(counts: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(where each entry begins, the total)"""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return tuple(starts), total


def layout_of(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 for dimensions of one element, whose stride means nothing."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride()))


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride()) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_list(op: str, name: str, values: Sequence[Tensor]) -> None:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{op}: {name} must be a list of tensors, found {type(values).__name__}")


def check_updates(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, list[int]]:
    """What an optimizer op requires of its lists and numbers.

    Returns parameters, gradients and buffers where there is a gradient, lr, and the parameters' positions in the list;
    gradients in their parameter's layout. Nothing is detached: under torch.compile that would hide from the operator
    that two share memory.
    """
    _options.update(op, momentum, weight_decay)
    for name, values in (("params", params), ("grads", grads), ("momentum_buffers", momentum_buffers)):
        check_list(op, name, values)
        if len(values) != len(params):
            raise ValueError(f"{op}: {name} must be as many as params, {len(params)}, found {len(values)}")
    if not params:
        raise ValueError(f"{op}: params is empty; expected at least one tensor")
    if not isinstance(lr, Tensor):
        raise TypeError(
            f"{op}: lr must be a float32 tensor on the parameters' device, of one element or one for each, found {lr!r}"
        )
    _checks.dtype(op, "lr", lr, (torch.float32,))
    if lr.numel() != 1 and lr.shape != (len(params),):
        raise ValueError(f"{op}: lr must have one element, or one for each of {len(params)}, found {list(lr.shape)}")
    if not is_dense(lr):
        raise ValueError(f"{op}: lr must be dense memory, found strides {list(lr.stride())}")
    for i, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers)):
        _checks.tensor(op, f"params[{i}]", param)
        if param.numel() == 0:
            raise ValueError(f"{op}: params[{i}] is empty: {list(param.shape)}")
        _checks.dtype(op, f"params[{i}]", param, _checks.FLOATS)
        _checks.not_negated(op, f"params[{i}]", param)
        if not is_dense(param):
            raise ValueError(f"{op}: params[{i}] must be dense memory, found strides {list(param.stride())}")
        dtypes = tuple(dict.fromkeys((param.dtype, torch.float32)))
        if grad is not None:
            _checks.matches(op, f"grads[{i}]", grad, param.shape, dtypes)
        _checks.matches(op, f"momentum_buffers[{i}]", buffer, param.shape, dtypes)
        _checks.not_negated(op, f"momentum_buffers[{i}]", buffer)
        if layout_of(buffer) != layout_of(param):
            raise ValueError(
                f"{op}: momentum_buffers[{i}] must have the layout of params[{i}], strides {list(param.stride())}, "
                f"found {list(buffer.stride())}"
            )
    _checks.device(op, *params, *grads, *momentum_buffers, lr)
    positions = [i for i, grad in enumerate(grads) if grad is not None]
    with torch.no_grad():
        aligned = [like_layout(grads[i], params[i]) for i in positions]
    return [params[i] for i in positions], aligned, [momentum_buffers[i] for i in positions], lr, positions


def check_separate(
    op: str, positions: list[int], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: Tensor
) -> None:
    """No two tensors that a step updates share memory, nor one of them with what it reads: programs run at once."""

    def named(name: str, values: list[Tensor]) -> dict[str, Tensor]:
        return {f"{name}[{i}]": value for i, value in zip(positions, values)}

    updated = named("params", params) | named("momentum_buffers", buffers)
    _checks.separate(op, updated, named("grads", grads) | {"lr": lr})


def like_layout(x: Tensor, model: Tensor) -> Tensor:
    """x, copied if its memory is not laid out as the dense `model`'s."""
    if layout_of(x) == layout_of(model):
        return x
    return torch.empty_like(model, dtype=x.dtype, requires_grad=False).copy_(x)


def update_arguments(
    shapes: list[tuple[int, ...]], buffer_dtype: torch.dtype | None = None, rates: bool = False
) -> Arguments:
    """Vectors in float32 and everything else in the activations' dtype, as a network has them; buffer_dtype: of the
    other momentum buffers; rates: a learning rate for each tensor.
    """

    def arguments(dtype: torch.dtype | None = None) -> list[Argument]:
        return [Argument(tuple(shape), dtype if len(shape) > 1 else torch.float32) for shape in shapes]

    lr = fp32(len(shapes) if rates else 1)
    return {"params": arguments(), "grads": arguments(), "momentum_buffers": arguments(buffer_dtype), "lr": lr}
