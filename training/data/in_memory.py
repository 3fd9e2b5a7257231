"""Data that is in memory already: arrays, tensors or torch data sets."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from blink.errors import UserError
from blink.training.data.dataset import Dataset, assemble, held_back_by_class
from blink.training.data.decoding import fit, pixels_from
from blink.training.data.image_tree import VAL_SPLIT

_EXPECTED = (
    "data is a path or a name, (images, labels), (train_images, train_labels, test_images, test_labels), a torch "
    "Dataset, or (train_dataset, test_dataset)"
)


def from_memory(
    data, size: int | None = None, val_split: float | None = None, classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:  # fmt: skip
    """A data set of what is in memory.

    data: (images, labels) or (train_images, train_labels, test_images, test_labels): uint8 arrays or tensors
    [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3, or sequences of what `decoding.pixels_from` takes, and
    integers [N]; or a torch Dataset of (image, label), or one for training and one for testing.
    size: the side that all images are brought to (`decoding.fit`); None: theirs, which must be one then. val_split: the
    part of each class that is for testing where no test images are given. classes: their names; None: the data set's
    `classes`, else the numbers. Raises UserError for anything else.
    """
    halves = _halves(data)
    if len(halves) == 2 and val_split is not None:
        raise UserError("val_split: test images are given; leave it out")
    if classes is None:
        classes = getattr(data[0] if isinstance(data, tuple | list) else data, "classes", None)
    read = [_read(*half, size) for half in halves]
    shapes = Counter(images.shape[1:] for images, _ in read)
    if len(shapes) > 1:
        found = " and ".join(f"{h}x{w}" for h, w, _ in shapes)
        raise UserError(f"training and test images are of {found}; give them one size, or size=N")
    highest = max(int(labels.max()) for _, labels in read)
    names = tuple(map(str, classes)) if classes is not None else tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise UserError(f"there is a label {highest}, and classes are {len(names)}; labels are 0, 1, 2, ...")
    if len(read) == 1:
        (images, labels), part = read[0], VAL_SPLIT if val_split is None else val_split
        held = held_back_by_class(labels, names, part)
        read = [(images[~held], labels[~held]), (images[held], labels[held])]
    (images, labels), (test_images, test_labels) = read
    return assemble(name, names, images, labels, test_images, test_labels)


def _halves(data) -> list[tuple]:
    """[(images, labels)] of training and, if given, of testing."""
    if _is_dataset(data):
        return [_columns(data)]
    if isinstance(data, tuple | list):
        if len(data) == 2 and all(map(_is_dataset, data)):
            return [_columns(half) for half in data]
        if len(data) in (2, 4) and not any(map(_is_dataset, data)):
            return [tuple(data[i : i + 2]) for i in range(0, len(data), 2)]
    raise UserError(f"{_EXPECTED}; found {type(data).__name__}")


def _is_dataset(data) -> bool:
    return isinstance(data, torch.utils.data.Dataset)


def _columns(dataset) -> tuple[list, list[int]]:
    """(images, labels) of a torch Dataset of pairs."""
    images, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"item {i} of the data set is no pair (image, label), but {type(item).__name__}")
        images.append(item[0])
        labels.append(item[1])
    return images, labels


def _read(images, labels, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """([N, H, W, 3] uint8, [N] int64)."""
    images, labels = (x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (images, labels))
    labels = np.asarray([int(label) for label in labels], dtype=np.int64) if len(labels) else np.empty(0, np.int64)
    if not len(images) or len(images) != len(labels):
        raise UserError(f"there are {len(images)} images and {len(labels)} labels; expected one label an image")
    if labels.min() < 0:
        raise UserError(f"there is a label {labels.min()}; labels are 0, 1, 2, ...")
    pixels = []
    for i, image in enumerate(images):
        try:
            found = pixels_from(image)
        except UserError as error:
            raise UserError(f"image {i}: {error}") from error
        pixels.append(found if size is None else fit(found, size, size))
        if pixels[-1].shape != pixels[0].shape:
            (h, w, _), (h0, w0, _) = pixels[-1].shape, pixels[0].shape
            raise UserError(f"image {i} is of {h}x{w}, those before of {h0}x{w0}; give them one size, or size=N")
    return np.stack(pixels), labels
