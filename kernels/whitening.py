"""Whitening: the first convolution's weights from the eigenvectors of the training images' patch covariance.

The sums are taken over uint8 pixels as integers, so the statistics are exact and do not depend on order or device;
they are carried to the normalized images by an affine map in float64. Those of floating images, which are normalized
already, are sums in float64. Needs no triton. Source: hlb-CIFAR10 (centred covariance), airbench (uncentred second
moment).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# u - 128 fits int8 and keeps every per-image sum of products below 2**24, exact in float32, up to 1024 positions;
# 8 bits are exact in TF32 too, which a user may allow
_PIXEL_OFFSET = 128
_EXACT_FLOAT32_POSITIONS = 1024
# of patches at once: few launches, in memory that a training step of some thousand images takes too
_CHUNK_BYTES = 1 << 29
# of the largest variance: less than rounding pixels to 8 bits leaves, more than rounding the normalized pixels does
_NO_VARIANCE = 1e-8


@dataclass(frozen=True)
class PatchMoments:
    """Integer moments of all k x k patches q = pixel - 128, in (channel, row, column) order, D = C * k * k.

    count: number of patches; first [D] and second [D, D] int64 sums of q and of q q^T.
    """

    count: int
    first: Tensor
    second: Tensor

    def __add__(self, other: "PatchMoments") -> Self:
        """Of the patches of both."""
        return type(self)(self.count + other.count, self.first + other.first, self.second + other.second)

    def normalized(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64, of the patches of (pixel / 255 - mean) / std; mean, std [C]."""
        taps = self.first.numel() // mean.numel()
        mean = mean.double().repeat_interleave(taps)
        std = std.double().repeat_interleave(taps)
        first = self.first.double() / self.count
        covariance = self.second.double() / self.count - first[:, None] * first[None, :]
        patch_mean = (first / 255 + (_PIXEL_OFFSET / 255 - mean)) / std
        return patch_mean, covariance / (255 * std[:, None]) / (255 * std[None, :])


class NormalizedPatchMoments(PatchMoments):
    """The same of floating pixels as they are, in float64: no pixel is mapped any more."""

    def normalized(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64, whatever the arguments."""
        first = self.first / self.count
        return first, self.second / self.count - first[:, None] * first[None, :]


def pixel_statistics(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] float32 in units of 0..1, of pixels as often as histogram [C, 256] says.

    A constant channel, which has no scale to divide by, has the standard deviation 1.
    """
    levels = torch.arange(256, dtype=torch.float64, device=histogram.device) / 255
    share = histogram / histogram.sum(1, keepdim=True).double()
    mean = share @ levels
    std = (share * (levels - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def patch_moments(images: Tensor, kernel_size: int) -> PatchMoments:
    """Exact integer moments of the unpadded patches of `images` [N, H, W, C] uint8; of floating images float64 ones.

    Raises ValueError when an image is smaller than the kernel or there is no image.
    """
    n, height, width, channels = images.shape
    if n == 0 or min(height, width) < kernel_size:
        raise ValueError(f"{n} images of {height}x{width} hold no {kernel_size}x{kernel_size} patch")
    rows, columns = height - kernel_size + 1, width - kernel_size + 1
    positions = rows * columns
    whole = not images.is_floating_point()
    dtype = torch.float32 if whole and positions <= _EXACT_FLOAT32_POSITIONS else torch.float64
    sums = torch.int64 if whole else torch.float64
    dim = channels * kernel_size**2
    at_once = max(1, _CHUNK_BYTES // (positions * dim * dtype.itemsize))
    first = torch.zeros(dim, dtype=sums, device=images.device)
    second = torch.zeros(dim, dim, dtype=sums, device=images.device)
    for chunk in images.split(at_once):
        # F.unfold would launch a kernel an image
        shifted = [chunk[:, y : y + rows, x : x + columns] for y in range(kernel_size) for x in range(kernel_size)]
        patches = torch.stack(shifted, 4).flatten(3).to(dtype)
        patches = (patches.sub_(_PIXEL_OFFSET) if whole else patches).flatten(1, 2)
        first += patches.sum(1).to(sums).sum(0)
        second += torch.bmm(patches.mT, patches).to(sums).sum(0)
    return (PatchMoments if whole else NormalizedPatchMoments)(n * positions, first, second)


def whitening_weight(moments: PatchMoments, mean: Tensor, std: Tensor, eps: float, centered: bool = True) -> Tensor:
    """Whitening filters [D, C, k, k] float32: v_i / sqrt(lambda_i + eps), by descending eigenvalue.

    v_i, lambda_i: eigenpairs of the covariance (or, not centred, of the second moment) of the normalized patches.
    Patches filtered so have covariance diag(lambda / (lambda + eps)). An eigenvector's sign is arbitrary: it is fixed
    so that the largest component is positive, which makes the filters reproducible. Where the patches do not vary along
    v_i (a constant channel, grey stored as colour) the filter is zero: it would show nothing but rounding, enlarged.
    """
    patch_mean, covariance = moments.normalized(mean, std)
    matrix = covariance if centered else covariance + patch_mean[:, None] * patch_mean[None, :]
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    vectors = vectors.mT.flip(0)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    filters = vectors * largest.sign() / (eigenvalues.flip(0).clamp_min(0) + eps).sqrt()[:, None]
    # not the eigenvalues: a second moment's also holds the mean
    variances = ((vectors @ covariance) * vectors).sum(1)
    filters = torch.where(variances > _NO_VARIANCE * variances.max(), filters.T, 0.0).T
    taps = moments.first.numel() // mean.numel()
    kernel_size = round(taps**0.5)
    return filters.reshape(-1, mean.numel(), kernel_size, kernel_size).float()
