"""Training batches as what to take of the data set: indices, translations and flips, drawn for an epoch at once.

The batch itself is gathered by the stem: the fused ops read the uint8 data set through these tensors, the reference
ops build the batch. Augmentation is in pixel space, so every pixel a kernel sees is a pixel value.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from blink.kernels.gather import Gather

_RESIZED_AT_ONCE = 5000
# above any loss: what sat out an epoch is in the next
_SAT_OUT = 1e9


@torch.no_grad()
def resize(images: Tensor, out: Tensor) -> None:
    """Fill out [N, h, w, C] uint8 with images [N, H, W, C] uint8, bilinear and antialiased, rounded."""
    for source, target in zip(images.split(_RESIZED_AT_ONCE), out.split(_RESIZED_AT_ONCE)):
        pixels = source.permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, target.shape[1:3], mode="bilinear", antialias=True, align_corners=False)
        target.copy_(small.round_().clamp_(0, 255).permute(0, 2, 3, 1))


class Batches:
    """An epoch's batches in memory that never moves, so that a captured step reads each epoch's draw.

    images [N, H, W, C] uint8 and labels [N] int64 on one device; translation: the most pixels each way; flip: "random",
    "alternating" (each image at random the first time, then mirrored every other time) or "none"; cutout: side of a
    square that is set to the pixel mean, its centre anywhere in the image, 0: none; jitter: most deviation of contrast
    and of brightness; sizes: other heights and widths that batches are taken at, translation and cutout shrinking with
    them; keep: the fraction of the images that an epoch takes, those that sat out the one before and those with the
    largest losses in it. The partial last batch of an epoch is dropped.

    hardness [N] float32: each image's loss in this epoch, which the training step writes; None where all are kept.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        translation: int,
        flip: str,
        cutout: int = 0,
        jitter: tuple[float, float] | None = None,
        sizes: Iterable[tuple[int, int]] = (),
        keep: float = 1.0,
    ):
        n, height, width, _ = images.shape
        device = images.device
        self._whole = images
        self._images = {(height, width): images}
        for size in sizes:
            self._images.setdefault(size, images.new_zeros(n, *size, images.shape[3]))
        self.labels = labels.clone()
        self._kept = max(1, round(keep * n))
        self.steps = self._kept // batch_size
        self.hardness = torch.empty(n, device=device) if self._kept < n else None
        self._limits = min(translation, height - 1), min(translation, width - 1)
        self._flip = flip
        shape = (self.steps, batch_size)
        self.index = torch.zeros(shape, dtype=torch.int64, device=device)
        self.translation = torch.zeros(*shape, 2, dtype=torch.int64, device=device)
        self.flip = torch.zeros(shape, dtype=torch.bool, device=device)
        self._mirrored = torch.zeros(n, dtype=torch.bool, device=device)
        self.cutout_size, self._deviations, self.size = cutout, jitter, (height, width)
        self.cutout = torch.zeros(*shape, 2, dtype=torch.int64, device=device) if cutout else None
        self.jitter = torch.zeros(*shape, 2, device=device) if jitter else None

    def resize(self) -> None:
        """Make the images of every other size; until then they are black."""
        for images in self._images.values():
            if images is not self._whole:
                resize(self._whole, images)

    def images(self, size: tuple[int, int]) -> Tensor:
        """The data set [N, C, h, w] uint8 at this size, channels_last."""
        return self._images[size].permute(0, 3, 1, 2)

    def carried(self) -> dict[str, Tensor]:
        """What one epoch's draw depends on of those before it."""
        return {"mirrored": self._mirrored, **({} if self.hardness is None else {"hardness": self.hardness})}

    def draw(self, generator: torch.Generator, epoch: int) -> None:
        """Fill in epoch 0, 1, ... from `generator`, which lives on the images' device."""
        n, device = len(self.labels), self.labels.device
        options = dict(generator=generator, device=device)
        order = torch.randperm(n, **options)
        if self.hardness is not None:
            if epoch == 0:
                self.hardness.fill_(_SAT_OUT)
            # shuffled first: equals are kept by chance, and the batches stay mixed
            kept = torch.zeros_like(self.labels, dtype=torch.bool)
            kept.index_fill_(0, order[self.hardness[order].topk(self._kept, sorted=False).indices], True)
            order = order[kept[order].long().argsort(descending=True, stable=True)[: self._kept]]
            self.hardness.fill_(_SAT_OUT)
        self.index.copy_(order[: self.index.numel()].view_as(self.index))
        for axis, limit in enumerate(self._limits):
            self.translation[..., axis] = torch.randint(-limit, limit + 1, self.index.shape, **options)
        if self._flip == "random":
            self.flip.copy_(torch.rand(self.index.shape, **options) < 0.5)
        elif self._flip == "alternating":
            if epoch == 0:
                self._mirrored.copy_(torch.rand(n, **options) < 0.5)
            self.flip.copy_(self._mirrored[self.index])
            self._mirrored[self.index] = ~self.flip

        if self.cutout is not None:
            for axis, size in enumerate(self.size):
                centre = torch.randint(0, size, self.index.shape, **options)
                self.cutout[..., axis] = centre - self.cutout_size // 2
        if self.jitter is not None:
            for axis, (usual, deviation) in enumerate(zip((1.0, 0.0), self._deviations)):
                self.jitter[..., axis] = usual + deviation * (2 * torch.rand(self.index.shape, **options) - 1)

    def take(self, at: Tensor, size: tuple[int, int]) -> tuple[Gather, Tensor]:
        """Batch `at` ([1] int64 on the device) of the epoch: what to gather of `images(size)`, and its labels [B]."""
        index, translation, flip, jitter, cutout = (
            None if field is None else field.index_select(0, at)[0]
            for field in (self.index, self.translation, self.flip, self.jitter, self.cutout)
        )
        cutout_size = self.cutout_size
        if size != self.size:
            scale = size[0] / self.size[0]
            most = min(size) - 1
            translation = (translation * scale).round().clamp(-most, most).long()
            cutout = None if cutout is None else (cutout * scale).round().long()
            cutout_size = round(cutout_size * scale)
        return Gather(index, translation, flip, jitter, cutout, cutout_size), self.labels.index_select(0, index)
