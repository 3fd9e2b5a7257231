"""A data set in memory: uint8 images in one fixed shuffled order."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blink.errors import UserError

# the per-channel statistics that CIFAR-10 recipes were tuned with
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

# what a reader gives: class names, then images [N, H, W, 3] and labels [N] of both halves
Arrays = tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """Images [N, H, W, 3] uint8 and labels [N] int64 for training and test; mean, std [3] float32 in units of 0..1.

    fingerprint: of the decoded pixels and labels, so the same on every machine. generated: not a real data set. mirror:
    whether an image's mirror image is one of the same class, unlike a digit's.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    generated: bool = False
    mirror: bool = True

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        _, height, width, channels = self.train_images.shape
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def limited(self, count: int | None) -> "Dataset":
        """The first `count` training and the first `count` test images, with a fingerprint of their own; the pixel
        statistics stay those of the whole.
        """
        if count is None or count >= max(len(self.train_images), len(self.test_images)):
            return self
        cut = {key: value[:count] for key, value in vars(self).items() if key.startswith(("train_", "test_"))}
        return replace(
            self, **cut, fingerprint=fingerprint(self.classes, *(part.cpu().numpy() for part in cut.values()))
        )

    def tuning_split(self, per_class: int = 500) -> "Dataset":
        """A fixed stratified split of the training images: the first `per_class` of each class, in the fixed order, are
        the test half (at most half of the class), the others are trained on. What is tuned on it never saw a test
        image.
        """
        held = torch.zeros_like(self.train_labels, dtype=torch.bool)
        for label in range(len(self.classes)):
            members = (self.train_labels == label).nonzero()[:, 0]
            held[members[: min(per_class, len(members) // 2)]] = True
        return replace(
            self,
            name=f"{self.name}, tuning split",
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )


def fixed_order(count: int) -> np.ndarray:
    """The order every data set of `count` images is held in; it depends on nothing else.

    RandomState, because its stream is frozen by numpy's compatibility policy, unlike Generator's and torch's.
    """
    return np.random.RandomState(0).permutation(count)


def beginning(count: int, limit: int | None) -> np.ndarray:
    """[at most limit] int: which of `count` images to take so that these alone, put in their fixed order, are the
    beginning of all of them in theirs.
    """
    first = fixed_order(count)[:limit]
    chosen = np.empty_like(first)
    chosen[fixed_order(len(first))] = first
    return chosen


def fingerprint(classes: tuple[str, ...], *arrays: np.ndarray) -> str:
    """Of the classes' names and of images and labels, which are in their fixed order: 12 hexadecimal digits."""
    digest = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape"))
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def held_back(count: int, part: float) -> np.ndarray:
    """[count] bool: which of a class's images are for testing, this part of them but at least one, and not all."""
    held = np.zeros(count, dtype=bool)
    held[fixed_order(count)[: min(max(1, round(part * count)), count - 1)]] = count > 1
    return held


def held_back_by_class(labels: np.ndarray, classes: tuple[str, ...], part: float) -> np.ndarray:
    """[N] bool: which images are for testing, of each class as `held_back`. Raises UserError for a class of one."""
    held = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            raise UserError(f"class {name!r} has one image; expected two or more, one to train on and one to test")
        held[members[held_back(len(members), part)]] = True
    return held


def pixel_statistics(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation in units of 0..1, exact from the integer histogram."""
    levels = np.arange(256, dtype=np.float64) / 255
    counts = np.stack([np.bincount(channel, minlength=256) for channel in images.reshape(-1, images.shape[-1]).T])
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    # a constant channel has no scale to divide by
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 0, std, 1.0)).float()


def assemble(
    name: str,
    classes: tuple[str, ...],
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    generated: bool = False,
    mirror: bool = True,
) -> Dataset:
    """Put both halves in the fixed order, take the fingerprint and, unless given, the pixel statistics."""
    parts = []
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        order = fixed_order(len(images))
        parts += [np.ascontiguousarray(images[order]), np.ascontiguousarray(labels[order], dtype=np.int64)]
    if statistics is None:
        mean, std = pixel_statistics(parts[0])
    else:
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in statistics)
    facts = dict(mean=mean, std=std, generated=generated, mirror=mirror)
    return Dataset(name, fingerprint(classes, *parts), classes, *map(torch.from_numpy, parts), **facts)
