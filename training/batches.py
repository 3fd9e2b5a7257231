"""Training batches as what to take of the data set: indices, translations and flips, drawn for an epoch at once.

The batch itself is gathered by the stem: the fused ops read the uint8 data set through these tensors, the reference
ops build the batch. Augmentation is in pixel space, so every pixel a kernel sees is a pixel value.
"""

import math
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


class _Drawn:
    """Fields of an epoch's batches, those of one batch beside each other in memory, so that one copy takes them all.

    fields: of each its dtype and the shape that a batch's has.
    """

    # where a field begins, so that kernels may read it in wide pieces
    _ALIGNMENT = 64

    def __init__(self, steps: int, fields: dict[object, tuple[torch.dtype, tuple[int, ...]]], device: torch.device):
        self._places, size = {}, 0
        for key, (dtype, shape) in fields.items():
            end = size + dtype.itemsize * math.prod(shape)
            self._places[key] = slice(size, end), dtype, shape
            size = -(-end // self._ALIGNMENT) * self._ALIGNMENT
        self._bytes = torch.zeros(steps, size, dtype=torch.uint8, device=device)

    def all(self) -> dict[object, Tensor]:
        """The fields [steps, *shape], in the memory that they live in."""
        return self._of(self._bytes)

    def take(self, at: Tensor) -> dict[object, Tensor]:
        """A copy of the fields [*shape] of batch `at` ([1] int64)."""
        return self._of(self._bytes.index_select(0, at)[0])

    def _of(self, rows: Tensor) -> dict[object, Tensor]:
        return {
            key: rows[..., place].view(dtype).unflatten(-1, shape)
            for key, (place, dtype, shape) in self._places.items()
        }


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
        self._mirrored = torch.zeros(n, dtype=torch.bool, device=device)
        self.cutout_size, self._deviations, self.size = cutout, jitter, (height, width)
        one, two, integer = (batch_size,), (batch_size, 2), torch.int64
        fields = {"index": (integer, one), "labels": (integer, one), "flip": (torch.bool, one)}
        # of every size its own, so that no step scales them
        fields |= {("translation", size): (integer, two) for size in self._images}
        fields |= {("cutout", size): (integer, two) for size in self._images if cutout}
        fields |= {"jitter": (torch.float32, two)} if jitter else {}
        self._drawn = _Drawn(self.steps, fields, device)
        self._fields = self._drawn.all()
        self.index, self.flip, self.jitter = (self._fields.get(name) for name in ("index", "flip", "jitter"))
        self.translation, self.cutout = (self._fields.get((name, self.size)) for name in ("translation", "cutout"))

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
        self._fields["labels"].copy_(self.labels[self.index])
        for size in self._images:
            if size != self.size:
                scale, most = size[0] / self.size[0], min(size) - 1
                moved = (self.translation * scale).round_().clamp_(-most, most)
                self._fields["translation", size].copy_(moved)
                if self.cutout is not None:
                    self._fields["cutout", size].copy_((self.cutout * scale).round_())

    def take(self, at: Tensor, size: tuple[int, int]) -> tuple[Gather, Tensor]:
        """Batch `at` ([1] int64 on the device) of the epoch: what to gather of `images(size)`, and its labels [B]."""
        fields = self._drawn.take(at)
        gather = Gather(
            fields["index"], fields["translation", size], fields["flip"], fields.get("jitter"),
            fields.get(("cutout", size)), round(self.cutout_size * size[0] / self.size[0]),
        )  # fmt: skip
        return gather, fields["labels"]
