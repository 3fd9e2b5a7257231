"""The weight gradient of a 3x3 'same' convolution on a processor's matrix units (AMX), for bfloat16.

dweight[o, c, i, j] = sum over pixels p of dy[p, o] x[p + (i, j) - 1, c], the direct sums in float32, as products of 16
x 32 by 32 x 16 values. oneDNN's products run along one row of an image, ours through the rows of several images, so
that small images fill them too. Where a value is not finite, what is beside it in memory may not be either.
"""

from functools import cache

import torch
from torch import Tensor

from . import _takes
from .library import load


@cache
def available() -> bool:
    """Whether this processor has the units, its system lets this process use them, and there is a compiler."""
    permitted = torch.zeros(1, dtype=torch.int32)
    if (library := load("matrix_units", None, torch.bfloat16)) is not None:
        library.matrix_units_permitted(permitted)
    return bool(permitted)


def takes(*images: Tensor) -> bool:
    """Whether the kernel reads these [N, C, H, W] as they are: bfloat16, channels_last, and units to run it on."""
    readable = all(_takes.images(x, (torch.bfloat16,)) for x in images)
    return readable and _takes.plain_call() and available()


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of conv2d(x, weight, padding=1), float32 [O, C, 3, 3], channels_last, for dy [N, O, H, W] and x [N, C, H, W] that
    `takes` takes; the weight is not read. Without units by plain loops, slowly. Bits do not depend on threads.
    """
    batch, channels, height, width = x.shape
    gradient = torch.empty(dy.shape[1], 3, 3, channels)
    load("matrix_units", None, torch.bfloat16).matrix_units_filter_gradient(
        x, dy, gradient, batch, height, width, channels, dy.shape[1], torch.get_num_threads()
    )
    return gradient.permute(0, 3, 1, 2)
