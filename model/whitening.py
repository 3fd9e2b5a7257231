"""A stem's whitening filters and pixel statistics, from the training images."""

import torch
from torch import Tensor

from blink.kernels.whitening import patch_moments, whitening_weight


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
