"""Evaluation: logits averaged over an image and its test-time augmentations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mirrored_logits(network: nn.Module, images: Tensor) -> Tensor:
    """The mean over an image and its mirror; images [B, C, H, W] uint8."""
    flipped = images.flip(3).contiguous(memory_format=torch.channels_last)
    return (network(images) + network(flipped)) / 2


def translated_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Half from the image, a quarter each from its two 1-pixel diagonal translations, all with their mirrors.

    What a translation uncovers is reflected. Source: airbench94.
    """
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), "reflect").to(images.dtype)
    moved = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
    near = sum(mirrored_logits(network, m.contiguous(memory_format=torch.channels_last)) for m in moved) / 2
    return (mirrored_logits(network, images) + near) / 2


VIEWS = {
    None: lambda network, images: network(images),
    "mirror": mirrored_logits,
    "mirror+translate": translated_logits,
}


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, tta: str | None, batch_size: int = 1000) -> Tensor:
    """images [N, H, W, C] uint8 -> logits [N, classes] float32, the network left in the mode it was in.

    tta: None, "mirror" or "mirror+translate".
    """
    was_training = network.training
    network.eval()
    logits = [VIEWS[tta](network, chunk.permute(0, 3, 1, 2)) for chunk in images.split(batch_size)]
    network.train(was_training)
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is the label; a row with a NaN counts as wrong."""
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return right.double().mean().item()
