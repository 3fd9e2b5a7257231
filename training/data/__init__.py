"""Data sets: what `--data` names is found, read by the reader that fits, cached, and held in one fixed order.

torchvision, which reads the published data sets, is imported only when there is no cached copy: that takes two seconds.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from blink.errors import UserError
from blink.training.data import cache, image_tree
from blink.training.data.dataset import CIFAR10_MEAN, CIFAR10_STD, Dataset, assemble
from blink.training.data.layouts import LAYOUTS, Layout

DEFAULT_ROOT = Path("data")
Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def load(
    source: str | None, progress: Progress, note: Note, size: int | None = None, val_split: float | None = None
) -> Dataset:
    """The data set that `source` names: a path, `cifar10`, `cifar100`, `synthetic`, or None for the default.

    The default is a local CIFAR-10, else a download, else the generated set. progress(done, total) is called while
    images are decoded; note(line) when something worth a line happens. size, val_split: of an image folder, see
    `image_tree.read_image_tree`. Raises UserError for anything unusable.
    """
    if source == "synthetic":
        _only_for_folders(size, val_split)
        return generated()
    name = source or "cifar10"
    folders = [DEFAULT_ROOT / layout.folder for layout in LAYOUTS if layout.name == name]
    if not folders:
        return read(Path(name), progress, note, size, val_split)
    _only_for_folders(size, val_split)
    for folder in folders:
        if folder.is_dir():
            return read(folder, progress, note)
    from blink.training.data import cifar

    note(f"downloading {name} ...")
    try:
        folder = cifar.download(DEFAULT_ROOT, name)
    except UserError as error:
        if source is not None:
            raise
        note(str(error))
        return generated()
    return read(folder, progress, note)


def _only_for_folders(size: int | None, val_split: float | None) -> None:
    for option, value in (("--size", size), ("--val-split", val_split)):
        if value is not None:
            raise UserError(f"{option} is for folders of images; leave it out")


def generated() -> Dataset:
    """The embedded generated set: not CIFAR-10, and it says so."""
    from blink.training.data import synthetic

    arrays = synthetic.generate()
    return assemble("generated shapes (not CIFAR-10)", synthetic.CLASSES, *arrays, generated=True)


def read(
    path: Path, progress: Progress, note: Note, size: int | tuple[int, int] | None = None,
    val_split: float | None = None,
) -> Dataset:  # fmt: skip
    """Read the data set at `path`, from the cache if it was decoded before. Raises UserError."""
    with reading(path):
        root, name, reader, statistics = _recognize(path, progress, note, said := [], size, val_split)
        key = cache.source_key(root, f"{size} {val_split}")
        dataset, notes = cache.load(key)
        for line in notes:
            note(line)
        decoded = None if dataset is not None else reader()
    if decoded is not None:
        dataset = assemble(name, *decoded, statistics=statistics)
        warning = cache.store(key, dataset, said)
        if warning:
            note(warning)
    return dataset


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, `path` is a folder, and what cannot be read in it is one line. Raises UserError."""
    try:
        if not path.exists():
            raise UserError(f"there is no {path}; --data takes a folder, or cifar10, cifar100, synthetic")
        if not path.is_dir():
            raise UserError(f"{path} is a file; --data takes a folder: unpack it first")
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); make it readable") from error


def _recognize(path: Path, progress: Progress, note: Note, said: list[str], size, val_split: float | None):
    """(folder, data set name, reader, fixed pixel statistics or None) of whichever layout `path` holds.

    said: gets the lines that the reader notes, which a cached copy says again.
    """
    found = published(path)
    if found:
        _only_for_folders(size, val_split)
        root, layout = found
        statistics = (CIFAR10_MEAN, CIFAR10_STD) if layout.name == "cifar10" else None
        return root, layout.name, partial(_read_published, root, layout), statistics
    tree = image_tree.locate(path)
    if tree:
        root, notes = tree
        for line in notes:
            note(line)

        def noted(line: str) -> None:
            said.append(line)
            note(line)

        # a name that is no text is shown as far as it is
        name = os.fsencode(root.resolve().name).decode(errors="replace")
        return root, name, partial(image_tree.read_image_tree, root, progress, noted, size, val_split), None
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "") if found else "nothing"
    raise UserError(
        f"{path} holds neither <class>/<images>, in train/ and test/ or without, nor CIFAR batches; it holds {listed}"
    )


def published(path: Path) -> tuple[Path, Layout] | None:
    """(the folder of a published data set in or at this folder, how it is laid out), or None."""
    halves = any((path / name).is_dir() for name in (image_tree.TRAIN, *image_tree.TESTS))
    for layout in LAYOUTS if not halves or any(path.glob("cifar-*")) else ():
        for root in (path, path / layout.folder):
            if (root / layout.train[0]).is_file() or (root / layout.classes).is_file():
                return root, layout
    return None


def _read_published(root: Path, layout: Layout):
    from blink.training.data import cifar

    return cifar.read_batches(root, layout)
