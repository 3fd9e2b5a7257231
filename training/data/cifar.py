"""CIFAR-10 and CIFAR-100 as published: python batches (md5-checked, restricted unpickler) and binary batches.

File names, md5 sums and addresses come from torchvision's data set classes; torchvision itself would unpickle freely.
"""

import io
import pickle
import socket
import tarfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from blink.training.data import layouts
from blink.training.data.dataset import Arrays
from blink.training.data.layouts import Layout
from blink.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
SOCKET_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Published(Layout):
    """A layout with what torchvision knows of it: (file name, md5) pairs, the keys inside, where it comes from."""

    train_files: tuple[tuple[str, str], ...]
    test_files: tuple[tuple[str, str], ...]
    meta_md5: str
    label_key: str
    class_key: str
    url: str
    archive: str
    archive_md5: str

    @property
    def files(self) -> list[tuple[str, str]]:
        return [*self.train_files, *self.test_files, (self.meta_file, self.meta_md5)]


def _published(layout: Layout, source: type[CIFAR10], label_key: str) -> Published:
    return Published(
        **asdict(layout),
        train_files=tuple(map(tuple, source.train_list)),
        test_files=tuple(map(tuple, source.test_list)),
        meta_md5=source.meta["md5"],
        label_key=label_key,
        class_key=source.meta["key"],
        url=source.url,
        archive=source.filename,
        archive_md5=source.tgz_md5,
    )


PUBLISHED = {
    "cifar10": _published(layouts.LAYOUTS["cifar10"], CIFAR10, "labels"),
    "cifar100": _published(layouts.LAYOUTS["cifar100"], CIFAR100, "fine_labels"),
}

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


def read_python_batches(folder: Path, layout: Published) -> Arrays:
    """Read `folder` (layout.folder itself). Raises UserError for a missing file, a wrong md5 or malformed content."""
    for name, md5 in layout.files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; a {layout.name} folder holds {_names(layout.files)}")
        if not check_integrity(str(path), md5):
            raise UserError(f"{path} does not match its published md5 {md5}: truncated or damaged; download it again")
    classes = restricted_load(folder / layout.meta_file).get(layout.class_key)
    if not isinstance(classes, list):
        raise UserError(f"{folder / layout.meta_file} lacks the key {layout.class_key!r}; download it again")
    halves = []
    for files in (layout.train_files, layout.test_files):
        images, labels = [], []
        for name, _ in files:
            batch = restricted_load(folder / name)
            data, numbers = batch.get("data"), batch.get(layout.label_key)
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
                raise UserError(f"{folder / name} lacks its uint8 image rows under 'data'; download it again")
            if not isinstance(numbers, list) or len(numbers) != len(data) or data.shape[1] != _PIXELS:
                raise UserError(
                    f"{folder / name} holds image rows of {data.shape} and labels that do not match; download it again"
                )
            images.append(data)
            labels += numbers
        halves += [_to_nhwc(np.concatenate(images)), _checked_labels(labels, len(classes), folder)]
    return tuple(map(str, classes)), *halves


def read_binary_batches(folder: Path, layout: Layout) -> Arrays:
    """Read the binary version: records of label byte(s) and 3,072 pixels. Raises UserError for a truncated file."""
    record = layout.label_bytes + _PIXELS
    halves = []
    class_file = folder / layout.binary_classes
    if not class_file.is_file():
        raise UserError(f"{folder} lacks {layout.binary_classes}, which names the classes; download it again")
    try:
        classes = tuple(line.strip() for line in class_file.read_text().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{class_file} is no text ({error}); download it again") from error
    for files in (layout.binary_train, layout.binary_test):
        rows = []
        for name in files:
            path = folder / name
            if not path.is_file():
                raise UserError(f"{folder} lacks {name}; a binary {layout.name} folder holds it; download it again")
            raw = np.fromfile(path, dtype=np.uint8)
            if raw.size == 0 or raw.size % record:
                raise UserError(
                    f"{path} is truncated: {raw.size} bytes is no multiple of its {record}-byte records; "
                    "download it again"
                )
            rows.append(raw.reshape(-1, record))
        table = np.concatenate(rows)
        labels = _checked_labels(table[:, layout.label_bytes - 1], len(classes), folder)
        halves += [_to_nhwc(table[:, layout.label_bytes :]), labels]
    return classes, *halves


def _checked_labels(labels, classes: int, folder: Path) -> np.ndarray:
    labels = np.asarray(labels, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{folder} holds the label {int(labels.max())}, but names only {classes} classes; download it again"
        )
    return labels


def _to_nhwc(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


def _names(files: list[tuple[str, str]]) -> str:
    return ", ".join(name for name, _ in files)


@contextmanager
def _socket_timeout(seconds: float):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(root: Path, layout: Published) -> Path:
    """Download and unpack into root / layout.folder. Raises UserError within seconds when there is no network."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision sets no timeout of its own, and a silent network would hang for minutes
        with _socket_timeout(SOCKET_TIMEOUT_SECONDS):
            download_url(layout.url, str(root), layout.archive, layout.archive_md5)
        with tarfile.open(root / layout.archive) as archive:
            archive.extractall(root, filter="data")
    except (URLError, HTTPException, OSError, EOFError, RuntimeError, tarfile.TarError) as error:
        lines = str(getattr(error, "reason", error)).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"could not download {layout.name} ({reason}); put it under {root}, or name other data with --data"
        ) from error
    return root / layout.folder
