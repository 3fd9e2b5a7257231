"""MNIST, Fashion-MNIST and sets like them: idx files, read by torchvision, which knows where they come from too."""

import gzip
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_url

from blink.errors import UserError
from blink.training.data.dataset import Arrays
from blink.training.data.downloading import downloading
from blink.training.data.layouts import Layout

PUBLISHED: dict[str, type[MNIST]] = {"mnist": MNIST, "fashionmnist": FashionMNIST}


def read(folder: Path, layout: Layout) -> Arrays:
    """Read `folder`, grey as three equal channels. Raises UserError for a file that is missing, damaged or malformed.

    The classes of a set that torchvision does not know are the numbers up to the highest label.
    """
    halves = []
    for images_name, labels_name in (layout.train, layout.test):
        images, labels = _array(folder / images_name, read_image_file), _array(folder / labels_name, read_label_file)
        if not len(images) or len(images) != len(labels):
            raise UserError(f"{folder / images_name} has {len(images)} images and {len(labels)} labels; download both")
        halves += [np.repeat(images[..., None], 3, axis=3), labels]
    if halves[0].shape[1:] != halves[2].shape[1:]:
        sizes = " and ".join("x".join(map(str, images.shape[1:3])) for images in halves[::2])
        raise UserError(f"{folder} has training and test images of {sizes}; expected one size")
    highest = max(int(labels.max()) for labels in halves[1::2])
    source = PUBLISHED.get(layout.name)
    classes = tuple(source.classes) if source else tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise UserError(f"{folder} holds the label {highest}, but {layout.name} has only {len(classes)} classes")
    return classes, *halves


def _array(path: Path, reader) -> np.ndarray:
    try:
        with _unpacked(path) as plain:
            return reader(str(plain)).numpy()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} lacks {path.name}; download it again") from error
    except Exception as error:  # torchvision asserts, looks up and views what the file's head says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        read = path if path.exists() else _packed(path)
        raise UserError(
            f"{read} is no readable idx file: truncated or damaged ({reason}); download it again"
        ) from error


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file, or what its .gz beside it holds."""
    packed = _packed(path)
    if path.is_file() or not packed.is_file():
        yield path
        return
    with NamedTemporaryFile() as plain:
        with gzip.open(packed) as file:
            shutil.copyfileobj(file, plain)
        plain.flush()
        yield Path(plain.name)


def download(root: Path, name: str) -> None:
    """Download and unpack below `root`, to where torchvision does. Raises UserError, soon when there is no network."""
    source = PUBLISHED[name]
    raw = root / source.__name__ / "raw"
    with downloading(root, name) as folder:
        for file, md5 in source.resources:
            _from_a_mirror(source, folder, file, md5)
            plain = folder / file.removesuffix(".gz")
            with gzip.open(folder / file) as packed, open(plain, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            raw.mkdir(parents=True, exist_ok=True)
            plain.replace(raw / plain.name)


def _from_a_mirror(source: type[MNIST], folder: Path, file: str, md5: str) -> None:
    """The last mirror's failure is raised."""
    for number, mirror in enumerate(source.mirrors, 1):
        try:
            return download_url(f"{mirror}{file}", str(folder), file, md5)
        except (OSError, RuntimeError, HTTPException):
            if number == len(source.mirrors):
                raise
