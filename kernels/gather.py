"""A batch as a recipe: which images of a data set it takes, and how each is moved, mirrored, cut and jittered.

The whitening ops read the data set through a `Gather` inside their kernels; `gathered` is the same batch built in
plain PyTorch. Needs no triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# what a `Gather` may have besides its index
PARTS = ("translation", "flip", "jitter", "cutout")


@dataclass(frozen=True, eq=False)
class Gather:
    """Image b of the batch is images[index[b]], moved, mirrored, cut, then jittered; None leaves a step out.

    index: [B] int64 in 0..N-1 of images [N, C, H, W]; may repeat. An index outside is undefined: nothing checks the
        values, which would wait for the device.
    translation: [B, 2] int32 or int64, (y, x): output pixel (i, j) is pixel (i + y, j + x), reflected at the borders
        without repeating the edge. |y| <= H - 1 and |x| <= W - 1; the fused ops clamp what is beyond.
    flip: [B] bool: mirrored left to right (output column j reads what column W - 1 - j would).
    cutout: [B, 2] int64, top and left of a square of `cutout_size` pixels in the output image, which may lie partly or
        wholly outside; its pixels become the pixel mean, 255 * mean[c] rounded to an integer (halves up).
    jitter: [B, 2] float32, contrast a and brightness b: a pixel u / 255, filled ones included, becomes a * u / 255 + b,
        neither clamped nor rounded.
    """

    index: Tensor
    translation: Tensor | None = None
    flip: Tensor | None = None
    jitter: Tensor | None = None
    cutout: Tensor | None = None
    cutout_size: int = 0

    def part(self, images: slice) -> "Gather":
        """What it takes for these images of the batch."""
        fields = (self.index, self.translation, self.flip, self.jitter, self.cutout)
        return Gather(*(None if field is None else field[images] for field in fields), self.cutout_size)


def unflatten(index: Tensor | None, *rest) -> Gather | None:
    """The fields in order, as operators take them; no index, no gather."""
    return None if index is None else Gather(index, *rest)


def reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices that run past either edge back inside, without repeating the edge pixel (reflect padding)."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()


def augment(images: Tensor, index: Tensor, move_y: Tensor, move_x: Tensor, flip: Tensor) -> Tensor:
    """The batch images[index], moved by (move_y, move_x) pixels with reflected borders, mirrored where flip.

    images [N, H, W, C] uint8; index, move_y, move_x [B] int64; flip [B] bool.
    Returns [B, C, H, W] uint8 in channels_last memory. A translation is at most H - 1, W - 1.
    """
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    y = reflect(rows[None, :] + move_y[:, None], height)
    x = reflect(columns[None, :] + move_x[:, None], width)
    x = torch.where(flip[:, None], x.flip(1), x)
    return images[index[:, None, None], y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def gathered(images: Tensor, gather: Gather, mean: Tensor | None) -> Tensor:
    """The batch [B, C, H, W] uint8, channels_last, that `gather` makes of images [N, C, H, W] uint8, before its jitter.

    mean: [C] floating in units of 0..1; only a cutout needs it. Raises TypeError for images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"gather needs uint8 images, found {str(images.dtype).removeprefix('torch.')}")
    batch, (height, width) = len(gather.index), images.shape[2:]
    still = torch.zeros(batch, dtype=torch.int64, device=images.device)
    move_y, move_x = (still, still) if gather.translation is None else gather.translation.unbind(1)
    flip = still.bool() if gather.flip is None else gather.flip
    out = augment(images.permute(0, 2, 3, 1), gather.index, move_y, move_x, flip)
    if gather.cutout is None:
        return out
    top, left = gather.cutout[:, :1], gather.cutout[:, 1:]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    cut_y = (rows >= top) & (rows < top + gather.cutout_size)
    cut_x = (columns >= left) & (columns < left + gather.cutout_size)
    # exact in float64, so that every implementation rounds alike
    fill = torch.floor(mean.double() * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    out = torch.where((cut_y[:, :, None] & cut_x[:, None, :])[:, None], fill[:, None, None], out)
    return out.contiguous(memory_format=torch.channels_last)
