"""CIFAR-10 and CIFAR-100 as published: python batches (md5-checked, restricted unpickler) and binary batches.

File names, md5 sums and addresses come from torchvision's data set classes; torchvision itself would unpickle freely.
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from blink.errors import UserError
from blink.training.data.dataset import Arrays
from blink.training.data.downloading import downloading
from blink.training.data.layouts import Layout

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

# what torchvision knows of each: (file name, md5) pairs, the keys inside, where it comes from
PUBLISHED: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}

_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits what the official files name (numpy arrays of bytes) and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a CIFAR batch never does")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def restricted_load(path: Path) -> dict:
    """Unpickle a python batch. Raises UserError when it is truncated, damaged or names anything unexpected."""
    try:
        content = _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # an untrusted pickle can fail in any way
        raise UserError(f"{path} is not a readable CIFAR python batch: {error}; download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a CIFAR batch's dictionary")
    return content


def read(folder: Path, layout: Layout) -> Arrays:
    """Read `folder` (layout.folder itself). Raises UserError for a file that is missing, damaged or malformed."""
    classes, read = (_binary if layout.label_bytes else _python)(folder, layout)
    halves = []
    for names in (layout.train, layout.test):
        rows, labels = map(np.concatenate, zip(*(read(folder / name) for name in names)))
        labels = labels.astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(
                f"{folder} holds the label {int(labels.max())}, but names only {len(classes)} classes; "
                "download it again"
            )
        halves += [np.ascontiguousarray(rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)), labels]
    return classes, *halves


def _python(folder: Path, layout: Layout) -> tuple[tuple[str, ...], Callable]:
    """Class names, and what reads the image rows and labels of one file; all files are checked before any is read."""
    source = PUBLISHED[layout.name]
    files = [*source.train_list, *source.test_list, (layout.classes, source.meta["md5"])]
    for name, md5 in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; a {layout.name} folder holds {', '.join(n for n, _ in files)}")
        if not check_integrity(str(path), md5):
            raise UserError(f"{path} does not match its published md5 {md5}: truncated or damaged; download it again")
    classes = restricted_load(folder / layout.classes).get(source.meta["key"])
    if not isinstance(classes, list):
        raise UserError(f"{folder / layout.classes} lacks the key {source.meta['key']!r}; download it again")

    def read(path: Path) -> tuple[np.ndarray, list[int]]:
        batch = restricted_load(path)
        data, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
            raise UserError(f"{path} lacks its uint8 image rows under 'data'; download it again")
        if not isinstance(labels, list) or len(labels) != len(data) or data.shape[1] != _PIXELS:
            raise UserError(f"{path} holds image rows of {data.shape} and labels that do not match; download it again")
        return data, labels

    return tuple(map(str, classes)), read


def _binary(folder: Path, layout: Layout) -> tuple[tuple[str, ...], Callable]:
    """The same of the binary version: records of label byte(s) and 3,072 pixels."""
    class_file, record = folder / layout.classes, layout.label_bytes + _PIXELS
    if not class_file.is_file():
        raise UserError(f"{folder} lacks {layout.classes}, which names the classes; download it again")
    try:
        classes = tuple(line.strip() for line in class_file.read_text().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{class_file} is no text ({error}); download it again") from error

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        if not path.is_file():
            raise UserError(f"{folder} lacks {path.name}; a binary {layout.name} folder holds it; download it again")
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % record:
            raise UserError(
                f"{path} is truncated: {raw.size} bytes is no multiple of its {record}-byte records; download it again"
            )
        rows = raw.reshape(-1, record)
        return rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1]

    return classes, read


def download(root: Path, name: str) -> None:
    """Download and unpack below `root`. Raises UserError within seconds when there is no network."""
    source = PUBLISHED[name]
    with downloading(root, name) as folder:
        download_url(source.url, str(root), source.filename, source.tgz_md5)
        with tarfile.open(root / source.filename) as archive:
            archive.extractall(folder, filter="data")
        (folder / source.base_folder).rename(root / source.base_folder)
