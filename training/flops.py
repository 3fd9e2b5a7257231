"""How many floating-point operations a run takes: whitening, training, final evaluation; a multiply-add is two.

Matrix products and convolutions only, counted by PyTorch's FlopCounterMode on the reference network (it cannot see into
Triton kernels), so the number is the recipe's and not an implementation's. Validation and warm-up do not count.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from blink.model import backend
from blink.model.network import Network
from blink.training.budget import Budget
from blink.training.evaluation import VIEWS, unsure
from blink.training.optimizer import Optimizer
from blink.training.recipes import Recipe
from blink.training.step import phases_of


def _counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def run_flops(
    recipe: Recipe, budget: Budget, image_shape: tuple[int, int, int], classes: int, train_images: int, test_images: int
) -> dict[str, int]:
    """Of one run, by what they are spent on, and their "total".

    Counted on one batch of two images, whose FLOPs are those of any two.
    """
    network = Network(recipe.network, classes, image_shape, backend.eager())
    optimizer = Optimizer(network, recipe, budget, backend.reference())
    images = torch.zeros(2, *image_shape, dtype=torch.uint8)
    training = 0
    for phase, steps in phases_of(recipe, optimizer, budget.total_steps, image_shape[1:]).items():
        optimizer.freeze_all_but(phase.active)
        params = optimizer.parameters(phase.active)
        small = torch.zeros(2, image_shape[0], *phase.size, dtype=torch.uint8)
        step = _counted(lambda x=small, ps=params: torch.autograd.grad(network(x).sum(), ps))
        training += steps * (step * budget.batch_size // 2)
    everything = optimizer.active(0)
    zeros = [torch.zeros_like(p) for p in optimizer.parameters(everything)]
    update = _counted(lambda: optimizer.update(zeros, everything, torch.zeros(1, dtype=torch.int64)))
    network.eval()
    with torch.no_grad():
        forward = _counted(lambda: network(images)) // 2
    channels, height, width = image_shape
    k = recipe.network.whiten_kernel or 0
    whitened = min(train_images, recipe.whiten_images or train_images)
    positions = (height - k + 1) * (width - k + 1)
    flops = {
        "whitening": 2 * whitened * positions * (channels * k * k) ** 2 if k else 0,
        "training": training,
        "optimizer": update * budget.total_steps,
        "evaluation": forward * (test_images + len(VIEWS[recipe.tta]) * unsure(test_images, recipe.tta_fraction)),
    }
    return flops | {"total": sum(flops.values())}
