"""How a published data set's folder is known, without torchvision, whose import takes two seconds of every start."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The names in a data set's folder: first_file and meta_file of its python batches, and all of its binary twin's.

    label_bytes: how many bytes of a binary record are labels, of which the last counts.
    """

    name: str
    folder: str
    first_file: str
    meta_file: str
    binary_folder: str
    binary_train: tuple[str, ...]
    binary_test: tuple[str, ...]
    binary_classes: str
    label_bytes: int


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "cifar10",
            "cifar-10-batches-py",
            "data_batch_1",
            "batches.meta",
            binary_folder="cifar-10-batches-bin",
            binary_train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            binary_test=("test_batch.bin",),
            binary_classes="batches.meta.txt",
            label_bytes=1,
        ),
        Layout(
            "cifar100",
            "cifar-100-python",
            "train",
            "meta",
            binary_folder="cifar-100-binary",
            binary_train=("train.bin",),
            binary_test=("test.bin",),
            binary_classes="fine_label_names.txt",
            label_bytes=2,
        ),
    )
}
