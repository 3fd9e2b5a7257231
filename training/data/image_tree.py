"""Image folders: a folder a class, in train/ and test/ (or val/), or without halves, which are then made."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from blink.errors import UserError
from blink.training.data.dataset import Arrays, beginning, held_back
from blink.training.data.decoding import common_size, decode, extensions, is_image, names_image, size_of

_CHUNK = 500
TRAIN, TESTS = "train", ("test", "val", "valid", "validation")
# of each class, where a data set has no test images of its own
VAL_SPLIT = 0.1


@dataclass(frozen=True)
class Tree:
    """classes: names, sorted; files and labels: of training and of test, each sorted by class and name; notes: what a
    person should know of how they were found, in lines.
    """

    classes: tuple[str, ...]
    files: tuple[list[str], list[str]]
    labels: tuple[np.ndarray, np.ndarray]
    notes: list[str]


def locate(path: Path) -> tuple[Path, list[str]] | None:
    """(the folder of the data set that `path` is meant for, notes): itself; the folder around it, if it is one of two
    halves; or the only folder inside of it. None where there is no image data set.
    """
    if _half(path, (TRAIN, *TESTS)):
        return path, []
    # the folder's real name, whatever it was called here
    whole = path.resolve()
    if whole.name in (TRAIN, *TESTS) and _half(whole.parent, (TRAIN,)) and _half(whole.parent, TESTS):
        return path.parent if path.name == whole.name else whole.parent, [
            f"{path} is a part of a data set: all of it is taken"
        ]
    inside = folders(path)
    if sum(any(map(is_image, folder.rglob("*"))) for folder in inside) > 1:
        return path, []
    inner = locate(inside[0]) if len(inside) == 1 else None
    return inner and (inner[0], [f"the images are in {inner[0]}", *inner[1]])


def list_images(root: Path, val_split: float | None = None) -> Tree:
    """The images of a data set that `locate` found.

    val_split: the part of each class that is for testing where there are no halves or no second one, at least one image
    and in an order that depends on nothing but their number; None: `VAL_SPLIT`.
    Raises UserError for a folder without classes or images, for a class that one half lacks, and for a val_split where
    there are test images.
    """
    train, test = _half(root, (TRAIN,)), _half(root, TESTS)
    if test is None:
        return _split(train or root, VAL_SPLIT if val_split is None else val_split)
    if val_split is not None:
        raise UserError(f"--val-split: {root} has test images of its own, in {test.name}/; leave it out")
    if train is None:
        raise UserError(f"{root / TRAIN} is not a folder; an image data set holds train/<class>/* and test/<class>/*")
    names = {half: [folder.name for folder in _class_folders(half)] for half in (train, test)}
    for half, other in ((test, train), (train, test)):
        missing = [name for name in names[other] if name not in names[half]]
        if missing:
            raise UserError(f"{half} lacks the class {quoted(missing)} that {other.name} has; every class needs both")
    others = Counter()
    files = [list(_classes(half, others).values()) for half in (train, test)]
    return _tree(tuple(names[train]), *files, _left_out(others))


def test_images(root: Path) -> Path | None:
    """The half for testing of a data set that `locate` found, if it has one."""
    return _half(root, TESTS)


def list_half(
    root: Path, half: Literal["train", "test", "all"], val_split: float | None = None
) -> list[tuple[Path, str]]:
    """The images of a data set that `locate` found, each with the name of its class, sorted by half, class and name.

    It need not be one to train on: a class may have no images, or be in one half only. Where it has no test images of
    its own, "train" and "test" are as `list_images` splits it. Raises UserError for no image.
    """
    if half != "all" and test_images(root) is None:
        tree, which = list_images(root, val_split), int(half == "test")
        return [(Path(file), tree.classes[label]) for file, label in zip(tree.files[which], tree.labels[which])]
    train, test = _half(root, (TRAIN,)), _half(root, TESTS)
    halves = [*([train] if half != "test" else []), *([test] if half != "train" else [])]
    inside = [folder for folder in halves if folder is not None] or ([root] if half == "all" else [])
    found = [(file, name) for folder in inside for name, files in _listed(folder).items() for file in files]
    if not found:
        raise UserError(f"{root} holds no image in a folder of its class for --half {half}; name another folder")
    return found


def _split(root: Path, part: float) -> Tree:
    found = _classes(root, others := Counter())
    single = [name for name, files in found.items() if len(files) < 2]
    if single:
        raise UserError(f"{root / single[0]} holds one image; expected two or more, one to train on and one to test")
    train, test = [], []
    for files in found.values():
        held = held_back(len(files), part)
        train.append([path for path, for_testing in zip(files, held) if not for_testing])
        test.append([path for path, for_testing in zip(files, held) if for_testing])
    return _tree(tuple(found), train, test, [held_back_note(part), *_left_out(others)])


def held_back_note(part: float) -> str:
    return f"no test images of its own: {part:.0%} of each class's images are held back for testing (--val-split)"


def _tree(classes: tuple[str, ...], train: list[list[str]], test: list[list[str]], notes: list[str]) -> Tree:
    files = tuple([path for own in half for path in own] for half in (train, test))
    labels = tuple(np.repeat(np.arange(len(classes)), list(map(len, half))) for half in (train, test))
    return Tree(classes, files, labels, notes)


def read(
    root: Path,
    progress: Callable[[int, int], None],
    note: Callable[[str], None] = lambda line: None,
    size: int | tuple[int, int] | None = None,
    val_split: float | None = None,
    limit: int | None = None,
) -> Arrays:
    """Decode the images of a data set, calling progress(done, total) as it goes and note(line) for what is to be said.

    size: the side, or height and width, that all are brought to (`decoding.fit`); None: the `decoding.common_size` of
    all that are there. val_split: see `list_images`. limit: decode no more images of a half than these first ones of
    the fixed order; None: all. Raises UserError, which names the first image that cannot be decoded.
    """
    tree = list_images(root, val_split)
    for line in tree.notes:
        note(line)
    if size is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            size = common_size(pool.map(size_of, map(Path, [*tree.files[0], *tree.files[1]])), note)
    height, width = (size, size) if isinstance(size, int) else size
    chosen = [beginning(len(half), limit) for half in tree.files]
    files = [Path(half[i]) for half, some in zip(tree.files, chosen) for i in some]
    images = np.empty((len(files), height, width, 3), dtype=np.uint8)

    def decode_chunk(start: int) -> int:
        for i in range(start, min(start + _CHUNK, len(files))):
            images[i] = decode(files[i], size=(height, width))
        return min(_CHUNK, len(files) - start)

    done = 0
    # Pillow decodes outside the interpreter lock, so threads use every core; what is left when one fails is cancelled
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for decoded in pool.map(decode_chunk, range(0, len(files), _CHUNK)):
            done += decoded
            progress(done, len(files))
    labels = [own[some] for own, some in zip(tree.labels, chosen)]
    cut = len(chosen[0])
    return tree.classes, images[:cut], labels[0], images[cut:], labels[1]


def _half(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these folders that there is."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _class_folders(half: Path) -> list[Path]:
    """Raises UserError for none."""
    found = folders(half)
    if not found:
        raise UserError(f"{half} holds no class folder; expected {half.name}/<class>/<images>")
    return found


def _classes(half: Path, others: Counter) -> dict[str, list[str]]:
    """The images of each class, in its folder and those inside of it; the endings of what is no image are counted in
    `others`. Raises UserError.
    """
    found = {}
    for folder in _class_folders(half):
        # names and not paths, of which a million take a minute
        files = []
        for place, _, names in os.walk(folder, onerror=_refuse):
            for name in names:
                if names_image(name):
                    files.append(os.path.join(place, name))
                elif not name.startswith("."):
                    others[os.path.splitext(name)[1].lower() or name] += 1
        if not files:
            raise UserError(f"{folder} holds no image; expected files ending in {', '.join(extensions())}")
        # as paths are sorted, by one part after another
        found[folder.name] = sorted(files, key=lambda file: file.replace(os.sep, "\0"))
    return found


def _listed(half: Path) -> dict[str, list[Path]]:
    """The images of each class, in its folder and those inside of it. Raises UserError for no class."""
    return {folder.name: sorted(filter(is_image, folder.rglob("*"))) for folder in _class_folders(half)}


def _refuse(error: OSError) -> None:
    raise error


def _left_out(others: Counter) -> list[str]:
    """A line on files in class folders that are no images, if there are any."""
    endings = ", ".join(ending for ending, _ in others.most_common(5))
    counted = "1 file is no image" if others.total() == 1 else f"{others.total()} files are no images"
    return [f"{counted} and left out ({endings})"] if others else []


def quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
