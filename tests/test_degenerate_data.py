"""Images that do not vary in every direction: a constant channel, grey stored as colour, one flat colour."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from blink.model import backend
from blink.model.whitening import initialize_stem
from blink.training import precision
from blink.training.budget import plan_budget
from blink.training.data import synthetic
from blink.training.data.dataset import Dataset, assemble
from blink.training.loop import train, train_epoch
from blink.training.recipes import AIR, BLINK, HLB, Recipe, with_group, with_network
from blink.training.trainer import Trainer
from tests.oracle import DEVICE

TWO = ("disc", "stripes")


def with_blue(value: int):
    def change(images):
        images = images.copy()
        images[..., 2] = value
        return images

    return change


CHANGES = {
    "red and green": lambda images: images[..., :2],
    "blue 0": with_blue(0),
    "blue 128": with_blue(128),
    "grey": lambda images: np.repeat(images.mean(3, keepdims=True).astype(np.uint8), 3, axis=3),
    "black": np.zeros_like,
    "flat": lambda images: np.full_like(images, 77),
}


def degenerate(kind: str, train: int, side: int, test: int = 20, classes=synthetic.CLASSES) -> Dataset:
    """Those of `train` and `test` images that are of these classes, the middle side x side pixels, on the device."""
    images, labels, test_images, test_labels = synthetic.generate(train, test)
    crop = slice((32 - side) // 2, (32 + side) // 2)
    numbers = np.array([synthetic.CLASSES.index(name) for name in classes])
    halves = []
    for pixels, classified in ((images, labels), (test_images, test_labels)):
        chosen = np.isin(classified, numbers)
        pixels = np.ascontiguousarray(CHANGES[kind](pixels[chosen][:, crop, crop]))
        halves += [pixels, np.searchsorted(numbers, classified[chosen])]
    return assemble(kind, classes, *halves, generated=True).to(DEVICE)


def narrowed(recipe: Recipe, channels: int) -> Recipe:
    groups = tuple(replace(group, channels=channels) for group in recipe.network.conv_groups)
    return with_network(recipe, conv_groups=groups, se_reduction=recipe.network.se_reduction and 4)


def trainer(recipe: Recipe, dataset: Dataset, steps: int, batch: int, which: backend.Backend | None = None) -> Trainer:
    budget = plan_budget(recipe, len(dataset.train_images), batch, steps=steps)
    return Trainer(
        recipe, dataset, budget, which or backend.reference(), precision.choose("fp32", DEVICE, True), graph=False
    )


@pytest.mark.parametrize("kind", ["red and green", "blue 0", "blue 128", "grey"])
def test_learns_what_two_channels_teach(kind):
    """The first is the yardstick: discs and stripes are told apart, with or without a channel that says nothing."""
    dataset = degenerate(kind, 1000, 24, 400, TWO)
    result = train(trainer(narrowed(BLINK, 24), dataset, steps=120, batch=16), 0, validate=0)
    assert result.accuracy > 0.8
    assert np.mean(result.losses[-10:]) < 0.6


@pytest.mark.parametrize("kind", ["black", "flat"])
@pytest.mark.parametrize(
    "recipe",
    [AIR, HLB, with_network(AIR, whiten_kernel=None), with_network(AIR, dirac=False)],
    ids=["air", "hlb", "no whitening", "no Dirac start"],
)
def test_nothing_to_see_stays_finite(recipe, kind):
    """The loss is that of a guess, ln 10 for 10 classes, and nothing grows."""
    result = train(trainer(narrowed(recipe, 16), degenerate(kind, 100, 16), steps=6, batch=16), 0, validate=0)
    assert result.losses == pytest.approx([np.log(10)] * 6, abs=0.05)
    assert all(value.isfinite().all() and value.abs().max() < 10 for value in result.state.values())


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(AIR, "grey"), (AIR, "black"), (HLB, "blue 0")],
    ids=["air-grey", "air-black", "hlb-blue 0"],
)
def test_fused_and_reference_train_alike(recipe, kind):
    # so few steps have no warm-up, and at a full rate each multiplies any rounding
    for group in recipe.param_groups:
        recipe = with_group(recipe, group.params, lr=group.lr / 10)
    recipe = with_network(recipe, conv_groups=recipe.network.conv_groups[:2])
    losses = []
    for which in (backend.fused(), backend.reference()):
        training = trainer(narrowed(recipe, 8), degenerate(kind, 16, 8), steps=2, batch=4, which=which)
        training.prepare(3)
        train_epoch(training, 0, torch.Generator(DEVICE).manual_seed(3))
        losses.append(training.progress.losses.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def started(recipe: Recipe, kind: str) -> nn.Module:
    """The network before its first step."""
    ready = trainer(recipe, degenerate(kind, 100, 16), steps=1, batch=16)
    ready.prepare(0)
    return ready.network


def copied(weight: torch.Tensor) -> list[int]:
    """Which filters are the identity of the channel of their own number."""
    identity = nn.init.dirac_(torch.empty_like(weight))
    return [i for i in range(min(weight.shape[:2])) if torch.equal(weight[i], identity[i])]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 8 of 12 directions of 2x2 patches vary, each with a filter and its negative
        pytest.param({}, [*range(8), *range(12, 20)], id="whitening"),
        pytest.param({"whiten_kernel": None}, [0, 1], id="no whitening"),
    ],
)
def test_no_filter_starts_as_a_copy_of_a_constant(changes, expected):
    network = started(with_network(narrowed(AIR, 32), **changes), "blue 0")
    first = network.groups[0].conv1.weight if not changes else network.stem.conv.weight
    assert copied(first) == expected
    random = [i for i in range(min(first.shape[:2])) if i not in expected]
    # PyTorch's own start is uniform within 1 / sqrt(fan in)
    bound = first[0].numel() ** -0.5
    assert 0.9 * bound < first[random].abs().max() <= bound
    assert copied(network.groups[1].conv1.weight) == list(range(32))


def test_images_that_vary_leave_the_start_as_it_is():
    ready = trainer(narrowed(AIR, 32), degenerate("red and green", 100, 16), steps=1, batch=16)
    ready.prepare(0)
    weights = {name: p.detach().clone() for name, p in ready.network.named_parameters()}
    torch.manual_seed(0)
    fresh = type(ready.network)(narrowed(AIR, 32).network, 10, (2, 16, 16), backend.reference())
    for name, p in fresh.named_parameters():
        if name != "stem.whiten.weight":
            assert torch.equal(weights[name], p.to(DEVICE)), name


@pytest.mark.parametrize(("kind", "directions"), [("blue 128", 8), ("grey", 4), ("flat", 0)])
@pytest.mark.parametrize("centered", [True, False], ids=["centred", "uncentred"])
def test_a_direction_without_variance_has_no_filter(kind, directions, centered):
    dataset = degenerate(kind, 100, 16)
    network = started(narrowed(AIR, 16), kind)
    statistics = [(dataset.mean, dataset.std, directions)]
    # those of a larger set, in which the channel varies; a mean is then one direction more of a second moment
    mixed = not centered and kind == "blue 128"
    statistics.append((torch.full((3,), 0.3), torch.full((3,), 0.25), directions + mixed))
    for mean, std, expected in statistics:
        varying = initialize_stem(network.stem, dataset.train_images, mean, std, 5e-4, centered)
        assert varying.sum() == 2 * expected
        assert torch.equal(network.stem.whiten.weight.flatten(1).any(1), varying)
        x = network.stem(dataset.train_images.permute(0, 3, 1, 2), None, torch.float32)
        assert torch.equal(x.amax((0, 2, 3)) > x.amin((0, 2, 3)), varying), "a constant is one to the last bit"
