"""Whitening: the first convolution's weights from the eigenvectors of the training images' patch covariance.

The sums are taken over uint8 pixels as integers, so the statistics are exact and do not depend on order or device;
they are carried to the normalized images by an affine map in float64. Source: hlb-CIFAR10 (centred covariance),
airbench (uncentred second moment).
"""

from dataclasses import dataclass

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

    def normalized(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64, of the patches of (pixel / 255 - mean) / std; mean, std [C]."""
        taps = self.first.numel() // mean.numel()
        mean = mean.double().repeat_interleave(taps)
        std = std.double().repeat_interleave(taps)
        first = self.first.double() / self.count
        covariance = self.second.double() / self.count - first[:, None] * first[None, :]
        patch_mean = (first / 255 + (_PIXEL_OFFSET / 255 - mean)) / std
        return patch_mean, covariance / (255 * std[:, None]) / (255 * std[None, :])


def patch_moments(images: Tensor, kernel_size: int) -> PatchMoments:
    """Exact integer moments of the unpadded patches of `images` [N, H, W, C] uint8.

    Raises ValueError when an image is smaller than the kernel or there is no image.
    """
    n, height, width, channels = images.shape
    if n == 0 or min(height, width) < kernel_size:
        raise ValueError(f"{n} images of {height}x{width} hold no {kernel_size}x{kernel_size} patch")
    rows, columns = height - kernel_size + 1, width - kernel_size + 1
    positions = rows * columns
    dtype = torch.float32 if positions <= _EXACT_FLOAT32_POSITIONS else torch.float64
    dim = channels * kernel_size**2
    at_once = max(1, _CHUNK_BYTES // (positions * dim * dtype.itemsize))
    first = torch.zeros(dim, dtype=torch.int64, device=images.device)
    second = torch.zeros(dim, dim, dtype=torch.int64, device=images.device)
    for chunk in images.split(at_once):
        # F.unfold would launch a kernel an image
        shifted = [chunk[:, y : y + rows, x : x + columns] for y in range(kernel_size) for x in range(kernel_size)]
        patches = torch.stack(shifted, 4).flatten(3).to(dtype).sub_(_PIXEL_OFFSET).flatten(1, 2)
        first += patches.sum(1).long().sum(0)
        second += torch.bmm(patches.mT, patches).long().sum(0)
    return PatchMoments(n * positions, first, second)


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


@torch.no_grad()
def initialize_stem(stem, images: Tensor, mean: Tensor, std: Tensor, eps: float, centered: bool = True) -> Tensor:
    """Set a stem's pixel statistics and, if it whitens, its frozen filters, from training images [N, H, W, C] uint8.

    A stem with twice as many filters as the patches have dimensions gets each filter and its negative. Returns which
    channels vary of what the network's first 3x3 convolution takes, [C] bool: of the pixels, or of the stem's result.
    """
    mean, std = mean.to(images.device), std.to(images.device)
    stem.mean.copy_(mean)
    stem.std.copy_(std)
    if not hasattr(stem, "whiten"):
        pixels = images.flatten(0, 2)
        return pixels.amax(0) != pixels.amin(0)
    moments = patch_moments(images, stem.whiten.kernel_size[0])
    filters = whitening_weight(moments, mean, std, eps, centered)
    if stem.whiten.out_channels == 2 * len(filters):
        filters = torch.cat([filters, -filters])
    stem.whiten.weight.copy_(filters)
    varying = filters.flatten(1).any(1)
    # a projection mixes all filters into each of its channels
    return varying.any().expand(stem.out_channels) if hasattr(stem, "project") else varying
