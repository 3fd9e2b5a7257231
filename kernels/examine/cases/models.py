"""What models of torchvision call, recorded from the models themselves, without data and on no device: their
squeeze-and-excite blocks, and optimizers on their parameters.
"""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from blink.optional import needed

from ... import reference
from ...optimizers import split_parameters
from ...registry import OPS
from ...squeeze_excitation import excited, replace_squeeze_excitation
from .recorded import COMPUTE, Call, described

_IMAGE = (3, 224, 224)
# of torchvision's training of ResNet-50
_SGD = {"momentum": 0.9, "weight_decay": 1e-4}
# of torch.optim.Muon, and of Muon here
_MUON = {"momentum": 0.95, "weight_decay": 0.1, "renormalize": False, "steps": 5, "averaged": True}
_MUON |= {"shape_factor": "original"}


class _Blocks(torch.fx.Interpreter):
    """Runs a traced model and notes the call of every squeeze-and-excite block."""

    def __init__(self, model: nn.Module):
        super().__init__(torch.fx.symbolic_trace(model))
        self.calls: list[Call] = []

    def call_function(self, target, args, kwargs):
        if target is not excited:
            return super().call_function(target, args, kwargs)
        options = {name: kwargs[name] for name in ("activation", "gate_activation")}
        arguments = inspect.signature(reference.squeeze_excite).bind(*args, **options).arguments
        self.calls.append(Call("squeeze_excite", "squeeze_excite", *described(arguments)))
        return torch.empty_like(args[0])


def _blocks(model: nn.Module, batch: int) -> Iterator[Call]:
    """Those of a forward pass of images of 224x224, in its order."""
    replace_squeeze_excitation(model)
    blocks = _Blocks(model)
    blocks.run(torch.empty(batch, *_IMAGE, dtype=COMPUTE, device="meta"))
    yield from blocks.calls


def _updates(model: nn.Module, batch: int) -> Iterator[Call]:
    """A step of SGD on all parameters, and one of Muon on the matrices and filters, whatever the batch."""
    for op, params, options in (
        ("sgd_nesterov", list(model.parameters()), _SGD),
        ("muon", split_parameters(model)[0], _MUON),
    ):
        yield Call("optimizer", op, OPS[op].arguments([tuple(p.shape) for p in params]), options)


# by torchvision's names, what is recorded of each
MODELS: dict[str, Callable[[nn.Module, int], Iterator[Call]]] = {
    "efficientnet_b0": _blocks,
    "efficientnet_v2_s": _blocks,
    "mobilenet_v3_large": _blocks,
    "mobilenet_v3_small": _blocks,
    "regnet_y_400mf": _blocks,
    "resnet50": _updates,
}


def calls_of_model(name: str, batch: int) -> list[Call]:
    """Raises UserError where torchvision is missing."""
    get_model = needed("torchvision.models", f"--shapes {name}").get_model
    # random weights are drawn, of which nobody else takes notice; on no device RegNet cannot compute its widths
    with torch.random.fork_rng(devices=[]):
        model = get_model(name)
    return list(MODELS[name](model.eval().to("meta", COMPUTE), batch))
