"""The gallery of a run: what is in it, that its views are what the steps took, and what no gallery is told."""

import json
import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blink.__main__ import main
from blink.errors import UserError
from blink.experiments.plans import narrowed
from blink.model import backend, saved
from blink.training import gallery, precision
from blink.training.budget import plan_budget
from blink.training.loop import train
from blink.training.recipes import AIR, Resolution
from blink.training.results import RunResult
from blink.training.trainer import Trainer
from tests.small import random_images, small_dataset


def augmented(image: np.ndarray, move, flip, cut, side, jitter, mean) -> np.ndarray:
    """By numpy's own padding: moved, mirrored, cut, jittered, to the nearest pixel value."""
    height, width, _ = image.shape
    (y, x), pad = move, max(map(abs, move))
    out = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")[pad + y :, pad + x :][:height, :width]
    out = (out[:, ::-1] if flip else out).astype(np.float64)
    top, left = cut
    out = out.copy()
    out[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = np.floor(255 * mean + 0.5)
    return np.clip(np.round(jitter[0] * out + 255 * jitter[1]), 0, 255)


@pytest.fixture(scope="module")
def viewed():
    """(views of a run, what its stem was given by image and epoch, its data set) of a recipe with every augmentation,
    where easy images sit out and the first steps are smaller.
    """
    recipe = replace(
        narrowed(AIR, 0.1), translation=2, cutout=5, jitter=(0.3, 0.1), keep=0.6,
        resolutions=(Resolution(until=0.4, scale=0.75),),
    )  # fmt: skip
    dataset = small_dataset(60, 20, 16)
    budget, fp32 = plan_budget(recipe, 60, 6, epochs=4.5), precision.choose("fp32", dataset.device, False)
    trainer = Trainer(recipe, dataset, budget, backend.reference(), fp32, False)
    taken = []
    trainer.network.stem.register_forward_pre_hook(
        lambda stem, inputs: taken.append(inputs[:2]) if stem.training else None
    )
    views = gallery.Views(trainer)
    train(trainer, 3, views)
    return views.views, taken, trainer


def test_views_are_what_the_steps_took(viewed):
    views, taken, trainer = viewed
    assert len(taken) == trainer.budget.total_steps == 27
    mean, expected, sides = trainer.dataset.mean.double().numpy(), {}, set()
    for step, (images, gather) in enumerate(taken):
        for at, image in enumerate(gather.index.tolist()):
            if image < 12:
                source = images[image].permute(1, 2, 0).numpy()
                parts = (getattr(gather, name)[at] for name in ("translation", "flip", "cutout", "jitter"))
                move, flip, cut, jitter = (part.tolist() for part in parts)
                sides.add(source.shape[0])
                expected[image, step // trainer.budget.steps_per_epoch] = augmented(
                    source, move, flip, cut, gather.cutout_size, jitter, mean
                )
    assert sides == {12, 16}
    # some sat out, and the last epoch was cut short
    assert views.keys() == expected.keys() and 12 < len(views) < 60
    for key, view in views.items():
        assert view.dtype == torch.uint8 and view.shape == expected[key].shape
        assert np.abs(view.double().numpy() - expected[key]).max() <= 1, key


def test_views_of_an_unaugmented_image_are_the_image(viewed):
    *_, trainer = viewed
    dataset = trainer.dataset
    images = dataset.train_images.permute(0, 3, 1, 2)
    index = torch.arange(5)
    assert torch.equal(gallery.pixels(images, gallery.Gather(index), dataset.mean), dataset.train_images[:5])


def test_the_surest_mistakes_of_many_rows_are_those_of_all_at_once(monkeypatch):
    logits, labels = 3 * torch.randn(1000, 7), torch.randint(7, (1000,))
    probabilities = logits.softmax(1)
    best, predicted = probabilities.max(1)
    wrong = [i for i in best.argsort(descending=True).tolist() if predicted[i] != labels[i]][:10]
    monkeypatch.setattr(gallery, "_ROWS", 64)
    counts, index, taken_for, probability = gallery.judged(logits, labels, 10)
    assert counts.tolist() == [[int(((labels == i) & (predicted == j)).sum()) for j in range(7)] for i in range(7)]
    assert index.tolist() == wrong and taken_for.tolist() == predicted[wrong].tolist()
    assert torch.allclose(probability, best[wrong])


@pytest.fixture
def written(tmp_path):
    """A gallery of 6 test images of 3 classes, of which the second and the last two are wrong, and one is no answer."""
    images, labels = random_images(6, 5, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    dataset = replace(
        small_dataset(20, 20, 16), classes=("a", "<b>", "c\udce9"), test_images=images, test_labels=labels,
        train_images=random_images(3, 5, 4, seed=1), train_labels=torch.tensor([2, 1, 0]),
    )  # fmt: skip
    logits = torch.tensor([[9, 0, 0], [1, 0, 0], [0, 0, 9], [float("nan"), 0, 0], [0, 0, 8], [0, 2, 0]])
    result = RunResult(7, 0.5, 1.0, 1.0, [1.0], logits=logits)
    views = SimpleNamespace(views={(1, 0): images[0].clone(), (1, 2): images[1, :3, :3].clone()})
    path = tmp_path / "tiny-seed7.gallery.safetensors"
    gallery.save(path, result, dataset, views.views, "tiny")
    return path, images, dataset


def test_a_gallery_by_hand(written):
    path, images, dataset = written
    found = gallery.read(path)
    assert (found.recipe, found.seed, found.accuracy, found.classes) == ("tiny", 7, 0.5, dataset.classes)
    assert found.fingerprint == dataset.fingerprint
    assert found.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 1]]
    assert torch.equal(found.mistakes, images[[4, 5, 1]])
    assert found.true.tolist() == [1, 2, 1] and found.taken_for.tolist() == [2, 1, 0]
    expected = [1 / (1 + 2 * np.exp(-8)), 1 / (1 + 2 * np.exp(-2)), 1 / (1 + 2 * np.exp(-1))]
    assert found.probability.tolist() == pytest.approx(expected)
    assert torch.equal(found.test, images[:4]) and found.test_labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(found.train, dataset.train_images) and found.train_labels.tolist() == [2, 1, 0]
    assert found.views.keys() == {(1, 0), (1, 2)} and torch.equal(found.views[1, 2], images[1, :3, :3])


