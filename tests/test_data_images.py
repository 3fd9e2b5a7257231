"""Image folders, the fixed order, pixel statistics, fingerprints and the cache of decoded images."""

import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blink.errors import UserError
from blink.training import data
from blink.training.data import cache, image_tree
from blink.training.data.dataset import assemble, fixed_order, pixel_statistics

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))


def load(path, notes=None):
    return data.load(str(path), lambda done, total: None, (notes if notes is not None else []).append)


def picture(size, seed, channels=3):
    return np.random.RandomState(seed).randint(0, 256, (size, size, channels), dtype=np.uint8)


def make_tree(root, classes=CLASSES, train=4, test=2, size=12):
    """Write lossless images; returns {half: [(pixels, label), ...]} in sorted file order."""
    made = {}
    for half, count in (("train", train), ("test", test)):
        made[half] = []
        for label, name in enumerate(classes):
            folder = root / half / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * label + i + (500 if half == "test" else 0)
                pixels = picture(size, seed)
                Image.fromarray(pixels).save(folder / f"{i:03}.png")
                made[half].append((pixels, label))
    return made


@pytest.fixture
def tree(tmp_path):
    make_tree(tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("size", [1, 9, 32, 45])
def test_tree_gives_every_pixel_and_label(tmp_path, size):
    made = make_tree(tmp_path / "set", size=size)
    seen = []
    dataset = data.load(str(tmp_path / "set"), lambda done, total: seen.append((done, total)), print)
    assert dataset.name == "set" and dataset.classes == CLASSES and not dataset.generated
    assert dataset.image_shape == (3, size, size)
    assert seen[-1] == (18, 18)
    halves = ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    for (images, labels), expected in zip(halves, (made["train"], made["test"]), strict=True):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        order = fixed_order(len(expected))
        np.testing.assert_array_equal(images.numpy(), np.stack([expected[i][0] for i in order]))
        assert labels.tolist() == [expected[i][1] for i in order]


def test_more_images_than_one_chunk_are_all_decoded_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tree, "_CHUNK", 5)
    made = make_tree(tmp_path / "set")
    classes, train_images, train_labels, test_images, test_labels = image_tree.read(
        tmp_path / "set", lambda done, total: None
    )
    expected = made["train"] + made["test"]
    np.testing.assert_array_equal(
        np.concatenate([train_images, test_images]), np.stack([pixels for pixels, _ in expected])
    )
    assert [*train_labels, *test_labels] == [label for _, label in expected]
    assert classes == CLASSES


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16"])
def test_other_colour_modes_come_out_rgb(tree, mode):
    path = tree / "train" / "ant" / "000.png"
    if mode == "I;16":
        wide = (np.arange(144, dtype=np.uint16) * 450).reshape(12, 12)
        Image.fromarray(wide).save(path)
        expected = np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, axis=2)
    else:
        pixels = picture(12, 7, channels=len(mode))
        Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(path)
        expected = pixels[..., :3] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, axis=2)
    _, train_images, *_ = image_tree.read(tree, lambda done, total: None)
    assert train_images.dtype == np.uint8
    np.testing.assert_array_equal(train_images[0], expected)


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _class_missing(root):
    remove(root / "test" / "bee")
    return r"test lacks the class 'bee'"


def _class_extra(root):
    (root / "test" / "dog").mkdir()
    return r"train lacks the class 'dog'"


def _empty_class(root):
    for path in (root / "train" / "cow").iterdir():
        path.unlink()
    return r"train/cow holds no image"


def _floats(root):
    Image.fromarray(np.ones((12, 12), dtype=np.float32)).save(root / "train" / "bee" / "zzz.tif")
    return r"zzz\.tif has floating-point pixels"


def _negative(root):
    Image.fromarray(np.full((12, 12), -3, dtype=np.int32)).save(root / "train" / "bee" / "zzz.tif")
    return r"zzz\.tif has pixels from -3 to -3"


def _corrupt(root):
    path = root / "train" / "bee" / "002.png"
    path.write_bytes(path.read_bytes()[:40])
    return r"train/bee/002\.png is not a readable image"


def _empty_file(root):
    (root / "train" / "bee" / "002.png").write_bytes(b"")
    return r"train/bee/002\.png is not a readable image"


