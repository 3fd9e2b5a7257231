"""The 3x3 'same' convolution and its two gradients by Winograd's algorithm, compiled, for float32 and bfloat16.

F(m x m, 3 x 3) of Lavin and Gray (Fast Algorithms for Convolutional Neural Networks, 2015), m of 2, 3 and 4 that takes
the fewest products for the size of the images: y = A^T [sum over channels of (G g G^T) * (B^T d B)] A for every tile.
At m = 4 a fourth of the direct convolution's multiply-adds are left. All of it is float32, whatever the images, with a
root mean square error of some 2e-6 of the values', up to six times a direct float32 convolution's and far below the
rounding of a bfloat16 result. What is not finite reaches all of its tile, and so up to five pixels.
"""

import torch
from torch import Tensor

from . import _takes
from .library import load


def takes(*images: Tensor) -> bool:
    """Whether the kernels read these [N, C, H, W] as they are: of one dtype, channels_last, and a compiler at hand."""
    dtype = images[0].dtype
    readable = dtype in _takes.FLOATS and all(_takes.images(x, (dtype,)) for x in images)
    return readable and _takes.plain_call() and load("winograd", None, dtype) is not None


def _convolve(x: Tensor, filters: Tensor) -> Tensor:
    """filters [3, 3, C, O]"""
    batch, channels, height, width = x.shape
    y = x.new_empty((batch, filters.shape[3], height, width)).contiguous(memory_format=torch.channels_last)
    load("winograd", None, x.dtype).winograd_convolve(
        x, filters.float().contiguous(), y, batch, height, width, channels, y.shape[1], torch.get_num_threads()
    )
    return y


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1) for x [N, C, H, W] that `takes` takes and weight [O, C, 3, 3]; y like x."""
    return _convolve(x, weight.permute(2, 3, 1, 0))


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of convolve(x, weight), for dy [N, O, H, W] that `takes` takes: the convolution of dy with the turned filters."""
    return _convolve(dy, weight.flip(2, 3).permute(2, 3, 0, 1))


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Of convolve(x, weight), float32 [O, C, 3, 3]: G^T [sum over tiles of (B^T d B) * (A dy A^T)] G."""
    batch, channels, height, width = x.shape
    gradient = torch.empty(3, 3, channels, dy.shape[1])
    load("winograd", None, x.dtype).winograd_filter_gradient(
        x, dy, gradient, batch, height, width, channels, dy.shape[1], torch.get_num_threads()
    )
    return gradient.permute(3, 2, 0, 1)