def test_a_gallery_is_small_and_without_mistakes_is_one_too(tmp_path):
    """1,000 classes: the matrix is nearly all of it."""
    dataset = small_dataset(20, 20, 16)
    dataset = replace(dataset, classes=tuple(map(str, range(1000))))
    logits = torch.nn.functional.one_hot(dataset.test_labels, 1000).float()
    path = tmp_path / "x.safetensors"
    gallery.save(path, RunResult(0, 1.0, 1.0, 1.0, [], logits=logits), dataset, {}, "x")
    found = gallery.read(path)
    assert len(found.mistakes) == len(found.true) == 0 and found.confusion.trace() == 20
    assert path.stat().st_size < 4_100_000


def test_its_mode_follows_the_umask(tmp_path, written):
    _, _, dataset = written
    path, old = tmp_path / "mode.safetensors", os.umask(0o027)
    try:
        result = RunResult(7, 0.5, 1.0, 1.0, [1.0], logits=torch.zeros(6, 3))
        gallery.save(path, result, dataset, {}, "tiny")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_every_run_with_an_output_folder_has_one(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--recipe", "hlb", "--steps", "9", "--batch-size", "8", "--device", "cpu", "--runs", "2", "--seed", "4"]
    assert main(["train", "--data", str(image_folder), *options, "--out", str(out)]) == 0
    names = [f"hlb-seed{seed}.{kind}" for seed in (4, 5) for kind in ("gallery.safetensors", "safetensors")]
    assert sorted(p.name for p in out.iterdir()) == [*names, "summary.json"]
    for seed in (4, 5):
        found, (facts, _) = gallery.read(out / names[2 * (seed - 4)]), saved.read(out / names[2 * (seed - 4) + 1])
        assert (found.seed, found.accuracy) == (facts["seed"], facts["accuracy"]) and found.seed == seed
        assert found.confusion.sum() == 20 and found.confusion.trace() == round(20 * found.accuracy)
        assert found.mistakes.shape[1:] == (12, 12, 3) and {epoch for _, epoch in found.views} == {0, 1}


def damaged(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    save_file({"x": torch.zeros(3)}, path)


def later(path):
    found = gallery.read(path)
    rewrite(path, found, format=gallery.FORMAT + 1)


def rewrite(path, found, format=gallery.FORMAT, **tensors):
    about = dict(format=format, recipe="x", seed=0, accuracy=0.5, fingerprint="f", classes=list(found.classes))
    tensors = {name: getattr(found, name) for name in gallery._TENSORS} | tensors
    metadata = {"blink_gallery": json.dumps(about)}
    save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, path, metadata)


def changed(**tensors):
    return lambda path: rewrite(path, gallery.read(path), **tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is no gallery"),
        (foreign, "is no gallery .without 'blink_gallery'"),
        (later, "is of a later version of blink .format 2.; update blink"),
        (lambda path: path.unlink(), "there is no"),
        (lambda path: path.write_text("{}"), "is no gallery"),
        (changed(confusion=torch.zeros(2, 2).int()), "a confusion matrix of .2, 2. for 3 classes"),
        (changed(true=torch.tensor([0, 1, 3])), "the labels of mistakes are of other classes"),
        (changed(true=torch.tensor([0, 1])), "the labels of mistakes are not one an image"),
        (changed(probability=torch.zeros(2)), "the probabilities are not one a mistake"),
        (changed(test=torch.zeros(4, 5, 4, 3)), "test are no images"),
        (changed(train=None), "without 'train'"),
        (changed(**{"view.x.0": torch.zeros(2, 2, 3).byte()}), "is no gallery"),
        (changed(**{"view.1.0": torch.zeros(2, 2, 3)}), "a view is no image"),
    ],
)
def test_what_is_no_gallery_is_told_in_one_line(written, change, message):
    path, *_ = written
    change(path)
    with pytest.raises(UserError, match=message) as raised:
        gallery.read(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