def _broken_link(root):
    (root / "train" / "bee" / "zzz.png").symlink_to(root / "nowhere")
    return r"train/bee/zzz\.png is not a readable image"


def _animation(root):
    frames = [Image.fromarray(picture(12, seed)) for seed in (1, 2)]
    frames[0].save(root / "train" / "cow" / "zzz.gif", save_all=True, append_images=frames[1:])
    return r"zzz\.gif is an animation"


def _no_train(root):
    for folder in list((root / "train").iterdir()):
        remove(folder)
    (root / "train").rmdir()
    return r"train is not a folder"


def _no_class(root):
    for folder in list((root / "train").iterdir()):
        remove(folder)
    return r"train holds no class folder"


BREAKS = (
    _class_missing,
    _class_extra,
    _empty_class,
    _floats,
    _negative,
    _corrupt,
    _empty_file,
    _broken_link,
    _animation,
    _no_train,
    _no_class,
)


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__.strip("_"))
def test_damaged_tree_is_named_in_one_line(tree, damage):
    message = damage(tree)
    with pytest.raises(UserError, match=message) as raised:
        load(tree)
    assert "\n" not in str(raised.value)


def test_no_such_path(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        load(tmp_path / "nowhere")


def test_path_is_a_file(tmp_path):
    (tmp_path / "set.zip").write_text("x")
    with pytest.raises(UserError, match=r"set\.zip is a file"):
        load(tmp_path / "set.zip")


def test_unknown_layout_lists_what_was_found(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(UserError, match="it holds nothing"):
        load(folder)
    (folder / "readme.txt").write_text("x")
    (folder / "images").mkdir()
    with pytest.raises(UserError, match=r"it holds images/, readme\.txt$"):
        load(folder)


def test_a_folder_that_cannot_be_walked_is_one_line(tree):
    (tree / "train" / "loop").symlink_to(tree / "train" / "loop")
    with pytest.raises(UserError, match=r"loop cannot be read \(Too many levels of symbolic links\)"):
        load(tree)


def test_names_that_are_no_text_are_read(tmp_path, tree):
    """As a Latin-1 archive leaves them; the data set's name shows what it can."""
    odd = os.fsdecode(b"caf\xe9")
    root = tree.rename(tmp_path / odd)
    for half in ("train", "test"):
        for folder in list((root / half).iterdir()):
            folder.rename(folder.with_name(folder.name + odd))
    first = load(root)
    assert first.name == "caf\ufffd" and first.classes[0].endswith(odd) and len(first.fingerprint) == 12
    assert load(root).fingerprint == first.fingerprint


def test_equal_names_and_times_elsewhere_are_another_data_set(tmp_path, tree):
    shutil.copytree(tree, tmp_path / "copy")
    assert load(tree).name != load(tmp_path / "copy").name == "copy"


@given(st.integers(1, 400))
@settings(deadline=None, max_examples=25)
def test_fixed_order_is_a_permutation_that_depends_on_the_count_only(count):
    order = fixed_order(count)
    np.random.seed(count)
    torch.manual_seed(count)
    assert sorted(order) == list(range(count))
    np.testing.assert_array_equal(order, fixed_order(count))


def test_limited_takes_the_prefix_of_the_one_order(tree):
    torch.manual_seed(1)
    dataset = load(tree)
    torch.manual_seed(2)
    again = assemble("set", *image_tree.read(tree, lambda done, total: None))
    assert torch.equal(dataset.train_images, again.train_images)
    assert dataset.fingerprint == again.fingerprint
    part = dataset.limited(5)
    assert torch.equal(part.train_images, dataset.train_images[:5])
    assert torch.equal(part.train_labels, dataset.train_labels[:5])
    assert torch.equal(part.test_images, dataset.test_images[:5])
    assert torch.equal(part.test_labels, dataset.test_labels[:5])
    assert len(dataset.limited(1000).train_images) == len(dataset.train_images)
    assert dataset.limited(None) is dataset


def test_prefix_of_a_class_sorted_set_holds_all_classes():
    labels = np.repeat(np.arange(10), 40)
    images = np.zeros((400, 1, 1, 3), np.uint8)
    dataset = assemble("sorted", tuple("abcdefghij"), images, labels, images, labels)
    assert set(dataset.limited(60).train_labels.tolist()) == set(range(10))
    assert set(dataset.limited(60).test_labels.tolist()) == set(range(10))


@given(st.integers(0, 2**31 - 1), st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_pixel_statistics_equal_a_direct_computation(seed, count, side):
    images = np.random.RandomState(seed).randint(0, 256, (count, side, side + 1, 3), dtype=np.uint8)
    mean, std = pixel_statistics(images)
    direct = images.astype(np.float64).reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, direct.mean(0), rtol=1e-6, atol=1e-7)
    # a channel without variance has scale 1
    scale = np.where(direct.std(0) > 0, direct.std(0), 1)
    np.testing.assert_allclose(std, scale, rtol=1e-6, atol=1e-7)


def test_constant_channel_has_scale_one():
    images = np.full((2, 3, 3, 3), 51, np.uint8)
    images[0, ..., 1] = 0
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, [0.2, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(std, [1, 0.1, 1], rtol=1e-6)


def _pixel(arrays):
    arrays[2][1, 0, 2, 1] ^= 1


def _label(arrays):
    arrays[1][0] = 1 - arrays[1][0]


@pytest.mark.parametrize("change", [_pixel, _label], ids=["one pixel", "one label"])
def test_fingerprint_changes_with_the_content(change):
    def make():
        return [
            picture(4, 0)[None].repeat(3, 0),
            np.array([0, 1, 0]),
            picture(4, 1)[None].repeat(2, 0),
            np.array([1, 0]),
        ]

    arrays = make()
    change(arrays)
    assert assemble("a", ("x", "y"), *arrays).fingerprint != assemble("a", ("x", "y"), *make()).fingerprint
    assert assemble("a", ("x", "z"), *make()).fingerprint != assemble("a", ("x", "y"), *make()).fingerprint


@pytest.fixture
def no_reader(monkeypatch):
    """Call it to make every further decoding fail."""

    def explode(*args):
        raise AssertionError("decoded again")

    return lambda: monkeypatch.setattr(image_tree, "read", explode)


def cache_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_second_load_does_not_decode(tmp_path, tree, no_reader):
    notes = []
    first = load(tree, notes)
    assert notes == []
    assert len(cache_files(tmp_path)) == 1 and cache_files(tmp_path)[0].endswith(".safetensors")
    no_reader()
    second = load(tree)
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_new_modification_time_decodes_again_to_the_same_fingerprint(tmp_path, tree, no_reader):
    first = load(tree)
    os.utime(tree / "train" / "ant" / "000.png", (1, 1))
    assert load(tree).fingerprint == first.fingerprint
    assert len(cache_files(tmp_path)) == 2
    os.utime(tree / "train" / "ant" / "000.png", (2, 2))
    no_reader()
    with pytest.raises(AssertionError, match="decoded again"):
        load(tree)


def test_changed_pixel_changes_what_is_loaded(tree):
    first = load(tree)
    path = tree / "train" / "bee" / "001.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(path)
    second = load(tree)
    assert second.fingerprint != first.fingerprint
    assert (second.train_images != first.train_images).sum() == 1


def test_renamed_and_added_files_are_decoded(tree):
    first = load(tree)
    (tree / "train" / "cow" / "000.png").rename(tree / "train" / "cow" / "999.png")
    assert load(tree).fingerprint != first.fingerprint
    Image.fromarray(picture(12, 99)).save(tree / "test" / "cow" / "new.png")
    assert len(load(tree).test_images) == len(first.test_images) + 1


@pytest.mark.parametrize("below", ["", "sub"], ids=["is a file", "below a file"])
def test_cache_folder_that_cannot_be_made_is_a_note(tmp_path, monkeypatch, tree, below):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "file" / below))
    notes = []
    assert len(load(tree, notes).train_images) == 12
    assert len(notes) == 1 and "were not cached" in notes[0] and "\n" not in notes[0]


def test_full_disk_is_a_note_and_leaves_no_temporary_file(tmp_path, monkeypatch, tree):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    notes = []
    assert len(load(tree, notes).train_images) == 12
    assert len(notes) == 1 and "No space left" in notes[0]
    assert cache_files(tmp_path) == []
