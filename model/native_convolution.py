"""The 3x3 convolution of the native backend: oneDNN's, with small images laid side by side where that is faster.

oneDNN multiplies along one image's row, so that rows of a few pixels leave most of a vector or matrix unit unused. With
k images of a group beside each other, each followed by a column of zeros, the rows are k times as long, and values and
gradients are those of the images apart: the zeros are what each would have been padded with. Which k is fastest, or 1,
is measured when a shape first comes, for each of the three passes, and kept below the cache folder.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from blink.files import cache_folder, from_json, replacing
from blink.kernels.environment import cpu_flags
from blink.model import convolution

_GROUPS = (4, 8, 16)
# wider images gained nothing on any processor tried
_WIDEST = 8
# values of a batch below which nothing that could be gained is worth a measurement
_LEAST = 1 << 18
# images that a measurement takes at most, its rounds, and what k must gain to be taken instead of 1
_IMAGES, _ROUNDS, _GAIN = 128, 3, 0.95


def side_by_side(x: Tensor, group: int) -> Tensor:
    """x [N, C, H, W] as [N / group, C, H, group * (W + 1)], channels_last, a column of zeros behind each image."""
    batch, channels, height, width = x.shape
    out = x.new_empty(batch // group, height, group, width + 1, channels)
    images = x.permute(0, 2, 3, 1).reshape(batch // group, group, height, width, channels)
    out[..., :width, :] = images.transpose(1, 2)
    out[..., width, :] = 0
    return out.view(batch // group, height, group * (width + 1), channels).permute(0, 3, 1, 2)


def apart(y: Tensor, group: int) -> Tensor:
    """The images of `side_by_side` again, channels_last, without the columns between them."""
    batch, channels, height, columns = y.shape
    images = y.permute(0, 2, 3, 1).reshape(batch, height, group, columns // group, channels)[..., :-1, :]
    images = images.transpose(1, 2).reshape(batch * group, height, columns // group - 1, channels)
    return images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _convolve(group: int, x: Tensor, weight: Tensor) -> Tensor:
    if group == 1:
        return convolution.convolve(x, weight)
    return apart(convolution.convolve(side_by_side(x, group), weight), group)


def _input_gradient(group: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if group == 1:
        return convolution.input_gradient(dy, x, weight)
    dy = side_by_side(dy, group)
    shape = (len(dy), weight.shape[1], *dy.shape[2:])
    unread = torch.empty(shape, dtype=dy.dtype, memory_format=torch.channels_last)
    return apart(convolution.input_gradient(dy, unread, weight), group)


def _weight_gradient(group: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if group > 1:
        dy, x = side_by_side(dy, group), side_by_side(x, group)
    return convolution.weight_gradient(dy, x, weight)


class Choices:
    """For each shape and pass the fastest group, kept in a file of this processor's and software's."""

    def __init__(self):
        facts = [torch.__version__, torch.backends.mkldnn.is_available(), *sorted(cpu_flags())]
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        folder = cache_folder()
        self._path = None if folder is None else folder / "native" / f"convolutions-{name}.json"
        self._groups = self._read()

    def _read(self) -> dict[str, int]:
        with suppress(OSError, ValueError, AttributeError):
            kept = from_json(self._path.read_bytes())
            return {key: group for key, group in kept.items() if group in (1, *_GROUPS)}
        return {}

    def group(self, call: Callable, images: tuple[Tensor, ...], weight: Tensor) -> int:
        """For call(group, *images, weight): measured if this shape is new. images: the tensors that hold the batch."""
        batch, width = len(images[0]), images[0].shape[3]
        groups = [group for group in _GROUPS if batch % group == 0]
        # measured, it could differ from one start to the next
        deterministic = torch.backends.cudnn.deterministic
        if width > _WIDEST or not groups or images[0].numel() < _LEAST or deterministic:
            return 1
        sizes = [*images[0].shape[2:], *weight.shape[:2]]
        key = f"{call.__name__} {sizes} {groups} {images[0].dtype} {torch.get_num_threads()}"
        if key not in self._groups:
            self._groups[key] = _fastest(call, groups, images, weight)
            self._write()
        return self._groups[key]

    def _write(self) -> None:
        # what cannot be kept is measured again by the next start; another process's choices stay
        with suppress(OSError, AttributeError):
            self._groups = self._read() | self._groups
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self._groups, indent=1) + "\n")


def _fastest(call: Callable, groups: list[int], images: tuple[Tensor, ...], weight: Tensor) -> int:
    """The group of the least time, alternating, on some of the images; 1 if none gains enough."""
    count = min(len(images[0]), _IMAGES)
    few = tuple(t[: count - count % groups[-1]] for t in images)
    seconds = dict.fromkeys([1, *groups], float("inf"))
    # the first round is for oneDNN, which prepares each shape anew
    for attempt in range(_ROUNDS + 1):
        for group in seconds:
            begin = time.perf_counter()
            call(group, *few, weight)
            if attempt:
                seconds[group] = min(seconds[group], time.perf_counter() - begin)
    best = min(groups, key=seconds.__getitem__)
    return best if seconds[best] < _GAIN * seconds[1] else 1


@cache
def _choices() -> Choices:
    return Choices()


def _by_choice(call: Callable) -> Callable[..., Tensor]:
    def run(*operands: Tensor) -> Tensor:
        *images, weight = operands
        return call(_choices().group(call, tuple(images), weight), *operands)

    return run


_PASSES = convolution.Passes(*map(_by_choice, (_convolve, _input_gradient, _weight_gradient)))


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1): see `convolution.conv3x3`, whose numbers these are but for the order of sums."""
    return convolution.conv3x3(x, weight, _PASSES)
