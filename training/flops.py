"""How many floating-point operations a run takes: whitening, training, final evaluation; a multiply-add is two.

Matrix products and convolutions only, counted by PyTorch's FlopCounterMode on the reference network (it cannot see into
Triton kernels), so the number is the recipe's and not an implementation's. Validation and warm-up do not count.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from blink.model import backend
from blink.model.network import Network
from blink.training.budget import Budget
from blink.training.evaluation import VIEWS, unsure
from blink.training.optimizer import Optimizer
from blink.training.recipes import Recipe
from blink.training.step import phase_of


@dataclass(frozen=True)
class RunFlops:
    """Of one run, by what they are spent on."""

    whitening: int
    training: int
    optimizer: int
    evaluation: int

    @property
    def total(self) -> int:
        return self.whitening + self.training + self.optimizer + self.evaluation


def _counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def run_flops(
    recipe: Recipe,
    budget: Budget,
    image_shape: tuple[int, int, int],
    classes: int,
    train_images: int,
    test_images: int,
) -> RunFlops:
    """Counted on one batch of two images, whose FLOPs are those of any two."""
    network = Network(recipe.network, classes, image_shape, backend.eager())
    optimizer = Optimizer(
        network, recipe, budget.batch_size, budget.steps_per_epoch, budget.total_steps, backend.reference()
    )
    images = torch.zeros(2, *image_shape, dtype=torch.uint8)
    training, phases = 0, {}
    for step in range(budget.total_steps):
        phase = phase_of(recipe, optimizer, step, budget.total_steps, image_shape[1:])
        if phase not in phases:
            optimizer.freeze_all_but(phase.active)
            params = optimizer.parameters(phase.active)
            small = torch.zeros(2, image_shape[0], *phase.size, dtype=torch.uint8)
            phases[phase] = _counted(lambda x=small, ps=params: torch.autograd.grad(network(x).sum(), ps))
        training += phases[phase] * budget.batch_size // 2
    update = 0
    for group, params in zip(optimizer.groups, optimizer.params):
        if group.rule == "muon":
            zeros, lr = [torch.zeros_like(p) for p in params], torch.zeros(1)
            update += _counted(lambda ps=params, zs=zeros, lr=lr: backend.reference().muon(
                ps, zs, [torch.zeros_like(z) for z in zs], lr, momentum=0.0, dtype=torch.float32
            ))  # fmt: skip
    network.eval()
    with torch.no_grad():
        forward = _counted(lambda: network(images)) // 2
    channels, height, width = image_shape
    k = recipe.network.whiten_kernel or 0
    whitened = min(train_images, recipe.whiten_images or train_images)
    positions = (height - k + 1) * (width - k + 1)
    return RunFlops(
        2 * whitened * positions * (channels * k * k) ** 2 if k else 0,
        training,
        update * budget.total_steps,
        forward * (test_images + len(VIEWS[recipe.tta]) * unsure(test_images, recipe.tta_fraction)),
    )
