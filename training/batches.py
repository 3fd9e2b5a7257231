"""Training batches as what to take of the data set: indices, shifts and flips, drawn for an epoch at once.

The batch itself is gathered by the stem: the fused ops read the uint8 data set through these tensors, the reference
ops build the batch. Augmentation is in pixel space, so every pixel a kernel sees is a pixel value.
"""

import torch
from torch import Tensor

from kernels.gather import Gather


class Batches:
    """An epoch's batches in memory that never moves, so that a captured step reads each epoch's draw.

    images [N, H, W, C] uint8 and labels [N] int64 on one device; shift: most pixels of translation each way; flip:
    "random", "alternating" (each image at random once, then mirrored in every other epoch) or "none"; cutout: side of a
    square that is set to the pixel mean, its centre anywhere in the image, 0: none; jitter: most deviation of contrast
    and of brightness. The partial last batch of an epoch is dropped.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        shift: int,
        flip: str,
        cutout: int = 0,
        jitter: tuple[float, float] | None = None,
    ):
        n, height, width, _ = images.shape
        device = images.device
        self.images = images.permute(0, 3, 1, 2)
        self.labels = labels.clone()
        self.steps = n // batch_size
        self._limits = min(shift, height - 1), min(shift, width - 1)
        self._flip = flip
        shape = (self.steps, batch_size)
        self.index = torch.zeros(shape, dtype=torch.int64, device=device)
        self.shift = torch.zeros(*shape, 2, dtype=torch.int64, device=device)
        self.flip = torch.zeros(shape, dtype=torch.bool, device=device)
        self._mirrored = torch.zeros(n, dtype=torch.bool, device=device)
        self.cutout_size, self._deviations, self._size = cutout, jitter, (height, width)
        self.cutout = torch.zeros(*shape, 2, dtype=torch.int64, device=device) if cutout else None
        self.jitter = torch.zeros(*shape, 2, device=device) if jitter else None

    def draw(self, generator: torch.Generator, epoch: int) -> None:
        """Fill in epoch 0, 1, ... from `generator`, which lives on the images' device."""
        n, device = len(self.labels), self.labels.device
        options = dict(generator=generator, device=device)
        self.index.copy_(torch.randperm(n, **options)[: self.index.numel()].view_as(self.index))
        for axis, limit in enumerate(self._limits):
            self.shift[..., axis] = torch.randint(-limit, limit + 1, self.index.shape, **options)
        if self._flip == "random":
            self.flip.copy_(torch.rand(self.index.shape, **options) < 0.5)
        elif self._flip == "alternating":
            if epoch == 0:
                self._mirrored.copy_(torch.rand(n, **options) < 0.5)
            self.flip.copy_(self._mirrored[self.index] ^ (epoch % 2 == 1))

        if self.cutout is not None:
            for axis, size in enumerate(self._size):
                centre = torch.randint(0, size, self.index.shape, **options)
                self.cutout[..., axis] = centre - self.cutout_size // 2
        if self.jitter is not None:
            for axis, (usual, deviation) in enumerate(zip((1.0, 0.0), self._deviations)):
                self.jitter[..., axis] = usual + deviation * (2 * torch.rand(self.index.shape, **options) - 1)

    def take(self, at: Tensor) -> tuple[Gather, Tensor]:
        """Batch `at` ([1] int64 on the device) of the epoch: what to gather, and its labels [B]."""
        index, shift, flip, jitter, cutout = (
            None if field is None else field.index_select(0, at)[0]
            for field in (self.index, self.shift, self.flip, self.jitter, self.cutout)
        )
        return Gather(index, shift, flip, jitter, cutout, self.cutout_size), self.labels.index_select(0, index)
