"""Training batches: cropped, flipped uint8 images, drawn on the device in pixel space.

Augmentation happens before normalization, so that every pixel a kernel sees is a pixel value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices that run past either edge back inside, without repeating the edge pixel (reflect padding)."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()


def augment(images: Tensor, index: Tensor, shift_y: Tensor, shift_x: Tensor, flip: Tensor) -> Tensor:
    """The batch images[index], moved by (shift_y, shift_x) pixels with reflected borders, mirrored where flip.

    images [N, H, W, C] uint8; index, shift_y, shift_x [B] int64; flip [B] bool.
    Returns [B, C, H, W] uint8 in channels_last memory. A shift is at most H - 1, W - 1.
    """
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    y = reflect(rows[None, :] + shift_y[:, None], height)
    x = reflect(columns[None, :] + shift_x[:, None], width)
    x = torch.where(flip[:, None], x.flip(1), x)
    return images[index[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def training_batches(
    images: Tensor, labels: Tensor, batch_size: int, shift: int, flip: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images [B, C, H, W] uint8, labels [B]); the partial last batch is dropped.

    The permutation and every shift and flip are drawn at the epoch's start from `generator`, on the images' device.
    """
    n, height, width, _ = images.shape
    steps = n // batch_size
    device = images.device
    used = steps * batch_size
    index = torch.randperm(n, generator=generator, device=device)[:used].view(steps, batch_size)
    limit_y, limit_x = min(shift, height - 1), min(shift, width - 1)
    shape = (steps, batch_size)
    shift_y = torch.randint(-limit_y, limit_y + 1, shape, generator=generator, device=device)
    shift_x = torch.randint(-limit_x, limit_x + 1, shape, generator=generator, device=device)
    mirrored = torch.rand(shape, generator=generator, device=device) < (0.5 if flip else 0.0)
    for i, y, x, m in zip(index, shift_y, shift_x, mirrored):
        yield augment(images, i, y, x, m), labels[i]
