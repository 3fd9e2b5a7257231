"""Recipes: everything that defines a training besides the data, as frozen data. A new one states what differs."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from blink.model.config import Group, NetworkConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a training as a fraction of its peak: up from 0, down to the final fraction, then held.

    peak, hold: fractions of all steps: where the peak is, and how long the end holds the final fraction.
    """

    peak: float = 0.0
    final: float = 0.0
    hold: float = 0.0

    def __post_init__(self):
        for name in ("peak", "final", "hold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction, not {getattr(self, name)}")

    def factor(self, step: int, total_steps: int) -> float:
        """At step 0, 1, ... of total_steps."""
        peak = max(self.peak * total_steps - 1, 0.0)
        end = max(total_steps - round(self.hold * total_steps) - (1 if self.hold else 0), peak)
        if step < peak:
            return step / peak
        if step >= end:
            return self.final if end > peak else 1.0
        return 1 + (self.final - 1) * (step - peak) / (end - peak)


@dataclass(frozen=True)
class ParamGroup:
    """Which parameters an update rule trains, and how.

    params: "filters" (3x3 convolutions), "head", "stem.bias" (the whitening bias), "gates" (weights and biases of
    squeeze-and-excite), "biases" (all others) or "weights" (all other weights); each parameter belongs to the first
    group of a recipe that names it. layers: only those in these convolution groups of the network; None: anywhere.
    rule: "sgd" (Nesterov) or "muon". lr is for a loss summed over the batch; mean_lr: for its mean, so that lr / B is
    used. decay: multiplied by B. epochs: how long the group is trained, its schedule compressed to that; None: always.
    """

    params: Literal["filters", "head", "stem.bias", "gates", "biases", "weights"]
    rule: Literal["sgd", "muon"]
    lr: float
    momentum: float
    decay: float = 0.0
    mean_lr: bool = False
    epochs: float | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        _check_ranges(self, lr=(0, _ANY), momentum=(0, _ANY), decay=(0, _ANY), epochs=(0, _ANY))


# the largest that a setting may be where nothing bounds it
_ANY = 1e9


