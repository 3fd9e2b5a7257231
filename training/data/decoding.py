"""One image file as pixels, upright, in RGB, of the size that is wanted."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from blink.errors import UserError, brief

# of damaged metadata and large images: what matters of them is an error
warnings.filterwarnings("ignore", module=r"PIL\.")

# of EXIF's orientations those that turn an image by a quarter
_TURNED, _ORIENTATION = (5, 6, 7, 8), 0x0112
# what images of many sizes are brought to, unless most have one that is no larger than this
_SIZE, _LARGEST = (32, 32), 128


@cache
def extensions() -> tuple[str, ...]:
    """Of the files that are taken for images: torchvision's, and GIF."""
    from torchvision.datasets.folder import IMG_EXTENSIONS  # imported with the first decoding, not with every start

    return (*IMG_EXTENSIONS, ".gif")


def names_image(name: str) -> bool:
    return name.lower().endswith(extensions()) and not name.startswith(".")


def is_image(path: Path) -> bool:
    """By its name."""
    return names_image(path.name)


def decode(file: Path | BinaryIO, name: str | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """[H, W, 3] uint8 of a file, which messages call `name` or by its path.

    size: the height and width that it is brought to, as `fit` does, but without a copy of the whole image; None: its
    own. Raises UserError for what is not one readable image, or has values that 8 bits cannot hold.
    """
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UserError(f"{name or file} is an animation, expected one still image; replace or remove it")
            return pixels_of(image, name or file, size)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # an untrusted file can fail in any way
        raise _unreadable(name or file, error) from error


def pixels_of(image: Image.Image, path: Path | str = "the image", size: tuple[int, int] | None = None) -> np.ndarray:
    """[H, W, 3] uint8 of an opened image, which messages call `path`; size: see `decode`. Raises UserError as it does.

    An image of 24 million pixels is 90 MB: what is RGB and upright is not copied before it has its size.
    """
    if image.mode == "F":
        raise UserError(f"{path} has floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    image.load()
    # cameras say in EXIF how they were held
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _from_16_bits(path, np.asarray(image))
    if isinstance(image.info.get("transparency"), bytes):
        # a palette's; converted at once Pillow would warn of it
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image if size is None else _fitted(image, *size))


def _from_16_bits(path: Path | str, values: np.ndarray) -> Image.Image:
    """Grey. Pillow's own conversion would clip at 255 where 255 * 257 is white."""
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} has pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def pixels_from(image) -> np.ndarray:
    """[H, W, 3] uint8 of a path, a PIL image, or a uint8 array or tensor [H, W], [H, W, C] or [C, H, W].

    Raises UserError for a file that is no readable image, and for anything else.
    """
    if isinstance(image, str | Path):
        return decode(Path(image))
    if isinstance(image, Image.Image):
        return pixels_of(image)
    if hasattr(image, "cpu"):
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(
            f"an image is a path, a PIL image or uint8 pixels [H, W], [H, W, C] or [C, H, W]; found {found}"
        )
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.transpose(1, 2, 0)
    return np.asarray(Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image).convert("RGB"))


def size_of(file: Path | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Height and width as `decode` would give them, from the file's head alone. Raises UserError."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            # a PNG's EXIF may be its end, for which all of it is decoded
            turned = width != height and image.getexif().get(_ORIENTATION) in _TURNED
            return (width, height) if turned else (height, width)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # an untrusted file can fail in any way
        raise _unreadable(name or file, error) from error


def common_size(sizes: Iterable[tuple[int, int]], note: Callable[[str], None]) -> tuple[int, int]:
    """The height and width that images of these sizes are brought to: the one that they have, else that of most of
    them if it is no larger than 128, else 32; note(line) is told of the latter two.
    """
    counts = Counter(sizes)
    (most, count), *others = counts.most_common()
    if not others:
        return most
    chosen = most if 2 * count > counts.total() and max(most) <= _LARGEST else _SIZE
    note(f"images of {len(counts)} sizes are scaled and cropped to {chosen[0]}x{chosen[1]} (--size)")
    return chosen


def _unreadable(path: Path | str, error: Exception) -> UserError:
    # Pillow's own words for these name the file again, or the memory that it is in
    reason = "of no known format" if isinstance(error, UnidentifiedImageError) else brief(error)
    return UserError(f"{path} is not a readable image ({reason}); replace or remove it")


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8 of [H, W, 3]: scaled, the ratio of its sides kept, until it covers that size, and
    cropped to the middle. One of that size stays as it is.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(_fitted(Image.fromarray(pixels), height, width))


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    # where the image shrinks, Pillow averages over all that a pixel covers
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
