"""Labelled images for a network that is trained: any data set, brought to its image size and its numbers of classes."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blink.command import fraction
from blink.errors import UserError
from blink.inference.classifier import Classifier
from blink.inference.images import batches, listed_images, readable
from blink.training import data
from blink.training.data import image_tree, parquet
from blink.training.data.dataset import Dataset, fixed_order
from blink.training.report import GENERATED_WARNING

_BATCH = 500


@dataclass
class Labelled:
    """images [N, H, W, C] uint8 and labels [N] int64, the network's numbers, in the data set's fixed order.

    names: of each image its file, or the half and its number in it; positions: where it stands in the order of the
    files; half: of which they are. fingerprint: of the data set that they are of, as a training would see it; None:
    it is not known, and not the one that the network was trained on. notes: what a person should know, in lines.
    """

    name: str
    half: str
    images: Tensor
    labels: Tensor
    names: list[str]
    positions: list[int]
    fingerprint: str | None
    notes: list[str]


def read_labelled(
    source: str, model: Classifier, half: str | None, val_split: float | None, limit: int | None,
    progress: data.Progress, complain: Callable[[UserError], None],
) -> Labelled:  # fmt: skip
    """What `--data SOURCE` names, for this network.

    half: of `shared.HALVES`; None: test, or all of a folder without halves. val_split: as a training's, of which
    "train" and "test" of a folder without halves are; None: that of the network's own. limit: the first so many.
    progress(done, total) is called while images are decoded, complain(error) for each that cannot be, and it is left
    out.
    Raises UserError for no such data, a class that the network does not know, and no image at all.
    """
    if source in data.NAMES:
        return _published(source, model, half, val_split, limit, progress)
    path = Path(source)
    with data.reading(path):
        if data.published(path) or parquet.locate(path):
            return _published(source, model, half, val_split, limit, progress)
        found = _of_folder(path, model, half, val_split, limit, progress, complain)
    if not len(found.images):
        raise UserError(f"{path} holds no image that can be read")
    return found


def numbers_of(labels: Sequence[str], classes: tuple[str, ...], source: str) -> Tensor:
    """[N] int64: the network's number of each image's class. Raises UserError for a class that it does not know."""
    places = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in dict.fromkeys(labels) if name not in places]
    if unknown:
        raise UserError(
            f"{source} holds the class {image_tree.quoted(unknown)}, which this network does not know; it knows "
            f"{image_tree.quoted(classes)}"
        )
    return torch.tensor([places[name] for name in labels], dtype=torch.int64)


def _missing(labels: Tensor, classes: tuple[str, ...]) -> list[str]:
    """A line on classes without images."""
    missing = [name for name, count in zip(classes, labels.bincount(minlength=len(classes)).tolist()) if not count]
    return [f"no image of {image_tree.quoted(missing)}"] if missing else []


def _published(
    source: str, model: Classifier, half: str | None, val_split: float | None, limit: int | None, progress
) -> Labelled:
    notes: list[str] = []
    dataset = data.load(source, progress, notes.append, val_split=val_split)
    if dataset.generated:
        notes.append(GENERATED_WARNING)
    half = half or "test"
    images, labels, names, positions = [], [], [], []
    for name, pixels, numbers in (
        ("train", dataset.train_images, dataset.train_labels), ("test", dataset.test_images, dataset.test_labels)
    ):  # fmt: skip
        if half in (name, "all"):
            order = fixed_order(len(pixels)).tolist()[:limit]
            names += [f"{name} {i}" for i in order]
            # training images come first
            positions += [i + (len(dataset.train_images) if name == "test" and half == "all" else 0) for i in order]
            images.append(pixels[:limit])
            labels.append(numbers[:limit])
    labels = numbers_of([dataset.classes[i] for i in torch.cat(labels).tolist()], model.classes, source)
    images = resized(torch.cat(images), model, notes)
    notes += _missing(labels, model.classes)
    return Labelled(dataset.name, half, images, labels, names, positions, dataset.fingerprint, notes)


def resized(images: Tensor, model: Classifier, notes: list[str]) -> Tensor:
    """Images [N, H, W, C] at the network's size; a note is added where that is another."""
    _, height, width = model.image_shape
    if images.shape[1:3] == (height, width) and images.shape[3] == model.image_shape[0]:
        return images
    (_, h, w, _) = images.shape
    notes.append(f"images of {h}x{w} are scaled and cropped to the network's {height}x{width}")
    return torch.cat([part.permute(0, 2, 3, 1) for part in batches(images, model.image_shape, _BATCH)])


