"""--limit: the first images of the fixed order, of which alone an image folder decodes any."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blink.training import data
from blink.training.data import image_tree
from blink.training.data.dataset import assemble, beginning, fixed_order, pixel_statistics

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    return data.load(str(path), lambda done, total: None, lambda line: None, **options)


def fill(folder, count, seed, size=(9, 9)):
    folder.mkdir(parents=True)
    random = np.random.RandomState(seed)
    for i in range(count):
        Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture(params=["halves", "one"])
def tree(tmp_path, request):
    for label, name in enumerate(CLASSES):
        if request.param == "halves":
            fill(tmp_path / "set" / "train" / name, 11, label)
            fill(tmp_path / "set" / "val" / name, 5, 10 + label)
        else:
            fill(tmp_path / "set" / name, 20 + label, label)
    return tmp_path / "set"


@given(st.integers(1, 300), st.integers(1, 400))
@settings(deadline=None, max_examples=40)
def test_a_beginning_in_its_own_order_begins_the_whole_order(count, limit):
    chosen = beginning(count, limit)
    np.testing.assert_array_equal(chosen[fixed_order(len(chosen))], fixed_order(count)[:limit])
    np.testing.assert_array_equal(beginning(count, None), np.arange(count))


@pytest.mark.parametrize("limit", [1, 4, 8, 1000])
def test_the_images_are_those_of_cutting_afterwards(tree, limit):
    whole, cut = load(tree), load(tree, limit=limit)
    for half in ("train", "test"):
        for what in ("images", "labels"):
            own, expected = getattr(cut, f"{half}_{what}"), getattr(whole, f"{half}_{what}")[:limit]
            assert torch.equal(own, expected) and own.dtype == expected.dtype
    assert cut.classes == whole.classes and cut.fingerprint == whole.limited(limit).fingerprint
    assert (cut.fingerprint == whole.fingerprint) == (limit == 1000)
    mean, std = pixel_statistics(cut.train_images.numpy())
    assert torch.equal(cut.mean, mean) and torch.equal(cut.std, std)


def test_no_other_image_is_decoded(tree, monkeypatch):
    whole, decoded, decode = load(tree), [], image_tree.decode

    def counted(path, size):
        decoded.append(path)
        return decode(path, size=size)

    monkeypatch.setattr(image_tree, "decode", counted)
    seen = []
    cut = data.load(str(tree), lambda done, total: seen.append((done, total)), print, limit=3)
    assert len(set(decoded)) == len(decoded) == 6 and seen[-1] == (6, 6)
    assert torch.equal(cut.train_images, whole.train_images[:3])
    decoded.clear()
    # its cached copy is its own
    assert torch.equal(load(tree, limit=3).train_images, cut.train_images) and not decoded
    assert len(load(tree, limit=4).train_images) == 4 and len(decoded) == 8
    assert len(load(tree).train_images) == len(whole.train_images)


def test_the_size_is_that_of_all_images_not_of_those_that_are_decoded(tmp_path):
    for label, name in enumerate(CLASSES):
        fill(tmp_path / "set" / "train" / name, 9, label, (20, 20))
        fill(tmp_path / "set" / "test" / name, 2, 10 + label, (8 + label, 7))
    whole, cut = load(tmp_path / "set"), load(tmp_path / "set", limit=1)
    assert cut.image_shape == whole.image_shape == (3, 20, 20)
    assert torch.equal(cut.test_images, whole.test_images[:1])


def test_a_damaged_image_beyond_the_limit_is_not_opened_where_the_size_is_given(tree):
    whole = load(tree, size=9, limit=2)
    tree_files = image_tree.list_images(tree).files
    taken = {half[i] for half in tree_files for i in beginning(len(half), 2)}
    for path in {*tree_files[0], *tree_files[1]} - taken:
        Path(path).write_bytes(b"no image")
    assert load(tree, size=9, limit=2).fingerprint == whole.fingerprint


def test_what_is_read_whole_is_cut_afterwards():
    whole, cut = load("synthetic"), load("synthetic", limit=20)
    assert torch.equal(cut.train_images, whole.train_images[:20]) and len(cut.test_images) == 20
    assert torch.equal(cut.mean, whole.mean)
    order = fixed_order(20)
    halves = [np.empty_like(part.numpy()) for part in (cut.train_images, cut.train_labels)]
    for made, part in zip(halves, (cut.train_images, cut.train_labels)):
        made[order] = part.numpy()
    tests = [np.empty_like(part.numpy()) for part in (cut.test_images, cut.test_labels)]
    for made, part in zip(tests, (cut.test_images, cut.test_labels)):
        made[order] = part.numpy()
    assert assemble("same", cut.classes, *halves, *tests).fingerprint == cut.fingerprint != whole.fingerprint