def _check_ranges(settings, **ranges: tuple[float, float]) -> None:
    """Raises ValueError naming the first setting that is not from the least to the most; None is none of them."""
    for name, (least, most) in ranges.items():
        values = getattr(settings, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not least <= value <= most:
                bounds = f"{least} or more" if most == _ANY else f"from {least} to {most}"
                raise ValueError(f"{name} is {bounds}, not {value}")


@dataclass(frozen=True)
class Resolution:
    """Smaller images for the first steps: `scale` times the side, until the fraction `until` of all steps."""

    until: float
    scale: float


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    # What --recipe calls it, and a line about it.
    name: str
    summary: str
    # What is trained.
    network: NetworkConfig
    # How its parameters are updated; each belongs to the first group that names it.
    param_groups: tuple[ParamGroup, ...]
    # Passes over the training images.
    epochs: float
    # Images a step.
    batch_size: int
    # The learning rates over the run, as fractions of their peaks.
    schedule: Schedule
    # The part of a label that is spread evenly over all classes.
    label_smoothing: float = 0.2
    # The most pixels of random translation each way; what it uncovers is reflected.
    translation: int = 2
    # Mirroring: at random, or each image once at random and then every other epoch, or none.
    flip: Literal["random", "alternating", "none"] = "random"
    # The side of a square that is set to the pixel mean; 0: none.
    cutout: int = 0
    # The most that contrast differs from 1 and brightness from 0, uniform, in units of the pixel range.
    jitter: tuple[float, float] | None = None
    # What the final evaluation averages over beside the image: its mirror, two 1-pixel diagonal translations, or both.
    tta: Literal["mirror", "translate", "mirror+translate"] | None = "mirror"
    # For which part of the test images it does so: those of which the network is least sure.
    tta_fraction: float = 1.0
    # Smaller images for the first steps, by rising `until`; after the last one images are whole.
    resolutions: tuple[Resolution, ...] = ()
    # The fraction of the training images that an epoch takes; those with the least loss sit it out, and only it.
    keep: float = 1.0
    # The last fraction of the steps whose weights are averaged; 0: no average.
    ema_fraction: float = 0.0
    # What the average keeps of itself a step.
    ema_decay: float = 0.986
    # Steps between its updates.
    ema_every: int = 2
    # Whether the whitening statistics are a covariance or, uncentred, a second moment.
    centered_whitening: bool = True
    # How many training images they are taken of; None: all.
    whiten_images: int | None = None

    def __post_init__(self):
        _check_ranges(
            self, batch_size=(1, _ANY), label_smoothing=(0, 1), translation=(0, _ANY), cutout=(0, _ANY),
            jitter=(0, _ANY), ema_fraction=(0, 1), ema_decay=(0, 1), ema_every=(1, _ANY), whiten_images=(1, _ANY),
        )  # fmt: skip
        if not 0 < self.epochs <= _ANY:
            raise ValueError(f"epochs is a number above 0, not {self.epochs}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a fraction above 0, not {self.keep}")
        if not 0 <= self.tta_fraction <= 1:
            raise ValueError(f"tta_fraction is a fraction, not {self.tta_fraction}")
        ends = [0.0, *(resolution.until for resolution in self.resolutions)]
        if any(a >= b for a, b in pairwise(ends)) or any(not 0 < r.scale <= 1 for r in self.resolutions):
            raise ValueError(f"resolutions have rising ends and scales up to 1, unlike {self.resolutions}")

    def image_size(self, step: int, total_steps: int, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images at step 0, 1, ... of total_steps, where those of the data set are `size`."""
        scale = next((r.scale for r in self.resolutions if step < round(r.until * total_steps)), 1.0)
        return self._scaled(scale, size)

    def image_sizes(self, size: tuple[int, int]) -> set[tuple[int, int]]:
        """Every size that images of `size` are trained at, which is never below what the network can take."""
        return {self._scaled(r.scale, size) for r in self.resolutions} | {size}

    def _scaled(self, scale: float, size: tuple[int, int]) -> tuple[int, int]:
        least = self.network.minimum_image_size
        return tuple(min(side, max(least, round(scale * side))) for side in size)


def with_flip(recipe: Recipe, flip: str) -> Recipe:
    """The recipe with this mirroring; without any, no mirror image is tested either."""
    tta = (
        {"mirror": None, "mirror+translate": "translate"}.get(recipe.tta, recipe.tta) if flip == "none" else recipe.tta
    )
    return replace(recipe, flip=flip, tta=tta)


def with_network(recipe: Recipe, **changes) -> Recipe:
    """The recipe with changes in its network."""
    return replace(recipe, network=replace(recipe.network, **changes))


def with_group(recipe: Recipe, params: str, **changes) -> Recipe:
    """The recipe with changes in its parameter groups of this name."""
    groups = tuple(replace(group, **changes) if group.params == params else group for group in recipe.param_groups)
    return replace(recipe, param_groups=groups)


def freezing(recipe: Recipe, layer: int, epochs: float) -> Recipe:
    """The recipe with one convolution group, filters and biases, trained in its first `epochs` only.

    With everything before it frozen too, nothing is propagated back to it any more. Source: FreezeOut, Brock et al.
    2017.
    """
    early = (group for group in recipe.param_groups if group.params in ("filters", "biases"))
    groups = tuple(replace(group, layers=(layer,), epochs=epochs) for group in early)
    return replace(recipe, param_groups=groups + recipe.param_groups)


def gated(recipe: Recipe, reduction: int, layers: tuple[int, ...], gates: ParamGroup) -> Recipe:
    """The recipe with squeeze-and-excite in these convolution groups, trained by a parameter group of its own."""
    groups = tuple(replace(group, se=i in layers) for i, group in enumerate(recipe.network.conv_groups))
    recipe = with_network(recipe, conv_groups=groups, se_reduction=reduction, gates_start_constant=True)
    return replace(recipe, param_groups=(gates, *recipe.param_groups))


_HLB_LR, _HLB_DECAY = 1.15 * 1.35, 0.85 * 4.8e-4

HLB = Recipe(
    "hlb",
    "hlb-CIFAR10 v0.3.0: 2x2 unpadded whitening, squeeze-and-excite /16, SGD, 10 epochs, EMA",
    network=NetworkConfig(),
    param_groups=(
        ParamGroup("biases", "sgd", 32 * _HLB_LR, 0.85, _HLB_DECAY / 32, mean_lr=True),
        ParamGroup("weights", "sgd", _HLB_LR, 0.85, _HLB_DECAY, mean_lr=True),
    ),
    epochs=10,
    batch_size=512,
    schedule=Schedule(peak=0.2, final=0.135, hold=0.2),
    translation=3,
    ema_fraction=0.2,
)

_AIR_BIAS_LR, _AIR_HEAD_LR, _AIR_DECAY = 0.053, 0.67, 2e-6

AIR = Recipe(
    "air",
    "airbench94_muon: whitening with negatives, narrow groups, Muon, 8 epochs, alternating flip",
    network=NetworkConfig(
        whiten_eps=5e-4,
        stem_channels=None,
        conv_groups=tuple(Group(channels, depth=1, residual=False, se=False) for channels in (64, 256, 256)),
        se_reduction=None,
        norm_momentum=0.4,
        logit_scale=1 / 256,
        dirac=True,
        head_std=1.0,
    ),
    param_groups=(
        ParamGroup("stem.bias", "sgd", _AIR_BIAS_LR, 0.85, _AIR_DECAY / _AIR_BIAS_LR, epochs=3),
        ParamGroup("biases", "sgd", _AIR_BIAS_LR, 0.85, _AIR_DECAY / _AIR_BIAS_LR),
        ParamGroup("head", "sgd", _AIR_HEAD_LR, 0.85, _AIR_DECAY / _AIR_HEAD_LR),
        ParamGroup("filters", "muon", 0.24, 0.6),
    ),
    epochs=8,
    batch_size=2000,
    schedule=Schedule(),
    flip="alternating",
    tta="mirror+translate",
    centered_whitening=False,
    whiten_images=5000,
)

HLB_3X3 = replace(
    HLB,
    name="hlb-3x3",
    summary="hlb with the padded 3x3 whitening convolution that the unpadded 2x2 one replaced",
    network=replace(HLB.network, whiten_kernel=3, whiten_padding="same"),
)

# how it was found is in docs/how-blink-was-found.md
BLINK = replace(
    AIR,
    name="blink",
    summary="air with small images first, augmented test images only where least sure, and an epoch more",
    epochs=9,
    resolutions=(Resolution(0.4, 0.75),),
    tta_fraction=0.25,
)

RECIPES = {recipe.name: recipe for recipe in (BLINK, HLB, HLB_3X3, AIR)}
