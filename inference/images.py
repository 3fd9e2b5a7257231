"""Images of any kind and size as batches that a network takes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blink.errors import UserError
from blink.training.data.decoding import fit, pixels_from


def fitted(image, image_shape: tuple[int, int, int]) -> Tensor:
    """[C, height, width] uint8: the image brought to the network's size as `decoding.fit` does.

    image: a path, a PIL image, or a uint8 array or tensor [H, W], [H, W, C] or [C, H, W]. Raises UserError for a file
    that is no readable image, and for anything else.
    """
    channels, height, width = image_shape
    if channels != 3:
        raise UserError(f"this network takes images of {channels} channels, and images here have 3")
    return torch.from_numpy(np.array(fit(pixels_from(image), height, width))).permute(2, 0, 1)


def attempted(paths: list[Path], image_shape: tuple[int, int, int]) -> list[Tensor | UserError]:
    """Of each path the `fitted` image, or what is wrong with it; decoded by as many threads as cores."""

    def attempt(path: Path) -> Tensor | UserError:
        try:
            return fitted(path, image_shape)
        except UserError as error:
            return error

    with ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(attempt, paths))


def batches(images: Iterable, image_shape: tuple[int, int, int], most: int) -> Iterator[Tensor]:
    """[B, C, height, width] uint8 with at most `most` images, in order; decoded by as many threads as cores."""
    images = iter(images)
    with ThreadPoolExecutor(cpu_count()) as pool:
        while part := list(islice(images, most)):
            yield torch.stack(list(pool.map(lambda image: fitted(image, image_shape), part)))
