"""Images of any kind and size as batches that a network takes."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blink.errors import UserError
from blink.training.data.decoding import fit, is_image, pixels_from


def fitted(image, image_shape: tuple[int, int, int]) -> Tensor:
    """[C, height, width] uint8: the image brought to the network's size as `decoding.fit` does.

    image: a path, a PIL image, or a uint8 array or tensor [H, W], [H, W, C] or [C, H, W]. Raises UserError for a file
    that is no readable image, and for anything else.
    """
    channels, height, width = image_shape
    if channels != 3:
        raise UserError(f"this network takes images of {channels} channels, and images here have 3")
    return torch.from_numpy(np.array(fit(pixels_from(image), height, width))).permute(2, 0, 1)


def readable(
    paths: Iterable[Path], image_shape: tuple[int, int, int], most: int, complain: Callable[[UserError], None]
) -> Iterator[tuple[list[Path], Tensor]]:
    """(paths, their `fitted` images [B, C, height, width] uint8), at most `most` at once, in order; decoded by as many
    threads as cores. complain(error) is called for each of the others.
    """

    def attempt(path: Path) -> Tensor | UserError:
        try:
            return fitted(path, image_shape)
        except UserError as error:
            return error

    paths = iter(paths)
    with ThreadPoolExecutor(cpu_count()) as pool:
        while part := list(islice(paths, most)):
            found = list(zip(part, pool.map(attempt, part)))
            for _, error in found:
                if isinstance(error, UserError):
                    complain(error)
            good = [(path, image) for path, image in found if not isinstance(image, UserError)]
            if good:
                yield [path for path, _ in good], torch.stack([image for _, image in good])


def listed_images(arguments: Iterable[str]) -> Iterator[Path]:
    """Every image that files, folders and - (a list on standard input) name, in order.

    Raises UserError for what does not exist and empty folders.
    """
    for argument in arguments:
        if argument == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
            continue
        path = Path(argument)
        if not path.exists():
            raise UserError(f"there is no {path}; expected an image, a folder of images, or -")
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if is_image(p) and p.is_file())
        if not found:
            raise UserError(f"{path} holds no image; name another folder, or a file")
        yield from found


def batches(images: Iterable, image_shape: tuple[int, int, int], most: int) -> Iterator[Tensor]:
    """[B, C, height, width] uint8 with at most `most` images, in order; decoded by as many threads as cores."""
    images = iter(images)
    with ThreadPoolExecutor(cpu_count()) as pool:
        while part := list(islice(images, most)):
            yield torch.stack(list(pool.map(lambda image: fitted(image, image_shape), part)))
