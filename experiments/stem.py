"""What a stem costs: its shape, its multiply-adds, and the time of its forward and backward pass on one batch."""

from collections.abc import Callable
from functools import partial

import torch

from blink.kernels.examine.bench.measure import time_calls
from blink.model.layers import FrozenStem
from blink.model.network import Network
from blink.training.trainer import Trainer

_SECONDS = 0.5


def shape_of(network: Network, size: tuple[int, int]) -> dict:
    """features: of a patch; channels and output: what the stem gives; macs: multiply-adds of one image's forward."""
    stem, config = network.stem, network.config
    taps = (config.whiten_kernel or 3) ** 2
    lost = config.whiten_kernel - 1 if config.fused_stem else 0
    height, width = (side - lost for side in size)
    features = len(stem.mean) * taps
    if not isinstance(stem, FrozenStem):
        each = features * stem.out_channels
    else:
        filters = stem.whiten.out_channels
        each = features * filters + (filters * stem.out_channels if config.stem_channels else 0)
    return {
        "features": features,
        "channels": stem.out_channels,
        "output": [height, width],
        "macs": height * width * each,
    }


def milliseconds(trainer: Trainer) -> float:
    """Of forward and backward on a batch of random order, with the trained parameters' gradients only."""
    trainer.prepare(0)
    network, batches, device = trainer.network, trainer.batches, trainer.device
    batches.draw(torch.Generator(device).manual_seed(0), 0)
    size = batches.size
    gather, _ = batches.take(torch.zeros(1, dtype=torch.int64, device=device), size)
    params = [p for p in network.stem.parameters() if p.requires_grad]
    dtype = trainer.precision.compute

    def call(upstream: torch.Tensor) -> None:
        y = network.stem(batches.images(size), gather, dtype)
        torch.autograd.grad(y, params, upstream)

    def prepare() -> list[Callable[[], None]]:
        with torch.no_grad():
            y = network.stem(batches.images(size), gather, dtype)
        return [partial(call, torch.randn_like(y)) for _ in range(2)]

    with trainer.precision.autocast(device):
        return time_calls(prepare, device, _SECONDS).best / 1e3
