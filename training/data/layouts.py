"""How a published data set's folder is known, without torchvision, whose import takes two seconds of every start."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """One of the forms in which a data set is published, by the names in its folder.

    folder: where it is below data/; empty: data/ itself. train, test: the files of each half. classes: the file that
    names the classes; empty: none does. label_bytes: how many bytes of a binary record are labels, of which the last
    counts; 0: no binary records. mirror: whether a mirror image is one of the same class. reader: the module that
    reads and downloads it.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: str = ""
    label_bytes: int = 0
    mirror: bool = True
    reader: str = "cifar"

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, *([self.classes] if self.classes else []))

    def found(self, folder: Path) -> bool:
        """Whether `folder` is one of this layout; what has no folder of its own must have all of its files."""
        return folder.is_dir() if self.classes else all(self.has(folder, name) for name in self.files)

    def has(self, folder: Path, name: str) -> bool:
        """The file, or an idx file as it was packed for the download."""
        return (folder / name).is_file() or (self.reader == "mnist" and (folder / f"{name}.gz").is_file())


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
_IDX = tuple((f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte") for half in ("train", "t10k"))

LAYOUTS = (
    Layout("cifar10", "cifar-10-batches-py", _FIVE, ("test_batch",), "batches.meta"),
    Layout(
        "cifar10", "cifar-10-batches-bin", tuple(f"{n}.bin" for n in _FIVE), ("test_batch.bin",), "batches.meta.txt", 1
    ),
    Layout("cifar100", "cifar-100-python", ("train",), ("test",), "meta"),
    Layout("cifar100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
    Layout("mnist", "MNIST/raw", *_IDX, mirror=False, reader="mnist"),
    Layout("fashionmnist", "FashionMNIST/raw", *_IDX, reader="mnist"),
    Layout("svhn", "", ("train_32x32.mat",), ("test_32x32.mat",), mirror=False, reader="svhn"),
)


def recognize(path: Path) -> tuple[Path, Layout] | None:
    """(folder, layout) of the published data set that `path` holds, or that a folder of its own in `path` holds."""
    for layout in LAYOUTS:
        for root in (path, *_inside(path, layout)):
            if layout.has(root, layout.train[0]) or (layout.classes and layout.has(root, layout.classes)):
                return root, _called(root, layout) if layout.reader == "mnist" else layout
    return None


def _inside(path: Path, layout: Layout) -> Iterator[Path]:
    """Where the folder of this layout would be in `path`, which may be the first part of it."""
    first, _, rest = layout.folder.partition("/")
    yield path / layout.folder
    if rest and path.resolve().name == first:
        yield path / rest


def _called(root: Path, layout: Layout) -> Layout:
    """By its folder: other sets than MNIST have files of these names. One of another name has numbers for classes."""
    whole = root.resolve()
    name = whole.parent.name if whole.name == "raw" else whole.name
    known = {known.folder.partition("/")[0].lower(): known for known in LAYOUTS if known.reader == "mnist"}
    return known.get(name.lower().replace("-", "").replace("_", ""), replace(layout, name=name, mirror=False))
