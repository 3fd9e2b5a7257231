"""Small MNIST and SVHN files in the published formats."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import scipy.io
from torchvision.datasets import SVHN

from blink.training.data import svhn

FOLDERS = {"mnist": "MNIST/raw", "fashionmnist": "FashionMNIST/raw"}
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """The format's own words: 0, 0, type 8 (unsigned byte), number of dimensions; each big-endian; the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def make_idx(folder: Path, train=30, test=20, side=28):
    """Write idx files whose labels go round all classes; returns (images, labels) of both halves."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(4)
    halves = []
    for names, count in ((IDX[:2], train), (IDX[2:], test)):
        images, labels = random.randint(0, 256, (count, side, side)), np.arange(count) % 10
        (folder / names[0]).write_bytes(idx(images))
        (folder / names[1]).write_bytes(idx(labels))
        halves.append((images, labels))
    return halves


def make_svhn(monkeypatch, folder: Path):
    """Write .mat files, whose md5 sums are then the published ones; 10 is the digit 0."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(5)
    halves, lists = [], {}
    for half, count in (("train", 24), ("test", 12)):
        images = random.randint(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (1 + np.arange(count) % 10).astype(np.uint8)[:, None]
        url, name, _ = SVHN.split_list[half]
        scipy.io.savemat(folder / name, {"X": images, "y": labels})
        lists[half] = [url, name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
        halves.append((images, labels))
    monkeypatch.setitem(svhn.PUBLISHED, "svhn", type("Changed", (SVHN,), {"split_list": lists}))
    return halves
