"""A small generated data set, for tests that train, images of random pixels, and narrow networks."""

from dataclasses import replace

import numpy as np
import torch

from blink.model import backend
from blink.model.network import Network
from blink.training.data import synthetic
from blink.training.data.dataset import Dataset, assemble
from blink.training.recipes import RECIPES


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


def narrow_network(recipe: str, classes: int, image_shape: tuple[int, int, int]) -> Network:
    """A narrow network of a recipe, its statistics no longer those of a new one, in evaluation mode, on the CPU."""
    torch.manual_seed(0)
    config = RECIPES[recipe].network
    groups = tuple(replace(group, channels=8) for group in config.conv_groups)
    network = Network(replace(config, conv_groups=groups), classes, image_shape, backend.reference())
    for buffer in network.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network.eval()
