"""Recipes: everything that defines a training besides the data, as frozen data. A new one states what differs."""

from dataclasses import dataclass, field

from model.network import NetworkConfig


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained.

    Learning rates and decays are per mean-loss step: the loss is summed over a batch of B images, so the optimizer uses
    lr / B and decay * B. `peak`, `final` fractions are of all steps, so that a shorter budget compresses the schedule.
    """

    name: str
    summary: str
    network: NetworkConfig = field(default_factory=NetworkConfig)
    epochs: float = 10
    batch_size: int = 512
    momentum: float = 0.85
    lr: float = 1.15 * 1.35
    bias_lr_scale: float = 32.0
    decay: float = 0.85 * 4.8e-4
    bias_decay_scale: float = 1 / 32
    peak_fraction: float = 0.2
    final_lr_fraction: float = 0.135
    ema_fraction: float = 0.2
    ema_decay: float = 0.986
    ema_every: int = 2
    label_smoothing: float = 0.2
    shift: int = 3
    flip: bool = True
    centered_whitening: bool = True


HLB = Recipe("hlb", "hlb-CIFAR10 v0.3.0: 2x2 unpadded whitening, squeeze-and-excite /16, SGD, 10 epochs, EMA")

RECIPES = {recipe.name: recipe for recipe in (HLB,)}
