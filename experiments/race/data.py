"""The data files that the peers' scripts look for, made from the same images, in the same order, as ours."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blink.training.data.dataset import Dataset

# what v0.3.0 normalizes CIFAR-10 with
_HLB_MEAN = (0.4913997551666284, 0.48215855929893703, 0.4465309133731618)
_HLB_STD = (0.24703225141799082, 0.24348516474564, 0.26158783926049628)


def write(kind: str, dataset: Dataset, folder: Path, device: torch.device) -> None:
    """Write what a peer of this kind reads into `folder`, which it runs in; does nothing where it is already.

    airbench: cifar10/train.pt and test.pt, uint8 images [N, H, W, 3] and int64 labels. hlb-integer, hlb-one-hot:
    data.pt, normalized half images [N, 3, H, W] on `device` with int64 targets, or with half one-hot targets and
    normalized by the training images' own statistics.
    """
    halves = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    if kind == "airbench":
        (folder / "cifar10").mkdir(parents=True, exist_ok=True)
        for half, (images, labels) in halves.items():
            content = {"images": images.cpu(), "labels": labels.cpu(), "classes": list(dataset.classes)}
            _save(content, folder / "cifar10" / f"{half}.pt")
        return
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {half: images.to(device).permute(0, 3, 1, 2).float() / 255 for half, (images, _) in halves.items()}
    if kind == "hlb-integer":
        mean, std = torch.tensor(_HLB_MEAN, device=device), torch.tensor(_HLB_STD, device=device)
    else:
        std, mean = torch.std_mean(pixels["train"], dim=(0, 2, 3))
    content = {}
    for half, (_, labels) in halves.items():
        targets: Tensor = labels.to(device)
        if kind == "hlb-one-hot":
            targets = F.one_hot(targets, len(dataset.classes)).half()
        images = ((pixels[half] - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).half()
        content["eval" if half == "test" else half] = {"images": images, "targets": targets}
    _save(content, folder / "data.pt")


def _save(content: dict, path: Path) -> None:
    if not path.exists():
        torch.save(content, path)
