"""Evaluation: the views and their weights against the long way, how images are cut into batches, accuracy."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blink.kernels.gather import gathered, reflect
from blink.model import backend
from blink.model.network import Network
from blink.training import precision
from blink.training.budget import plan_budget
from blink.training.evaluation import accuracy, images_at_once, in_parts, logits_of, unsure
from blink.training.loop import train
from blink.training.recipes import AIR, RECIPES
from blink.training.trainer import Trainer
from tests.oracle import DEVICE
from tests.small import random_images, small_dataset


class Asymmetric(nn.Module):
    """Logits that a mirror image changes and the mode too; an empty batch is refused, as by the fused ops."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 5, 6)
        self.sizes = []

    def forward(self, x, gather=None):
        if gather is not None:
            x = gathered(x, gather, None)
        if len(x) == 0:
            raise ValueError("images is empty")
        self.sizes.append(len(x))
        return self.linear(x.float().flatten(1)) + 1000.0 * self.training


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_logits_are_the_mean_of_image_and_mirror_and_the_mode_is_restored(training):
    network, images = Asymmetric().train(training), random_images(7, 4, 5)
    plain = logits_of(network, images, None)
    assert network.training is training
    both = logits_of(network, images, "mirror", at_once=3)
    assert network.training is training
    assert network.sizes[1:] == [3, 3, 1] * 2
    network.eval()
    with torch.no_grad():
        x = images.permute(0, 3, 1, 2)
        expected, mirrored = network(x), network(x.flip(3))
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(both, (expected + mirrored) / 2)
    assert not torch.allclose(expected, mirrored)
    assert not both.requires_grad


@pytest.mark.parametrize("tta", ["translate", "mirror+translate"])
@pytest.mark.parametrize("at_once", [1, 4, 2000])
def test_translated_views_are_weighted_as_airbench_does(at_once, tta):
    """Half the image, a quarter each of two diagonal 1-pixel translations, all mirrored too if mirror images are."""
    network, images = Asymmetric().eval(), random_images(3, 4, 5)
    got = logits_of(network, images, tta, at_once=at_once)
    x = images.permute(0, 3, 1, 2)
    want = 0
    for (y_translation, x_translation), weight in (((0, 0), 0.5), ((-1, -1), 0.25), ((1, 1), 0.25)):
        rows, columns = (reflect(torch.arange(n) + s, n) for n, s in ((4, y_translation), (5, x_translation)))
        moved = x[:, :, rows][:, :, :, columns]
        with torch.no_grad():
            mirrored = network(moved.flip(3)) if "mirror" in tta else network(moved)
            want = want + weight * (network(moved) + mirrored) / 2
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tta", ["mirror", "translate", "mirror+translate"])
def test_only_the_least_sure_are_augmented(tta):
    network, images = Asymmetric().eval(), random_images(20, 4, 5)
    with torch.no_grad():
        network.linear.weight.div_(300)
    own, everything = logits_of(network, images, None), logits_of(network, images, tta)
    network.sizes.clear()
    got = logits_of(network, images, tta, 0.35, at_once=8)
    views = {"mirror": 1, "translate": 2, "mirror+translate": 5}[tta]
    assert sum(network.sizes) == 20 + 7 * views and unsure(20, 0.35) == 7
    top = own.softmax(1).sort(1).values
    chosen = (top[:, -1] - top[:, -2]).argsort()[:7]
    assert top[:, -1].min() < 0.9, "the margins are all the same"
    want = own.clone()
    want[chosen] = everything[chosen]
    torch.testing.assert_close(got, want)
    assert not torch.allclose(own[chosen], everything[chosen])


@pytest.mark.parametrize("tta", [None, "mirror", "translate", "mirror+translate"])
def test_a_fraction_of_nothing_is_the_plain_image(tta):
    network, images = Asymmetric().eval(), random_images(5, 4, 5)
    plain = logits_of(network, images, None)
    assert torch.equal(logits_of(network, images, tta, 0.0), plain)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [
        (10000, 17458, [10000]),
        # alike, so that one specialization of each kernel does
        (10000, 8729, [5008, 4992]),
        (10000, 3491, [3344, 3344, 3312]),
        (100000, 1040, [1040] * 96 + [160]),
        (17, 16, [16, 1]),
        (7, 3, [3, 3, 1]),
        (2, 1, [1, 1]),
    ],
)
def test_parts_are_few_and_alike(count, most, sizes):
    parts = in_parts(torch.arange(count), most)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(count))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_the_widest_activation_is_what_a_forward_pass_makes(recipe):
    network = Network(recipe.network, 10, (3, 24, 32), backend.reference()).eval()
    seen = []
    for module in network.modules():
        module.register_forward_hook(lambda module, inputs, y: seen.append(y) if isinstance(y, torch.Tensor) else None)
    network(random_images(2, 24, 32).permute(0, 3, 1, 2))
    assert network.widest_activation((24, 32)) == max(y.numel() for y in seen) // 2


@pytest.mark.parametrize(
    ("memory", "side", "at_once"),
    [(80 << 30, 32, 2**31 // 61504 // 2), (16 << 30, 32, 2**30 // 61504 // 2), (80 << 30, 128, 1040), (1000, 32, 1)],
)
def test_a_gpu_evaluates_as_many_images_as_its_memory_has_room_for(memory, side, at_once, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    network = Network(AIR.network, 10, (3, side, side), backend.reference())
    assert images_at_once(network, (3, side, side), torch.float16, torch.device("cuda")) == at_once
    on_cpu = images_at_once(network, (3, side, side), torch.float32, torch.device("cpu"))
    assert on_cpu == 2**27 // (64 * (side - 1) ** 2 * 4)


def test_a_trainer_evaluates_no_more_images_at_once(monkeypatch):
    monkeypatch.setattr("blink.training.trainer.images_at_once", lambda *arguments: 16)
    dataset = small_dataset(16, 40, side=16).to(DEVICE)
    budget = plan_budget(AIR, 16, 8, steps=1)
    recipe = replace(AIR, tta_fraction=0.5)
    trainer = Trainer(recipe, dataset, budget, backend.reference(), precision.choose("fp32", DEVICE, True), False)
    sizes = []
    trainer.network.head.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    train(trainer, 0, validate=20)
    # a step of 8; each epoch's validation; all images, then five views of half of them
    assert sizes == [8, 16, 4, 16, 16, 8, *[15] * 6, 10]


def test_accuracy_counts_rows_with_a_nan_as_wrong():
    nan = float("nan")
    logits = torch.tensor([[0.1, 0.9], [0.9, 0.1], [nan, 0.1], [0.1, nan], [float("inf"), 0.0]])
    assert accuracy(logits, torch.tensor([1, 1, 0, 1, 0])) == pytest.approx(2 / 5)
    assert accuracy(torch.full((3, 2), nan), torch.tensor([0, 1, 0])) == 0.0
