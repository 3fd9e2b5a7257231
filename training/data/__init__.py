"""Data sets: what `--data` names is found, read by the reader that fits, cached, and held in one fixed order.

torchvision, which reads the published data sets, is imported only when there is no cached copy: that takes two seconds.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from blink.errors import UserError
from blink.training.arguments import no_data
from blink.training.data import cache, image_tree, parquet
from blink.training.data.dataset import CIFAR10_MEAN, CIFAR10_STD, Arrays, Dataset, assemble
from blink.training.data.layouts import LAYOUTS, Layout, recognize

DEFAULT_ROOT = Path("data")
NAMES = (*dict.fromkeys(layout.name for layout in LAYOUTS), "synthetic")
Progress = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass
class _Found:
    """A data set before it is read.

    read: gives its arrays. said: the lines that it notes while it reads, which a cached copy says again. options: how
    it is read. files: the names of its files in `root`; None: all that are there. statistics: fixed ones of its pixels,
    or None. mirror: see `Dataset`.
    """

    root: Path
    name: str
    read: Callable[[], Arrays]
    said: list[str]
    options: str = ""
    files: tuple[str, ...] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    mirror: bool = True


def load(
    source: str | None, progress: Progress, note: Note, size: int | None = None, val_split: float | None = None,
    limit: int | None = None,
) -> Dataset:  # fmt: skip
    """The data set that `source` names: a path, one of `NAMES`, or None for the default.

    The default is a local CIFAR-10, else a download, else the generated set. progress(done, total) is called while
    images are decoded; note(line) when something worth a line happens. size, val_split: of an image folder, see
    `image_tree.read`. limit: no more training and test images than these first ones of the fixed order, of
    which alone the fingerprint is; of an image folder only these are decoded, and the pixel statistics are theirs too.
    Raises UserError for anything unusable.
    """
    name = source or "cifar10"
    if name not in NAMES:
        return read(Path(name), progress, note, size, val_split, limit)
    _only_for_folders(size, val_split)
    return (generated() if source == "synthetic" else _by_name(name, source is None, note)).limited(limit)


def _by_name(name: str, else_generated: bool, note: Note) -> Dataset:
    """A published data set, downloaded if it is not there; what a download that fails comes to."""
    layouts = [layout for layout in LAYOUTS if layout.name == name]
    for layout in layouts:
        if layout.found(DEFAULT_ROOT / layout.folder):
            return _cached(_replaceable(DEFAULT_ROOT / layout.folder, layout), note)
    note(f"downloading {name} ...")
    try:
        _reader(layouts[0]).download(DEFAULT_ROOT, name)
    except UserError as error:
        if not else_generated:
            raise
        note(str(error))
        return generated()
    return _cached(_published(DEFAULT_ROOT / layouts[0].folder, layouts[0]), note)


def _replaceable(root: Path, layout: Layout) -> _Found:
    """A published data set in data/: what is wrong with it is said with what brings another copy."""
    found, removed = _published(root, layout), root if layout.classes else "that file"

    def read() -> Arrays:
        try:
            return found.read()
        except UserError as error:
            raise UserError(f"{error} (--data {found.name} downloads it once {removed} is removed)") from error

    return replace(found, read=read)


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
    val_split: float | None = None, limit: int | None = None,
) -> Dataset:  # fmt: skip
    """Read the data set at `path`, from the cache if it was decoded before; see `load`. Raises UserError."""
    with reading(path):
        return _cached(_recognize(path, progress, note, size, val_split, limit), note).limited(limit)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, `path` is a folder, and what cannot be read in it is one line. Raises UserError."""
    try:
        if not path.exists():
            raise no_data(path)
        if not path.is_dir():
            raise UserError(f"{path} is a file; --data takes a folder: unpack it first")
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); make it readable") from error


def _cached(found: _Found, note: Note) -> Dataset:
    """From the cache if it was decoded before."""
    try:
        key = cache.source_key(found.root, found.options, found.files)
        dataset, notes = cache.load(key)
        for line in notes:
            note(line)
        arrays = None if dataset is not None else found.read()
    except OSError as error:
        raise UserError(
            f"{error.filename or found.root} cannot be read ({error.strerror}); make it readable"
        ) from error
    if arrays is not None:
        dataset = assemble(found.name, *arrays, statistics=found.statistics, mirror=found.mirror)
        warning = cache.store(key, dataset, found.said)
        if warning:
            note(warning)
    return dataset


def _recognize(path: Path, progress: Progress, note: Note, size, val_split: float | None, limit: int | None) -> _Found:
    """Whichever data set `path` holds. Raises UserError for none."""
    found = published(path)
    if found:
        _only_for_folders(size, val_split)
        return _published(*found)
    for reads in (image_tree, parquet):
        located = reads.locate(path)
        if located:
            root, notes = located
            for line in notes:
                note(line)
            said = []

            def noted(line: str, said=said) -> None:
                said.append(line)
                note(line)

            reader = partial(reads.read, root, progress, noted, size, val_split, limit)
            return _Found(root, _name_of(root), reader, said, f"{size} {val_split} {limit}")
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "") if found else "nothing"
    raise UserError(
        f"{path} holds neither <class>/<images>, in train/ and test/ or without, nor Parquet files, nor a published "
        f"data set's; it holds {listed}"
    )


def _name_of(root: Path) -> str:
    whole = root.resolve()
    name = whole.parent.name if whole.name == parquet.INNER else whole.name
    # a name that is no text is shown as far as it is
    return os.fsencode(name).decode(errors="replace")


def published(path: Path) -> tuple[Path, Layout] | None:
    """(the folder of a published data set in or at this folder, how it is laid out), or None."""
    halves = any((path / name).is_dir() for name in (image_tree.TRAIN, *image_tree.TESTS))
    return recognize(path) if not halves or any(path.glob("cifar-*")) else None


def _published(root: Path, layout: Layout) -> _Found:
    statistics = (CIFAR10_MEAN, CIFAR10_STD) if layout.name == "cifar10" else None
    return _Found(
        root, layout.name, lambda: _reader(layout).read(root, layout), [], "", layout.files, statistics, layout.mirror
    )


def _reader(layout: Layout):
    return import_module(f"blink.training.data.{layout.reader}")
