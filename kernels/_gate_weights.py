"""The two linear layers of a gate: their tensors, checks of them, and memory for their gradients."""

from typing import NamedTuple

from torch import Tensor

from . import _checks
from .registry import Arguments, data


class GateWeights(NamedTuple):
    """w1 [R, C], b1 [R], w2 [C, R], b2 [C]; or their gradients."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


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


GATE_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")


def gate_arguments(channels: int, hidden: int) -> Arguments:
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    return {name: data(*shape) for name, shape in zip(GATE_WEIGHTS, shapes)}


def empty_gradients(gate: Tensor, channels: int, width: int, parts: int) -> GateWeights:
    """Of each of the batch's parts."""
    shapes = ((width, channels), (width,), (channels, width), (channels,))
    return GateWeights(*(gate.new_empty(parts, *shape) for shape in shapes))
