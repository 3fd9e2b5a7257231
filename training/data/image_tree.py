"""Image folders: train/<class>/* and test/<class>/*, any class count, any one image size."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import cpu_count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from blink.training.data.dataset import Arrays
from blink.errors import UserError

_CHUNK = 500


@cache
def extensions() -> tuple[str, ...]:
    """Of the files that are taken for images: torchvision's, and GIF."""
    from torchvision.datasets.folder import IMG_EXTENSIONS  # imported with the first decoding, not with every start

    return (*IMG_EXTENSIONS, ".gif")


def list_images(root: Path) -> tuple[tuple[str, ...], list[list[Path]], list[np.ndarray]]:
    """Class names (sorted), then the files and the labels of train and of test, each sorted by class and name.

    Raises UserError for a folder without classes or images, and for a class that one half lacks.
    """
    classes = {half: _classes(root / half) for half in ("train", "test")}
    for half, other in (("test", "train"), ("train", "test")):
        missing = [name for name in classes[other] if name not in classes[half]]
        if missing:
            raise UserError(f"{root / half} lacks the class {_quoted(missing)} that {other} has; every class needs both")
    files, labels = [], []
    for half, names in classes.items():
        found = [sorted(p for p in (root / half / name).iterdir() if is_image(p)) for name in names]
        for name, own in zip(names, found):
            if not own:
                raise UserError(
                    f"{root / half / name} holds no image; expected files ending in {', '.join(extensions())}"
                )
        files.append([path for own in found for path in own])
        labels.append(np.repeat(np.arange(len(names)), list(map(len, found))))
    return classes["train"], files, labels


def read_image_tree(root: Path, progress: Callable[[int, int], None]) -> Arrays:
    """Decode every image under `root`, calling progress(done, total) as it goes.

    Raises UserError naming the first image that cannot be decoded or whose size differs from the first one's.
    """
    classes, halves, labels = list_images(root)
    files = halves[0] + halves[1]
    height, width, _ = decode(files[0]).shape
    images = np.empty((len(files), height, width, 3), dtype=np.uint8)

    def decode_chunk(start: int) -> int:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = decode(files[i])
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{files[i]} is {image.shape[0]}x{image.shape[1]}, but {files[0]} is {height}x{width}; "
                    "all images must have one size: resize them first"
                )
            images[i] = image
        return min(_CHUNK, len(files) - start)

    done = 0
    # Pillow decodes outside the interpreter lock, so threads use every core; what is left when one fails is cancelled
    with ThreadPoolExecutor(cpu_count()) as pool:
        for decoded in pool.map(decode_chunk, range(0, len(files), _CHUNK)):
            done += decoded
            progress(done, len(files))
    cut = len(halves[0])
    return classes, images[:cut], labels[0], images[cut:], labels[1]


def decode(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, upright. Raises UserError for what is not one readable image."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UserError(f"{path} is an animation, expected one still image; replace or remove it")
            if image.mode.startswith("I"):
                # 16-bit grey: Pillow's conversion would clip at 255 where 255 * 257 is white
                pixels = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(pixels[:, :, None], 3, axis=2)
            # cameras say in EXIF how they were held
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable image ({reason}); replace or remove it") from error


def _classes(half: Path) -> tuple[str, ...]:
    if not half.is_dir():
        raise UserError(f"{half} is not a folder; an image data set holds train/<class>/* and test/<class>/*")
    classes = tuple(sorted(p.name for p in half.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise UserError(f"{half} holds no class folder; expected {half.name}/<class>/<images>")
    return classes


def is_image(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(extensions()) and not path.name.startswith(".")


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
