"""What a recipe really calls: a training step of every phase, recorded without data and without a device."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from math import ceil

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blink.kernels.gather import Gather
from blink.model import backend
from blink.model.convolution import Conv3x3
from blink.model.layers import NormAct, SEGate, Stem
from blink.model.network import Network
from blink.training.budget import plan_budget
from blink.training.data.dataset import Dataset
from blink.training.precision import Precision
from blink.training.recipes import Recipe
from blink.training.step import Phase
from blink.training.trainer import Trainer

from ...registry import Argument
from .values import GATHER

# of the weights and activations; what a case takes in whichever dtype it is made
COMPUTE = torch.float16
# enough to tell a recipe's phases apart
_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op of the backend, or of the head, "linear". part: the layer, "loss" or "optimizer"."""

    part: str
    op: str
    arguments: dict[str, Argument | list[Argument] | None]
    options: dict


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network's layers by name, none inside another."""
    kinds = (Stem, Conv3x3, NormAct, SEGate, nn.Linear)
    for name, module in network.named_modules():
        if isinstance(module, kinds) and not name.startswith("stem.") and ".se." not in name:
            yield name, module


def _argument(value: Tensor) -> Argument:
    return Argument(tuple(value.shape), None if value.dtype == COMPUTE else value.dtype)


def described(arguments: dict) -> tuple[dict, dict]:
    """(tensors as shapes, options)."""
    shapes, options = {}, {}
    for name, value in arguments.items():
        if isinstance(value, Gather):
            fields = vars(value).items()
            shapes |= {GATHER + field: _argument(v) for field, v in fields if isinstance(v, Tensor)}
            options |= {GATHER + field: v for field, v in fields if isinstance(v, int) and value.cutout is not None}
        elif isinstance(value, Tensor):
            shapes[name] = _argument(value)
        elif isinstance(value, list):
            shapes[name] = [_argument(v) for v in value]
        elif value is None and name not in ("activation", "dtype", "gather"):
            shapes[name] = None
        elif name not in ("dtype", "gather"):
            options[name] = value
    return shapes, options


class _Recorder:
    """Calls of a backend's ops, each under the layer that makes it."""

    def __init__(self):
        self.calls: list[Call] = []
        self._part: str | None = None
        plain = backend.reference()
        ops = [field.name for field in dataclasses.fields(plain) if callable(getattr(plain, field.name))]
        self.backend = dataclasses.replace(plain, **{op: self._noted(op, getattr(plain, op)) for op in ops})

    def _noted(self, op: str, function: Callable) -> Callable:
        signature = inspect.signature(function)

        def call(*args, **keywords):
            arguments = signature.bind(*args, **keywords).arguments
            update = "params" in arguments
            part = self._part or ("optimizer" if update else "loss")
            self.calls.append(Call(part, op, *described(arguments)))
            return None if update else function(*args, **keywords)

        return call

    def watch(self, network: Network) -> None:
        for name, module in layers_of(network):
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "_part", name))
            module.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            arguments = {"x": _argument(inputs[0]), "weight": _argument(module.weight)}
            self.calls.append(Call(self._part, "linear", arguments, {}))
        self._part = None


def recorded_calls(
    recipe: Recipe, batch: int, classes: int = 10, image_shape: tuple[int, int, int] = (3, 32, 32), whole: bool = False
) -> list[Call]:
    """The calls of one training step in every phase of the recipe; whole: of the one that trains everything on images
    of full size. The data set is of two batches an epoch.
    """
    channels, height, width = image_shape
    recorder = _Recorder()
    count = ceil(2 * batch / recipe.keep)
    images, labels = torch.zeros(count, height, width, channels, dtype=torch.uint8), torch.zeros(count).long()
    names, statistics = tuple(map(str, range(classes))), (torch.zeros(channels), torch.ones(channels))
    dataset = Dataset("none", "", names, images, labels, images, labels, *statistics)
    budget, precision = plan_budget(recipe, count, batch, steps=_STEPS), Precision("fp16", COMPUTE, COMPUTE)
    # random weights are drawn, of which nobody else takes notice
    with torch.random.fork_rng(devices=[]):
        trainer = Trainer(recipe, dataset, budget, recorder.backend, precision, graph=False)
    recorder.watch(trainer.network)
    trainer.network.train()
    everything = Phase(tuple(range(len(trainer.optimizer.param_groups))), (height, width))
    # tensors have shapes and no values inside, the results of an operation on real ones too
    with FakeTensorMode(allow_non_fake_inputs=True):
        for phase in [everything] if whole else trainer.phases():
            trainer.rehearse(phase)
    return recorder.calls
