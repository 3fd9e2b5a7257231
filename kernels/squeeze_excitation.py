"""Squeeze-and-excitation as an nn.Module over `squeeze_excite`, and what puts it into a model that has such blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import say_once, squeeze_excite


class Layers(NamedTuple):
    """The names of a block's layers, in the order of the computation."""

    reduce: str
    activation: str
    expand: str
    gate: str


TORCHVISION = Layers("fc1", "activation", "fc2", "scale_activation")
_TIMM = Layers("conv_reduce", "act1", "conv_expand", "gate")
_TIMM_MODULE = Layers("fc1", "act", "fc2", "gate")
# known by name, so that neither library is imported
_BLOCKS = {
    "torchvision.ops.misc.SqueezeExcitation": TORCHVISION,
    "timm.models._efficientnet_blocks.SqueezeExcite": _TIMM,
    "timm.layers.squeeze_excite.SEModule": _TIMM_MODULE,
}

# what modules compute, by the kernels' name of it
ACTIVATION_MODULES = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "torch.nn.modules.linear.Identity": None,
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.HardSwish": "hardswish",
}
GATE_MODULES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hardsigmoid",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hardsigmoid",
}
_BY_NAME = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}
UNKNOWN = "unknown"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def computed_by(layer: Callable, table: dict[str, str | None]) -> str | None:
    """The kernels' name of what an activation or gate computes, from one of the tables above, or UNKNOWN."""
    # GELU's approximation by tanh is another function
    exact = getattr(layer, "approximate", "none") == "none"
    return table.get(_name_of(type(layer)), UNKNOWN) if exact else UNKNOWN


def _made(name: str, factory, table: dict[str, str | None]) -> Callable:
    """The layer that a constructor's argument stands for: a class, a function of no arguments, or a kernels' name."""
    expected = f"SqueezeExcite: {name} must be a class or a function that makes a module"
    if factory is None or isinstance(factory, str):
        if factory not in table.values():
            known = ", ".join(sorted({str(value) for value in table.values()}))
            raise ValueError(f"SqueezeExcite: unknown {name} {factory!r}; expected one of {known}, or a class")
        return _BY_NAME[factory]()
    if isinstance(factory, nn.Module):
        raise TypeError(f"{expected}, found the module {factory}; pass its class or a functools.partial of it")
    if not callable(factory):
        raise TypeError(f"{expected}, found {factory!r}")
    try:
        layer = factory()
    except TypeError as error:
        raise TypeError(f"{expected} without arguments: {error}") from error
    if not callable(layer):
        raise TypeError(f"{expected}; {factory!r} gave {layer!r}")
    if computed_by(layer, table) is UNKNOWN:
        say_once(f"SqueezeExcite: {name} {layer} is in no kernel; such a layer runs in plain PyTorch")
    return layer


