"""How a published data set's folder is known, without torchvision, whose import takes two seconds of every start."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One of the forms in which a data set is published, by the names in its folder.

    train, test: the files of images; classes: the file that names the classes. label_bytes: how many bytes of a binary
    record are labels, of which the last counts; 0: python batches.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: str
    label_bytes: int = 0


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))

LAYOUTS = (
    Layout("cifar10", "cifar-10-batches-py", _FIVE, ("test_batch",), "batches.meta"),
    Layout(
        "cifar10", "cifar-10-batches-bin", tuple(f"{n}.bin" for n in _FIVE), ("test_batch.bin",), "batches.meta.txt", 1
    ),
    Layout("cifar100", "cifar-100-python", ("train",), ("test",), "meta"),
    Layout("cifar100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
)
