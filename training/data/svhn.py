"""SVHN's cropped digits as published: two .mat files, md5-checked, with the names that torchvision knows."""

from pathlib import Path

import numpy as np
from torchvision.datasets import SVHN
from torchvision.datasets.utils import check_integrity, download_url

from blink.errors import UserError
from blink.training.data.dataset import Arrays
from blink.training.data.downloading import downloading
from blink.training.data.layouts import Layout

PUBLISHED: dict[str, type[SVHN]] = {"svhn": SVHN}
_CLASSES = tuple("0123456789")


def read(folder: Path, layout: Layout) -> Arrays:
    """Read both files in `folder`. Raises UserError for one that is missing or damaged."""
    from scipy.io import loadmat  # imported with the first reading, not with a download that fails

    halves = []
    for half, (name,) in (("train", layout.train), ("test", layout.test)):
        path, md5 = folder / name, PUBLISHED["svhn"].split_list[half][2]
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; svhn is {layout.train[0]} and {layout.test[0]}; download it again")
        if not check_integrity(str(path), md5):
            raise UserError(f"{path} does not match its published md5 {md5}: truncated or damaged; download it again")
        content = loadmat(path)
        # [32, 32, 3, N] and [N, 1], in which 10 stands for the digit 0
        halves += [np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2)), content["y"][:, 0].astype(np.int64) % 10]
    return _CLASSES, *halves


def download(root: Path, name: str) -> None:
    """Download to `root`, where torchvision does. Raises UserError within seconds when there is no network."""
    with downloading(root, name) as folder:
        for half in ("train", "test"):
            url, file, md5 = PUBLISHED[name].split_list[half]
            # what an earlier download finished is not downloaded again
            if not check_integrity(str(root / file), md5):
                download_url(url, str(folder), file, md5)
                (folder / file).replace(root / file)
