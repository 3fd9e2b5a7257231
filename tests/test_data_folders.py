"""Folders of images as people have them: without halves, named otherwise, nested, of many sizes."""

import numpy as np
import pytest
from PIL import Image

from blink.errors import UserError
from blink.training import data
from blink.training.data.decoding import decode, fit, size_of

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    """(the data set, what was noted)"""
    notes = []
    return data.load(str(path), lambda done, total: None, notes.append, **options), notes


def fill(folder, count, size=(12, 12), start=0):
    """Write images [size] whose first pixel tells which they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.full((*size, 3), 10, dtype=np.uint8)
        pixels[0, 0] = i
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def numbers(images) -> list[int]:
    return sorted(images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_the_second_half_has_any_of_its_names(tmp_path, name):
    for i, label in enumerate(CLASSES):
        fill(tmp_path / "set" / "train" / label, 4, start=10 * i)
        fill(tmp_path / "set" / name / label, 2, start=100 + 10 * i)
    dataset, notes = load(tmp_path / "set")
    assert (len(dataset.train_images), len(dataset.test_images), notes) == (12, 6, [])
    assert numbers(dataset.test_images) == [100, 101, 110, 111, 120, 121]


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("part, held", [(None, [1, 2, 1]), (0.5, [5, 10, 2])])
def test_classes_alone_are_split_by_class(tmp_path, below, part, held):
    for i, (label, count) in enumerate(zip(CLASSES, (10, 20, 4))):
        fill(tmp_path / "set" / below / label, count, start=50 * i)
    dataset, notes = load(tmp_path / "set", val_split=part)
    assert dataset.classes == CLASSES
    assert dataset.test_labels.bincount().tolist() == held
    assert (dataset.train_labels.bincount() + dataset.test_labels.bincount()).tolist() == [10, 20, 4]
    together = [*numbers(dataset.train_images), *numbers(dataset.test_images)]
    assert sorted(together) == [*range(10), *range(50, 70), *range(100, 104)]
    (note,) = notes
    assert f"{part or 0.1:.0%} of each class's images are held back for testing (--val-split)" in note
    again, notes_again = load(tmp_path / "set", val_split=part)
    assert again.fingerprint == dataset.fingerprint and notes_again == notes


def test_a_split_needs_two_images_and_no_test_images(tmp_path):
    for label in CLASSES:
        fill(tmp_path / "set" / label, 3)
        fill(tmp_path / "halves" / "train" / label, 3)
        fill(tmp_path / "halves" / "val" / label, 3)
    fill(tmp_path / "set" / "dog", 1)
    with pytest.raises(UserError, match=r"set/dog holds one image; expected two or more"):
        load(tmp_path / "set")
    with pytest.raises(UserError, match=r"--val-split: .* has test images of its own, in val/; leave it out"):
        load(tmp_path / "halves", val_split=0.2)


def test_a_path_one_level_too_low_or_too_high_is_understood_and_said(tmp_path):
    for label in CLASSES:
        fill(tmp_path / "outer" / "set" / "train" / label, 3)
        fill(tmp_path / "outer" / "set" / "test" / label, 2)
    plain, notes = load(tmp_path / "outer" / "set")
    assert notes == []
    for path in (tmp_path / "outer" / "set" / "train", tmp_path / "outer" / "set" / "test"):
        found, notes = load(path)
        assert (found.fingerprint, found.name) == (plain.fingerprint, "set")
        assert notes == [f"{path} is a part of a data set: all of it is taken"]
    found, notes = load(tmp_path / "outer")
    assert (found.fingerprint, found.name) == (plain.fingerprint, "set")
    assert notes == [f"the images are in {tmp_path / 'outer' / 'set'}"]


def test_folders_inside_a_class_are_taken_and_other_files_are_said(tmp_path):
    for label in CLASSES:
        fill(tmp_path / "set" / "train" / label / "monday", 2)
        fill(tmp_path / "set" / "train" / label / "more" / "tuesday", 2, start=2)
        fill(tmp_path / "set" / "test" / label, 2, start=4)
    for name in ("a.txt", "b.TXT", "c.mov", ".hidden"):
        (tmp_path / "set" / "train" / "ant" / name).write_text("x")
    for _ in range(2):  # decoded, then from the cache
        dataset, notes = load(tmp_path / "set")
        assert numbers(dataset.train_images) == sorted([0, 1, 2, 3] * 3)
        assert notes == ["3 files are no images and left out (.txt, .mov)"]


@pytest.mark.parametrize(
    "sizes, size, expected, noted",
    [
        ([(12, 9)] * 6, None, (12, 9), False),
        ([(12, 9)] * 6, 16, (16, 16), False),
        ([(20, 20)] * 4 + [(30, 10), (5, 40)], None, (20, 20), True),
        ([(20, 20)] * 3 + [(30, 10)] * 3, None, (32, 32), True),
        ([(300, 200)] * 5 + [(30, 10)], None, (32, 32), True),
    ],
)
def test_images_of_many_sizes_are_brought_to_one(tmp_path, sizes, size, expected, noted):
    for i, own in enumerate(sizes):
        fill(tmp_path / "set" / CLASSES[i % 2], 1, own, start=i)
    dataset, notes = load(tmp_path / "set", size=size)
    assert dataset.image_shape == (3, *expected)
    said = [note for note in notes if "scaled and cropped" in note]
    want = f"sizes are scaled and cropped to {expected[0]}x{expected[1]} (--size)"
    assert (len(said) == 1 and said[0].endswith(want)) if noted else not said


def test_another_size_is_another_copy_in_the_cache(tmp_path):
    for label in CLASSES:
        fill(tmp_path / "set" / label, 3)
    assert load(tmp_path / "set", size=8)[0].image_shape == (3, 8, 8)
    assert load(tmp_path / "set", size=9)[0].image_shape == (3, 9, 9)
    assert load(tmp_path / "set")[0].image_shape == (3, 12, 12)


@pytest.mark.parametrize("options", [{"size": 16}, {"val_split": 0.1}])
def test_other_data_sets_take_neither_size_nor_split(options):
    with pytest.raises(UserError, match=r"--(size|val-split) is for folders of images"):
        load("synthetic", **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_known_without_decoding(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (9, 5)).save(tmp_path / "p.jpg", exif=exif)
    assert size_of(tmp_path / "p.jpg") == decode(tmp_path / "p.jpg").shape[:2]
    assert size_of(tmp_path / "p.jpg") == ((9, 5) if orientation >= 5 else (5, 9))


def test_a_fitted_image_covers_its_size_and_keeps_its_middle():
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 250
    assert (fit(wide, 20, 20)[:, 2:-2] > 240).all() and fit(wide, 7, 3).shape == (7, 3, 3)
    assert fit(wide, 10, 40) is wide


def test_photographs_train_at_once(tmp_path, capsys):
    """A folder a class, mixed sizes, some grey: the command says what it made of them."""
    from blink.__main__ import main

    for i, label in enumerate(CLASSES):
        fill(tmp_path / "set" / label, 6, (40 + i, 50))
        Image.new("L", (33, 21)).save(tmp_path / "set" / label / "grey.png")
    arguments = ["--data", str(tmp_path / "set"), "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    assert main(["train", *arguments, "--size", "16", "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "18 training and 3 test images, 16x16, 3 classes" in said and "held back for testing" in said
    assert main(["predict", str(tmp_path / "out" / "blink-seed0.safetensors"), str(tmp_path / "set" / "bee")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