def _of_folder(
    path: Path, model: Classifier, half: str | None, val_split: float | None, limit: int | None, progress, complain
) -> Labelled:
    located = image_tree.locate(path)
    # a folder of one class cannot be trained on, but be tested
    alone = located is None or path in located[0].parents
    if alone and any(folder.name in model.classes for folder in image_tree.folders(path)):
        located = path, []
    if located is None:
        raise UserError(f"{path} holds neither <class>/<images>, in train/ and test/ or without, nor CIFAR batches")
    root, notes = located
    tests = image_tree.test_images(root)
    if half is None and path.resolve().parent == root.resolve():
        # one of its halves is named, or one that it does not use
        notes, whole = [], path.resolve()
        if whole.name == image_tree.TRAIN or (tests is not None and whole == tests.resolve()):
            half = "train" if whole.name == image_tree.TRAIN else "test"
        else:
            root, tests = path, None
    split = tests is not None
    half = half or ("test" if split else "all")
    if val_split is not None and (split or half == "all"):
        raise UserError("--val-split is for --half train or test of a folder without test images; leave it out")
    if not split:
        val_split = val_split or _val_split_of(model.facts)
    listed = image_tree.list_half(root, half, None if split else val_split)
    order = fixed_order(len(listed)).tolist()[:limit]
    # before the work
    numbers_of([name for _, name in listed], model.classes, str(root))
    place = {listed[i][0]: i for i in order}
    files, images = [], []
    progress(0, len(place))
    for paths, decoded in readable(place, model.image_shape, _BATCH, complain):
        files += paths
        images.append(decoded.permute(0, 2, 3, 1))
        progress(len(files), len(place))
    positions = [place[file] for file in files]
    labels = numbers_of([listed[i][1] for i in positions], model.classes, str(root))
    fingerprint = None if half == "test" else _fingerprint(root, model, None if split else val_split, progress)
    channels, height, width = model.image_shape
    pixels = torch.cat(images) if images else torch.empty(0, height, width, channels, dtype=torch.uint8)
    names, notes = list(map(str, files)), [*notes, *_missing(labels, model.classes)]
    return Labelled(root.resolve().name, half, pixels, labels, names, positions, fingerprint, notes)


def _val_split_of(facts: dict) -> float | None:
    """What the training's command says, so that its own test images are found again."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--val-split", type=fraction)
    try:
        return parser.parse_known_args(list(map(str, facts.get("command") or ())))[0].val_split
    except argparse.ArgumentError:
        return None


def _fingerprint(root: Path, model: Classifier, val_split: float | None, progress: data.Progress) -> str | None:
    """Of the folder as a training at the network's size would read it, if it can be the one that the network knows."""
    trained = model.facts.get("data") or {}
    try:
        tree = image_tree.list_images(root, val_split)
        # most folders are known to be others without being decoded
        if tree.classes != model.classes or len(tree.files[0]) < trained.get("train", 0):
            return None
        return data.read(root, progress, lambda line: None, model.image_shape[1:], val_split).fingerprint
    except UserError:
        # no data set to train on
        return None


def some_images(source: str, model: Classifier, most: int, progress: data.Progress) -> tuple[Tensor, list[str]]:
    """([N, C, H, W] uint8 at the network's size, notes): at most `most` images of any data, which needs no classes: of
    a data set its first test images, else files from all over a folder. Raises UserError.
    """
    notes: list[str] = []
    if source in data.NAMES or (Path(source).is_dir() and data.published(Path(source))):
        dataset: Dataset = data.load(source, progress, notes.append)
        return resized(dataset.test_images[:most], model, notes).permute(0, 3, 1, 2), notes
    files = list(listed_images([source]))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)]
    return torch.cat(list(batches(chosen, model.image_shape, _BATCH))), notes
