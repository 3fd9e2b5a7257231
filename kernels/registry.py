"""What is known of an op beside its kernels, said once, by the decorator of its public function.

Tests, the benchmark, the compile report and the profile's counts work from it; a call of an op does not. Bytes are what
an ideal fused op must move to and from memory: each large tensor once for every pass that a dependency forces; vectors
of a value per channel are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch


class Argument(NamedTuple):
    """A tensor that an op takes. dtype None: that of the activations, whichever it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def bytes(self, itemsize: int) -> int:
        """Where activations have so many bytes a value."""
        return self.numel * (itemsize if self.dtype is None else self.dtype.itemsize)


# tensors, lists of them and None by name; those of a `Gather` are called gather.index, gather.translation and so on
Arguments = dict[str, Argument | list[Argument] | None]


def data(*shape: int) -> Argument:
    """In the dtype of the activations."""
    return Argument(shape)


def fp32(*shape: int) -> Argument:
    return Argument(shape, torch.float32)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations (a multiply-add is two), of the matrix products only."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Op:
    """One op.

    differentiable: the arguments that get a gradient; updates: those that a call updates in place.
    arguments(batch, channels, ...): the arguments of a call at these sizes, in the order of the signature, and options
        that follow from the sizes. Sizes without a default are called batch, height, width, channels, hidden, classes,
        or, of an op on a list of tensors, shapes: what a benchmark at given sizes fills in.
    cost(arguments, options, itemsize): "fwd" and, of a differentiable op, "bwd", where activations have itemsize bytes.
    options: those of a call that does not state them; small: sizes of cheap calls that together use all of the op;
    further: sizes that must work and that no recipe has, for any batch if they state none.
    """

    function: Callable
    arguments: Callable[..., dict]
    cost: Callable[[Arguments, dict, int], dict[str, Cost]]
    differentiable: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    small: Sequence[dict] = ()
    further: Sequence[dict] = ()


OPS: dict[str, Op] = {}


def op(**known) -> Callable:
    """Registers the function that it decorates, and leaves it as it is; `known`: the fields of `Op`."""

    def register(function: Callable) -> Callable:
        OPS[function.__name__] = Op(function, **known)
        return function

    return register