@torch.fx.wrap
def excited(x: Tensor, *weights: Tensor, **options) -> Tensor:
    """squeeze_excite as one node of an fx graph, whatever it does to its tensors."""
    return squeeze_excite(x, *weights, **options)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): a drop-in for torchvision.ops.SqueezeExcitation, with its arguments,
    parameter names, state_dict and results, in one launch forward and two backward.

        s = mean of x over H, W      y = x * scale_activation(fc2(activation(fc1(s))))

    input_channels, squeeze_channels: C and R; fc1 is a 1x1 convolution C -> R, fc2 one R -> C, both with biases.
    activation, scale_activation: what makes each: a class, or a function without arguments (a functools.partial);
        also a key of `reference.ACTIVATIONS` or of `reference.GATES`. In the kernels are nn.ReLU, nn.SiLU, nn.GELU,
        nn.Hardswish and nn.Identity, and for scale_activation nn.Sigmoid and nn.Hardsigmoid. With any other the layer
        runs in plain PyTorch, which a warning says once.
    differentiable_twice: run in plain PyTorch, where the gradient has a gradient too.

    x: [B, C, H, W] or [C, H, W] floating, B may be 0; the result is like x, in channels_last memory if x is. On a GPU
    x is best in channels_last memory; it is copied at each call where it is not, which a warning says once.

    A state_dict does not say which activation and gate it was trained with: as for torchvision's, state them here.
    Hooks on the layers inside are not called. Raises TypeError or ValueError for a wrong argument; `squeeze_excite`
    says what a call raises and saves.
    """

    # of classes, so that a block that becomes one of this class needs none of its own
    layers = TORCHVISION
    differentiable_twice = False

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] | str | None = nn.ReLU,
        scale_activation: Callable[..., nn.Module] | str = nn.Sigmoid,
        *,
        differentiable_twice: bool = False,
    ):
        super().__init__()
        for name, value in (("input_channels", input_channels), ("squeeze_channels", squeeze_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SqueezeExcite: {name} must be an integer of at least 1, found {value!r}")
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = _made("activation", activation, ACTIVATION_MODULES)
        self.scale_activation = _made("scale_activation", scale_activation, GATE_MODULES)
        self.differentiable_twice = differentiable_twice

    def forward(self, x: Tensor) -> Tensor:
        reduce, activation, expand, gate = (getattr(self, name) for name in self.layers)
        act, gate_activation = computed_by(activation, ACTIVATION_MODULES), computed_by(gate, GATE_MODULES)
        if UNKNOWN in (act, gate_activation):
            return x * gate(expand(activation(reduce(x.mean((-2, -1), keepdim=True)))))
        weights = (reduce.weight, reduce.bias, expand.weight, expand.bias)
        options = {"activation": act, "gate_activation": gate_activation}
        return excited(x, *weights, **options, differentiable_twice=self.differentiable_twice)


class Replacement(NamedTuple):
    """What `replace_squeeze_excitation` did, by the names of `model.named_modules()`."""

    replaced: list[str]
    left: dict[str, str]


def replace_squeeze_excitation(
    model: nn.Module, also: Mapping[type[nn.Module], Sequence[str]] | None = None
) -> Replacement:
    """Make every squeeze-and-excitation block of torchvision or timm in `model` a `SqueezeExcite`, in place.

    A block stays the object that it was, with its layers, parameters, hooks, mode, device, dtype and names: only its
    class changes, and with it what its forward computes with. state_dict keys stay as they are, both ways.

    also: further classes of blocks that compute x * gate(expand(activation(reduce(mean of x over H, W)))), each with
        the names of those four layers, in the order (reduce, activation, expand, gate).
    Returns (names of the replaced blocks, {name of a block that was left: why}). A block is left where it computes
    something else, has no kernel for its activation or gate, or holds what the kernels would pass by: hooks on its
    layers, layers of other types.

    Raises TypeError where model is no module or `also` no such mapping.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_squeeze_excitation: model must be a module, found {type(model).__name__}")
    known = dict(_BLOCKS)
    for kind, names in (also or {}).items():
        if not isinstance(kind, type) or isinstance(names, str) or len(names) != len(Layers._fields):
            raise TypeError(
                "replace_squeeze_excitation: also must map a class to the names of its four layers, "
                f"{', '.join(Layers._fields)}; found {kind!r}: {names!r}"
            )
        known[_name_of(kind)] = Layers(*names)
    result = Replacement([], {})
    for name, block in model.named_modules():
        kinds = [_name_of(kind) for kind in type(block).__mro__]
        layers = next((known[kind] for kind in kinds if kind in known), None)
        if layers is None or isinstance(block, SqueezeExcite):
            continue
        reason = None if kinds[0] in known else f"{kinds[0]} may compute something else than its base class"
        reason = reason or _obstacle(block, layers)
        if reason:
            result.left[name] = reason
            continue
        block.__class__ = SqueezeExcite
        block.layers = layers
        result.replaced.append(name)
    return result


def _obstacle(block: nn.Module, layers: Layers) -> str | None:
    """Why this block cannot become a `SqueezeExcite`."""
    if "forward" in vars(block):
        return "its forward is replaced"
    for name in layers:
        if not callable(getattr(block, name, None)):
            return f"it has no layer {name}"
    reduce, activation, expand, gate = (getattr(block, name) for name in layers)
    for name, layer in ((layers.reduce, reduce), (layers.expand, expand)):
        if type(layer) is not nn.Conv2d:
            return f"{name} is a {type(layer).__name__}, not a Conv2d"
        if (layer.kernel_size, layer.stride, layer.padding, layer.groups) != ((1, 1), (1, 1), (0, 0), 1):
            return f"{name} is not a plain 1x1 convolution"
        if layer.bias is None:
            return f"{name} has no bias"
    # timm's two additions
    if getattr(block, "add_maxpool", False):
        return "it also takes the maximum over H and W"
    if not isinstance(getattr(block, "bn", None), nn.Identity | None):
        return "it normalizes in between"
    for name, child in block.named_children():
        if any(getattr(child, hooks) for hooks in _HOOKS):
            return f"there are hooks on {name}, which would not be called"
    for layer, table in ((activation, ACTIVATION_MODULES), (gate, GATE_MODULES)):
        if computed_by(layer, table) is UNKNOWN:
            return f"no kernel has {layer}"
    return None
