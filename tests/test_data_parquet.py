"""Folders of Parquet files as Hugging Face has them."""

import json
import sys
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import blink
from blink.errors import UserError
from blink.experiments.plans import narrowed
from blink.training import data
from blink.training.data import parquet
from blink.training.data.dataset import fixed_order
from blink.training.recipes import BLINK

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    """(the data set, what was noted)"""
    notes = []
    return data.load(str(path), lambda done, total: None, notes.append, **options), notes


def picture(seed, height=9, width=9):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, format="png", **options) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def write(path, images, labels, names=NAMES, image="image", label="label", metadata=None, rows=None, other=None):
    """A file as the library datasets writes it; images: pixels, encoded bytes or None; rows: a row group's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [encoded(one) if isinstance(one, np.ndarray) else one for one in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image: pa.array([{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(raw)], struct)}
    columns |= {label: pa.array(labels, pa.int64()), **(other or {})}
    table = pa.table(columns)
    if metadata is None and names is not None:
        feature = {"names": names, "_type": "ClassLabel"}
        metadata = json.dumps({"info": {"features": {image: {"_type": "Image"}, label: feature}}})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, path, row_group_size=rows)


@pytest.fixture
def folder(tmp_path):
    """Two files of training images and one of test images, in data/."""
    inner = tmp_path / "set" / "data"
    write(inner / "train-00000-of-00002.parquet", [picture(i) for i in range(7)], [0, 1, 2, 0, 1, 2, 0], rows=3)
    write(inner / "train-00001-of-00002.parquet", [picture(i) for i in range(7, 12)], [1, 2, 0, 1, 2], rows=3)
    write(inner / "test-00000-of-00001.parquet", [picture(i) for i in range(20, 26)], [0, 1, 2] * 2)
    return tmp_path / "set"


@pytest.mark.parametrize("given", ["set", "set/data", ""])
def test_every_pixel_and_label_in_the_order_of_files_and_rows(tmp_path, folder, given):
    dataset, notes = load(tmp_path / given if given else folder.parent / "set")
    assert (dataset.name, dataset.classes, dataset.image_shape, notes) == ("set", tuple(NAMES), (3, 9, 9), [])
    order = fixed_order(12)
    np.testing.assert_array_equal(dataset.train_images.numpy(), np.stack([picture(i) for i in order]))
    assert dataset.train_labels.tolist() == [i % 3 for i in order]
    order = fixed_order(6)
    np.testing.assert_array_equal(dataset.test_images.numpy(), np.stack([picture(20 + i) for i in order]))
    assert dataset.test_labels.tolist() == [i % 3 for i in order]


def test_the_files_may_lie_in_the_folder_or_in_its_only_one(tmp_path, folder):
    plain = load(folder)[0].fingerprint
    (folder / "data").rename(tmp_path / "flat")
    assert load(tmp_path / "flat")[0].fingerprint == plain
    (tmp_path / "repository" / "plain_text").parent.mkdir()
    (tmp_path / "flat").rename(tmp_path / "repository" / "plain_text")
    (tmp_path / "repository" / "README.md").write_text("x")
    dataset, notes = load(tmp_path / "repository")
    assert dataset.fingerprint == plain and notes == [f"the images are in {tmp_path / 'repository' / 'plain_text'}"]


@pytest.mark.parametrize("train, test", [("mnist_train", "mnist_test"), ("0-training", "1-testing"), ("Train", "VAL")])
def test_the_word_that_tells_the_half_may_stand_anywhere(tmp_path, train, test):
    """Test images among those that are trained on would go unseen."""
    write(tmp_path / "set" / f"{train}.parquet", [picture(i) for i in range(6)], [0, 1, 2] * 2)
    write(tmp_path / "set" / f"{test}.parquet", [picture(i) for i in range(20, 23)], [0, 1, 2])
    dataset, notes = load(tmp_path / "set")
    assert (len(dataset.train_images), len(dataset.test_images), notes) == (6, 3, [])
    held = np.stack([picture(20 + i) for i in fixed_order(3)])
    np.testing.assert_array_equal(dataset.test_images.numpy(), held)


@pytest.mark.parametrize("name", ["contest", "trainee", "mytrain"])
def test_a_part_of_a_word_tells_no_half(tmp_path, name):
    write(tmp_path / "set" / f"{name}.parquet", [picture(i) for i in range(6)], [0, 1, 2] * 2)
    dataset, notes = load(tmp_path / "set")
    assert len(dataset.train_images) == len(dataset.test_images) == 3 and "are held back for testing" in notes[0]


@pytest.mark.parametrize("image, label", [("img", "labels"), ("image", "fine_label"), ("picture", "kind")])
def test_columns_go_by_many_names(tmp_path, image, label):
    other = {"coarse_label": pa.array([9] * 6)} if label == "fine_label" else {"note": pa.array(["x"] * 6)}
    for half in ("train", "test"):
        path = tmp_path / "set" / f"{half}.parquet"
        write(path, [picture(i) for i in range(6)], [0, 1, 2] * 2, image=image, label=label, other=other)
    dataset, _ = load(tmp_path / "set")
    assert dataset.classes == tuple(NAMES) and sorted(dataset.train_labels.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "metadata", [None, "", "[1]", "{}", '{"info": {"features": {"label": {"_type": "Value"}}}}', "no JSON"]
)
def test_classes_without_names_are_numbers(tmp_path, metadata):
    for half in ("train", "test"):
        path = tmp_path / "set" / f"{half}.parquet"
        write(path, [picture(i) for i in range(4)], [0, 1, 3, 1], names=None, metadata=metadata)
    dataset, notes = load(tmp_path / "set")
    assert dataset.classes == ("0", "1", "2", "3") and notes == ["the files name no classes: label has numbers"]


@pytest.mark.parametrize("name", ["validation-00000-of-00001", "val", "valid_0", "validation"])
def test_the_second_half_has_any_of_its_names(tmp_path, folder, name):
    (folder / "data" / "test-00000-of-00001.parquet").rename(folder / "data" / f"{name}.parquet")
    dataset, notes = load(folder)
    assert (len(dataset.train_images), len(dataset.test_images), notes) == (12, 6, [])


def test_test_images_go_before_validation_and_what_is_left_out_is_said(folder):
    plain = load(folder)[0].fingerprint
    for name in ("validation-00000-of-00001", "extra", "trainee"):
        write(folder / "data" / f"{name}.parquet", [picture(99)], [0])
    for _ in range(2):  # decoded, then from the cache
        dataset, (note,) = load(folder)
        assert dataset.fingerprint == plain
        assert note == "3 Parquet files are left out (extra.parquet, trainee.parquet, ...)"


@pytest.mark.parametrize("name", ["train-00000-of-00001", "0000"])
@pytest.mark.parametrize("part, held", [(None, [1, 2, 1]), (0.5, [5, 10, 2])])
def test_without_test_images_each_class_is_split(tmp_path, name, part, held):
    labels = np.repeat(np.arange(3), (10, 20, 4))
    write(tmp_path / "set" / f"{name}.parquet", [picture(i) for i in range(34)], labels)
    dataset, notes = load(tmp_path / "set", val_split=part)
    assert dataset.test_labels.bincount().tolist() == held
    assert (dataset.train_labels.bincount() + dataset.test_labels.bincount()).tolist() == [10, 20, 4]
    assert notes == [f"no test images of its own: {part or 0.1:.0%} of each class's images are held back for testing "
                     "(--val-split)"]  # fmt: skip
    together = torch.cat([dataset.train_images, dataset.test_images]).numpy()
    assert {image.tobytes() for image in together} == {picture(i).tobytes() for i in range(34)}


def test_a_split_needs_two_images_and_no_test_images(tmp_path, folder):
    with pytest.raises(UserError, match=r"--val-split: .* in test-00000-of-00001\.parquet; leave it out"):
        load(folder, val_split=0.2)
    write(tmp_path / "one" / "train.parquet", [picture(i) for i in range(3)], [0, 0, 2])
    with pytest.raises(UserError, match=r"class 'cow' has one image"):
        load(tmp_path / "one")


@pytest.mark.parametrize("limit", [1, 5, 100])
@pytest.mark.parametrize("split", [False, True])
def test_limited_images_are_those_of_cutting_afterwards(folder, monkeypatch, limit, split):
    if split:
        (folder / "data" / "test-00000-of-00001.parquet").unlink()
    whole, _ = load(folder)
    decoded, decode = [], parquet.decode

    def counted(raw, name, size):
        decoded.append(name)
        return decode(raw, name, size)

    monkeypatch.setattr(parquet, "decode", counted)
    cut, _ = load(folder, limit=limit)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[:limit])
    assert cut.fingerprint == whole.limited(limit).fingerprint
    assert len(set(decoded)) == len(decoded) == len(cut.train_images) + len(cut.test_images)


def test_more_images_than_a_batch_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH", 4)
    for half, start in (("train", 0), ("test", 50)):
        path = tmp_path / "set" / f"{half}.parquet"
        write(path, [picture(start + i) for i in range(23)], np.arange(23) % 3, rows=9)
    seen = []
    dataset = data.load(str(tmp_path / "set"), lambda done, total: seen.append((done, total)), print)
    order = fixed_order(23)
    np.testing.assert_array_equal(dataset.test_images.numpy(), np.stack([picture(50 + i) for i in order]))
    assert seen[-1] == (46, 46)


def test_images_of_many_sizes_are_brought_to_one(tmp_path):
    images = [picture(i, 20, 20) for i in range(5)] + [picture(9, 30, 10)]
    for half in ("train", "test"):
        write(tmp_path / "set" / f"{half}.parquet", images, [0, 1, 2] * 2)
    dataset, notes = load(tmp_path / "set")
    assert dataset.image_shape == (3, 20, 20)
    assert notes == ["images of 2 sizes are scaled and cropped to 20x20 (--size)"]
    assert load(tmp_path / "set", size=16)[0].image_shape == (3, 16, 16)


def test_images_are_decoded_by_the_rules_of_files(tmp_path):
    """Turned as EXIF says, 16 bits to 8, grey and transparent ones to RGB."""
    grey = picture(1)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(picture(2), 1)  # what EXIF turns by a quarter clockwise
    wide = np.arange(81, dtype=np.uint16).reshape(9, 9) * 800
    clear = np.dstack([picture(3), np.full((9, 9), 7, np.uint8)])
    stored = [grey, encoded(np.ascontiguousarray(upright), exif=exif), encoded(Image.fromarray(wide)), clear]
    expected = [grey, picture(2), (wide >> 8).astype(np.uint8), picture(3)]
    expected = [np.repeat(one[..., None], 3, 2) if one.ndim == 2 else one for one in expected]
    for half in ("train", "test"):
        write(tmp_path / "set" / f"{half}.parquet", stored, [0, 1, 2, 0])
    dataset, _ = load(tmp_path / "set")
    for place, source in enumerate(fixed_order(4)):
        np.testing.assert_array_equal(dataset.train_images[place].numpy(), expected[source])


def floats():
    return encoded(Image.fromarray(np.ones((9, 9), np.float32)), "tiff")


def animated():
    frames = [Image.fromarray(picture(i)) for i in (1, 2)]
    return encoded(frames[0], "gif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "image, message",
    [
        (b"no image", r"is not a readable image \(of no known format\)"),
        (encoded(picture(1))[:60], "is not a readable image"),
        (None, "holds no bytes of an image"),
        (floats(), "has floating-point pixels"),
        (animated(), "is an animation"),
    ],
    ids=["noise", "truncated", "missing", "floats", "animation"],
)
@pytest.mark.parametrize("size", [None, 9])
def test_a_bad_image_is_named_by_file_and_row(folder, image, message, size):
    images = [picture(i) for i in range(5)]
    images[3] = image
    write(folder / "data" / "train-00001-of-00002.parquet", images, [1, 2, 0, 1, 2], rows=2)
    with pytest.raises(UserError, match=rf"train-00001-of-00002\.parquet, row 3 {message}") as raised:
        load(folder, size=size)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "label, message",
    [(-1, "has the label -1, expected 0 to 2"), (3, "has the label 3, expected 0 to 2"), (None, "has no label")],
)
def test_a_bad_label_is_named_by_file_and_row(folder, label, message):
    write(folder / "data" / "test-00000-of-00001.parquet", [picture(i) for i in range(3)], [0, label, 1])
    with pytest.raises(UserError, match=rf"test-00000-of-00001\.parquet, row 1 {message}"):
        load(folder)


def test_a_label_far_beyond_all_images_is_no_class(tmp_path):
    for half in ("train", "test"):
        write(tmp_path / "set" / f"{half}.parquet", [picture(i) for i in range(3)], [0, 10**12, 1], names=None)
    with pytest.raises(UserError, match=r"has the label 1000000000000 among 6 images"):
        load(tmp_path / "set")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _middle(path):
    raw = bytearray(path.read_bytes())
    raw[4:2000] = bytes(1996)
    path.write_bytes(raw)


DAMAGE = {
    "truncated": (_cut, "is no readable Parquet file"),
    "zeros": (_middle, "is no readable Parquet file"),
    "empty": (lambda path: path.write_bytes(b""), "is no readable Parquet file"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is no readable Parquet file"),
    "other names": (lambda path: write(path, [picture(1)], [0], names=["x", "y", "z"]), "has other columns or classes"),
    "other column": (lambda path: write(path, [picture(1)], [0], image="img"), "has other columns or classes"),
    "no label": (lambda path: pq.write_table(pa.table({"image": ["x"], "label": ["y"]}), path), "has no column of"),
    "no image": (
        lambda path: pq.write_table(pa.table({"image": ["x"], "label": [1]}), path),
        "has no column of images",
    ),
    "no row": (lambda path: write(path, [], []), "hold no row"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_in_one_line(folder, damage, message):
    damage(folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=rf"test-00000-of-00001\.parquet.* {message}") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_test_files_alone_are_refused(tmp_path):
    write(tmp_path / "set" / "test.parquet", [picture(1)], [0])
    with pytest.raises(UserError, match=r"set has no train-\*\.parquet, but test\.parquet"):
        load(tmp_path / "set")


def test_without_pyarrow_one_line_says_what_to_install_and_a_cached_copy_needs_none(folder, monkeypatch):
    first, _ = load(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert load(folder)[0].fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"\.parquet needs pyarrow to be read: pip install pyarrow$"):
        load(folder, size=8)


def test_a_folder_of_images_with_a_parquet_file_beside_them_is_one_of_images(tmp_path):
    for name in NAMES:
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(picture(i)).save(tmp_path / "set" / name / f"{i}.png")
    write(tmp_path / "set" / "metadata.parquet", [picture(1)], [0])
    assert len(load(tmp_path / "set")[0].train_images) == 6


def test_it_trains(folder):
    options = dict(steps=2, batch_size=4, device="cpu", size=16)
    result = blink.train(str(folder), recipe=narrowed(BLINK, 0.125), **options)
    assert result.classes == tuple(NAMES) and result.model.predict([picture(1)]).shape == (1, 3)
