"""Training batches: cropped, flipped uint8 images, drawn on the device in pixel space.

Augmentation happens before normalization, so that every pixel a kernel sees is a pixel value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.gather import augment


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
