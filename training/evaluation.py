"""Evaluation: logits averaged over an image and its test-time augmentations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mirrored_logits(network: nn.Module, images: Tensor, own: Tensor | None = None) -> Tensor:
    """The mean over an image and its mirror; images [B, C, H, W] uint8; own: the images' own logits if known."""
    flipped = images.flip(3).contiguous(memory_format=torch.channels_last)
    return ((network(images) if own is None else own) + network(flipped)) / 2


def translated_logits(network: nn.Module, images: Tensor, own: Tensor | None = None) -> Tensor:
    """Half from the image, a quarter each from its two 1-pixel diagonal translations, all with their mirrors.

    What a translation uncovers is reflected. Source: airbench94.
    """
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), "reflect").to(images.dtype)
    moved = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
    near = sum(mirrored_logits(network, m.contiguous(memory_format=torch.channels_last)) for m in moved) / 2
    return (mirrored_logits(network, images, own) + near) / 2


VIEWS = {
    None: lambda network, images, own=None: network(images) if own is None else own,
    "mirror": mirrored_logits,
    "mirror+translate": translated_logits,
}


def unsure(count: int, fraction: float) -> int:
    """How many of `count` images are augmented where only the `fraction` that the network is least sure of is."""
    return math.ceil(fraction * count)


@torch.no_grad()
def logits_of(
    network: nn.Module, images: Tensor, tta: str | None, fraction: float = 1.0, batch_size: int = 2000
) -> Tensor:
    """images [N, H, W, C] uint8 -> logits [N, classes] float32, the network left in the mode it was in.

    tta: None, "mirror" or "mirror+translate"; below 1, only the `fraction` of the images is augmented whose two largest
    probabilities are closest. Source of the latter: hiverge's cifar10-speedrun.
    """
    was_training = network.training
    network.eval()
    first = tta if fraction >= 1 else None
    logits = torch.cat([VIEWS[first](network, chunk.permute(0, 3, 1, 2)) for chunk in images.split(batch_size)])
    if first != tta:
        largest = logits.softmax(1).topk(2, dim=1).values
        chosen = (largest[:, 1] - largest[:, 0]).topk(unsure(len(images), fraction)).indices
        for part in chosen.split(batch_size):
            chunk = images[part].permute(0, 3, 1, 2)
            logits[part] = VIEWS[tta](network, chunk, logits[part])
    network.train(was_training)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is the label; a row with a NaN counts as wrong."""
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return right.double().mean().item()
