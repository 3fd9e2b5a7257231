"""The 3x3 convolution of the native backend: of several ways to compute it, for each shape and pass, the fastest.

Winograd's algorithm, compiled (kernels/native/winograd.py), needs a fourth to a half of the products; the matrix units
that some processors compute bfloat16 with are oneDNN's and, for the weight gradient, our own (matrix_units.py there).
And oneDNN multiplies along one image's row, so that rows of a few pixels leave most of a vector or matrix unit unused:
with k images of a group beside each other, each followed by a column of zeros, the rows are k times as long, and values
and gradients are those of the images apart, since the zeros are what each would have been padded with. Which way is
fastest is measured when a shape first comes, for each of the three passes, and kept below the cache folder.
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
from blink.kernels.dispatch import say_once
from blink.kernels.environment import cpu_flags
from blink.kernels.native import matrix_units, winograd
from blink.kernels.native.library import digest_of_sources
from blink.model import convolution

# the ways: oneDNN for that many images side by side, and our own
Way = int | str
_GROUPS = (4, 8, 16)
WINOGRAD, MATRIX_UNITS = "winograd", "matrix_units"
_OWN = (WINOGRAD, MATRIX_UNITS)
# wider images gained nothing side by side on any processor tried
_WIDEST = 8
# values of a batch below which nothing that could be gained is worth a measurement
_LEAST = 1 << 18
# images that a measurement takes at most, its rounds, and what a way must gain to be taken instead of 1
_IMAGES, _ROUNDS, _GAIN = 128, 3, 0.95
# of the largest value: a wrong kernel is off by far more, and the tests judge the rest
_CLOSE = 5e-2


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


def _convolve(way: Way, x: Tensor, weight: Tensor) -> Tensor:
    if way == WINOGRAD:
        return winograd.convolve(x, weight)
    if way == 1:
        return convolution.convolve(x, weight)
    return apart(convolution.convolve(side_by_side(x, way), weight), way)


def _input_gradient(way: Way, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if way == WINOGRAD:
        return winograd.input_gradient(dy, x, weight)
    if way == 1:
        return convolution.input_gradient(dy, x, weight)
    dy = side_by_side(dy, way)
    shape = (len(dy), weight.shape[1], *dy.shape[2:])
    unread = torch.empty(shape, dtype=dy.dtype, memory_format=torch.channels_last)
    return apart(convolution.input_gradient(dy, unread, weight), way)


def _weight_gradient(way: Way, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if way == WINOGRAD:
        return winograd.weight_gradient(dy, x, weight)
    if way == MATRIX_UNITS:
        return matrix_units.weight_gradient(dy, x, weight)
    if way != 1:
        dy, x = side_by_side(dy, way), side_by_side(x, way)
    return convolution.weight_gradient(dy, x, weight)


def _ways(call: Callable, images: tuple[Tensor, ...]) -> list[Way]:
    """What there is for a pass beside 1, for the tensors that hold the batch."""
    batch, width = len(images[0]), images[0].shape[3]
    ways: list[Way] = [group for group in _GROUPS if batch % group == 0 and width <= _WIDEST]
    # matrix units outrun float32 by far more than Winograd's algorithm saves
    if matrix_units.takes(*images):
        return [*ways, MATRIX_UNITS] if call is _weight_gradient else ways
    return [*ways, WINOGRAD] if winograd.takes(*images) else ways


class Choices:
    """For each shape and pass the fastest way, kept in a file of this processor's and software's."""

    def __init__(self):
        mkldnn = torch.backends.mkldnn.is_available()
        facts = [torch.__version__, mkldnn, *sorted(cpu_flags()), digest_of_sources()]
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        folder = cache_folder()
        self._path = None if folder is None else folder / "native" / f"convolutions-{name}.json"
        self._ways = self._read()

    def _read(self) -> dict[str, Way]:
        with suppress(OSError, ValueError, AttributeError):
            kept = from_json(self._path.read_bytes())
            return {key: way for key, way in kept.items() if way in (1, *_GROUPS, *_OWN)}
        return {}

    def way(self, call: Callable, images: tuple[Tensor, ...], weight: Tensor) -> Way:
        """For call(way, *images, weight): measured if this shape is new. images: the tensors that hold the batch."""
        if images[0].numel() < _LEAST or not (ways := _ways(call, images)):
            return 1
        if torch.backends.cudnn.deterministic:
            # measured, it could differ from one start to the next
            return WINOGRAD if WINOGRAD in ways and not convolution.fast_bf16() else 1
        sizes = [*images[0].shape[2:], *weight.shape[:2]]
        key = f"{call.__name__} {sizes} {ways} {images[0].dtype} {torch.get_num_threads()}"
        if key not in self._ways:
            self._ways[key] = _fastest(call, ways, images, weight)
            self._write()
        return self._ways[key]

    def _write(self) -> None:
        # what cannot be kept is measured again by the next start; another process's choices stay
        with suppress(OSError, AttributeError):
            self._ways = self._read() | self._ways
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self._ways, indent=1) + "\n")


def _fastest(call: Callable, ways: list[Way], images: tuple[Tensor, ...], weight: Tensor) -> Way:
    """The way of the least time, alternating, on some of the images; 1 if none gains enough."""
    whole = max((way for way in ways if way not in _OWN), default=1)
    count = min(len(images[0]), _IMAGES)
    few = tuple(t[: count - count % whole] for t in images)
    # unmeasured: oneDNN prepares each shape anew
    results = {way: call(way, *few, weight).float() for way in (1, *ways)}
    close = _CLOSE * results[1].abs().max()
    # written so that a NaN fails; where oneDNN's is none either, nothing can be judged
    for own in [way for way in ways if way in _OWN and close.isfinite()]:
        if not (results[own] - results[1]).abs().max() <= close:
            what = f"{call.__name__.strip('_')} ({own})".replace("_", " ")
            say_once(f"the native {what} is wrong on this machine; another runs in its place")
            ways = [way for way in ways if way != own]
    seconds = dict.fromkeys([1, *ways], float("inf"))
    for _ in range(_ROUNDS):
        for way in seconds:
            begin = time.perf_counter()
            call(way, *few, weight)
            seconds[way] = min(seconds[way], time.perf_counter() - begin)
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _GAIN * seconds[1] else 1


@cache
def _choices() -> Choices:
    return Choices()


def _by_choice(call: Callable) -> Callable[..., Tensor]:
    def run(*operands: Tensor) -> Tensor:
        *images, weight = operands
        return call(_choices().way(call, tuple(images), weight), *operands)

    return run


_PASSES = convolution.Passes(*map(_by_choice, (_convolve, _input_gradient, _weight_gradient)))


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1): see `convolution.conv3x3`, whose numbers these are but for the order of sums."""
    return convolution.conv3x3(x, weight, _PASSES)
