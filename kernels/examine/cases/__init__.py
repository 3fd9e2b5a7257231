"""Cases of every op: the calls that recipes and torchvision's models make, and any other, from what each op's file
registers.

The tests, the ahead-of-time compile report and the benchmarks all work from them. `cases.whiten(2, 32, 32, 24)`, and so
for each op, is a case at the sizes that its file names.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cache, partial

from blink.training.recipes import RECIPES

from ...gather import PARTS as GATHER_PARTS
from ...registry import OPS, Argument, Cost
from .base import Case, Tensors, case_of, mapped, named
from .models import MODELS, calls_of_model
from .recorded import Call, layers_of, recorded_calls
from .values import images

__all__ = [
    "GATHER_PARTS", "MODELS", "SWEEP", "Argument", "Call", "Case", "Cost", "Tensors", "case_at", "further_cases",
    "images", "layers_of", "makers", "mapped", "model_cases", "named", "network_cases", "quick_batch", "recipe_cases",
    "recorded_calls", "small_cases",
]  # fmt: skip

# below this batch, where the interpreter only checks results, optimizers get fewer channels by this factor
_SMALL_BATCH, _FEWER = 16, 8
# hlb's
_FURTHER_BATCH = 512
# of images of 224x224, and where a benchmark is to be quick
_MODEL_BATCH, _QUICK_MODEL_BATCH, _QUICK_BATCH = 64, 16, 128


def __getattr__(op: str):
    """The maker of an op's cases."""
    if op in OPS:
        return partial(case_of, op)
    raise AttributeError(f"module {__name__!r} has no attribute {op!r}")


def unique(cases: Iterable[Case]) -> list[Case]:
    """One of each op and label."""
    return list({(case.op, case.label): case for case in cases}.values())


@cache
def recipe_cases(name: str, batch: int | None = None) -> list[Case]:
    """Every call of a recipe's training steps, in all phases and at all image sizes, at its own or another batch."""
    recipe = RECIPES[name]
    batch = batch or recipe.batch_size
    return _cases_of_calls(recorded_calls(recipe, batch), batch)


@cache
def model_cases(name: str, batch: int | None = None) -> list[Case]:
    """What `MODELS` records of a torchvision model. Raises UserError where torchvision is missing."""
    batch = batch or _MODEL_BATCH
    return _cases_of_calls(calls_of_model(name, batch), batch)


def _cases_of_calls(calls: Iterable[Call], batch: int) -> list[Case]:
    found = unique(Case(c.op, c.arguments, c.options) for c in calls if c.op in OPS)
    return [case.with_fewer(_FEWER) if batch < _SMALL_BATCH else case for case in found]


def quick_batch(name: str) -> int:
    """The batch of a quick benchmark of what `makers` names."""
    return _QUICK_MODEL_BATCH if name in MODELS else _QUICK_BATCH


def further_cases(batch: int | None = None) -> list[Case]:
    """What no recipe calls and must work all the same, as each op's file says."""
    found, batch = [], batch or _FURTHER_BATCH
    for name, known in OPS.items():
        batched = "batch" in inspect.signature(known.arguments).parameters
        found += [case_of(name, **{**({"batch": batch} if batched else {}), **sizes}) for sizes in known.further]
    return [case.with_fewer(_FEWER) if batch < _SMALL_BATCH else case for case in found]


def makers(name: str) -> list[Callable[[int | None], list[Case]]]:
    """What makes the cases of a recipe, of a torchvision model, or of the "network": the recipes blink and hlb, and
    further ones; each of a batch, None for its own, and in the same order for any.
    """
    if name in MODELS:
        return [partial(model_cases, name)]
    recipes = [partial(recipe_cases, recipe) for recipe in (("blink", "hlb") if name == "network" else (name,))]
    return [*recipes, further_cases] if name == "network" else recipes


def network_cases(batch: int | None = None) -> list[Case]:
    """The cases of the recipes blink and hlb, each at its own batch or all at this one, and further ones."""
    return unique(case for make in makers("network") for case in make(batch))


def small_cases() -> list[Case]:
    """A few cheap calls of every op, but of values enough that the ratio of two root mean square errors is no luck."""
    return [case_of(name, **sizes) for name, known in OPS.items() for sizes in known.small]


def case_at(op: str, batch: int, channels: int, height: int, width: int) -> Case:
    """The case of `op` for [batch, channels, height, width]; for the whitening ops, images of height x width; for
    cross_entropy, as many classes as channels.

    Optimizer ops take a 3x3 convolution of `channels`, whatever the batch and the images.
    """
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width, "classes": channels}
    sizes |= {"filters": channels, "hidden": max(1, channels // 16), "shapes": [(channels, channels, 3, 3)]}
    parameters = inspect.signature(OPS[op].arguments).parameters.values()
    case = case_of(op, **{p.name: sizes[p.name] for p in parameters if p.default is p.empty})
    return case.with_fewer(_FEWER) if batch < _SMALL_BATCH else case


# [batch, channels, height, width]: the network's resolutions and widths at batches around its own
SWEEP = [(b, c, s, s) for b in (128, 512, 2048) for s, c in ((32, 32), (15, 128), (7, 256), (3, 512))]
