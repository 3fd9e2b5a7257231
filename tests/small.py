"""A small generated data set, for tests that train, and images of random pixels."""

import numpy as np
import torch

from blink.training.data import synthetic
from blink.training.data.dataset import Dataset, assemble


def small_dataset(train: int, test: int, side: int) -> Dataset:
    """`train` and `test` images, the middle side x side pixels of the generated ones, on the CPU."""
    images, labels, test_images, test_labels = synthetic.generate(train, test)
    crop = slice((32 - side) // 2, (32 + side) // 2)
    halves = (images[:, crop, crop], labels, test_images[:, crop, crop], test_labels)
    return assemble("generated", synthetic.CLASSES, *halves, generated=True)


def random_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[count, height, width, 3] uint8, on the CPU."""
    random = np.random.RandomState(seed)
    return torch.from_numpy(random.randint(0, 256, (count, height, width, 3), dtype=np.uint8))
