"""What each part of a training step must at least compute and move: FLOPs and bytes by (part, pass)."""

from math import prod

from blink.kernels.examine.cases import Case, recorded_calls
from blink.kernels.registry import OPS, Argument, Cost
from blink.training.recipes import Recipe

Costs = dict[tuple[str, str], Cost]


def _convolution(x: Argument, weight: Argument, itemsize: int) -> dict[str, Cost]:
    """Each pass reads two of x, y and the weight and writes the third."""
    batch, _, *size = x.shape
    positions, (channels_out, channels_in, *_) = batch * prod(size), weight.shape
    tensors = positions * (channels_in + channels_out) + weight.numel
    cost = Cost(tensors * itemsize, 2 * positions * weight.numel)
    return {"fwd": cost, "dgrad": cost, "wgrad": cost}


def _linear(x: Argument, weight: Argument, itemsize: int) -> dict[str, Cost]:
    features, product = x.bytes(itemsize), 2 * x.shape[0] * weight.numel
    return {"fwd": Cost(features, product), "bwd": Cost(2 * features, 2 * product)}


# what is no op of the package
_COUNTS = {"conv3x3": _convolution, "linear": _linear}


def step_costs(recipe: Recipe, batch: int, classes: int, image_shape: tuple[int, int, int], itemsize: int) -> Costs:
    """Of one step that trains everything, in activations of itemsize bytes, by the calls that it makes. Part names are
    those that `instrument` gives the regions.

    Bytes of an op are those of an ideal fused one, which its file counts, whatever the backend; without triton, which
    these files need, ops are not counted. Nor is a stem of several calls, of which none stands for the whole.
    """
    out: Costs = {}
    for call in recorded_calls(recipe, batch, classes, image_shape, whole=True):
        if call.op in _COUNTS:
            cost = _COUNTS[call.op](call.arguments["x"], call.arguments["weight"], itemsize)
        elif call.op in OPS and (call.part != "stem" or recipe.network.fused_stem):
            cost = Case(call.op, call.arguments, call.options).cost(itemsize)
        else:
            continue
        for passed, more in cost.items():
            before = out.get((call.part, passed), Cost(0))
            out[call.part, passed] = Cost(before.bytes + more.bytes, before.flops + more.flops)
    return out
