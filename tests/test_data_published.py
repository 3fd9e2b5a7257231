"""MNIST, Fashion-MNIST and SVHN on small files in the published formats, and their downloads."""

import gzip
import hashlib
import socket
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST, SVHN, FashionMNIST

from blink.errors import UserError
from blink.training import data
from blink.training.data import downloading, mnist, svhn
from blink.training.data.dataset import fixed_order
from blink.training.data.layouts import LAYOUTS
from tests.published import FOLDERS, IDX, idx, make_idx, make_svhn


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEFAULT_ROOT", tmp_path / "data")


def load(source, notes=None):
    return data.load(str(source), lambda done, total: None, (notes if notes is not None else []).append)


@pytest.mark.parametrize("name", FOLDERS)
def test_idx_files_give_every_pixel_in_three_channels(tmp_path, name):
    halves = make_idx(data.DEFAULT_ROOT / FOLDERS[name])
    dataset = load(name)
    assert (dataset.name, dataset.image_shape, dataset.generated) == (name, (3, 28, 28), False)
    assert dataset.classes == tuple({"mnist": MNIST, "fashionmnist": FashionMNIST}[name].classes)
    own = ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    for (images, labels), (expected, numbers) in zip(own, halves, strict=True):
        order = fixed_order(len(expected))
        for channel in range(3):
            np.testing.assert_array_equal(images[..., channel].numpy(), expected[order])
        assert labels.tolist() == numbers[order].tolist()


def test_svhn_gives_every_pixel_and_its_ten_is_a_nought(monkeypatch):
    halves = make_svhn(monkeypatch, data.DEFAULT_ROOT)
    (data.DEFAULT_ROOT / "cifar-10-batches-py").mkdir()  # another set in the same place
    dataset = load("svhn")
    assert (dataset.name, dataset.classes, dataset.image_shape) == ("svhn", tuple("0123456789"), (3, 32, 32))
    images, labels = halves[0]
    for place, source in enumerate(fixed_order(24)):
        np.testing.assert_array_equal(dataset.train_images[place].numpy(), images[..., source])
        assert dataset.train_labels[place] == {10: 0}.get(labels[source, 0], labels[source, 0])
    assert set(dataset.test_labels.tolist()) == set(range(10))


@pytest.mark.parametrize("given", ["", "FashionMNIST", "FashionMNIST/raw"])
def test_a_folder_of_idx_files_is_recognized(tmp_path, given):
    make_idx(tmp_path / "there" / "FashionMNIST" / "raw")
    assert load(tmp_path / "there" / given).name == "fashionmnist"


@pytest.mark.parametrize(
    "folder, name, classes, mirror",
    [
        ("mnist", "mnist", tuple(MNIST.classes), False),
        ("fashion-mnist", "fashionmnist", tuple(FashionMNIST.classes), True),
        ("KMNIST/raw", "KMNIST", tuple("0123456789"), False),
    ],
)
def test_the_folder_tells_which_set_idx_files_are(tmp_path, folder, name, classes, mirror):
    make_idx(tmp_path / folder)
    dataset = load(tmp_path / folder)
    assert (dataset.name, dataset.classes, dataset.mirror) == (name, classes, mirror)


def test_packed_idx_files_are_read_as_they_are(tmp_path):
    make_idx(tmp_path / "plain" / "mnist")
    make_idx(tmp_path / "packed" / "mnist")
    for name in IDX:
        path = tmp_path / "packed" / "mnist" / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load(tmp_path / "packed" / "mnist").fingerprint == load(tmp_path / "plain" / "mnist").fingerprint


def test_a_folder_of_mat_files_is_recognized(tmp_path, monkeypatch):
    make_svhn(monkeypatch, tmp_path / "there")
    assert load(tmp_path / "there").name == "svhn"


@pytest.mark.parametrize("name", [*FOLDERS, "svhn"])
def test_the_names_of_files_are_torchvisions(name):
    (layout,) = [layout for layout in LAYOUTS if layout.name == name]
    if name == "svhn":
        assert layout.files == tuple(SVHN.split_list[half][1] for half in ("train", "test"))
    else:
        source = mnist.PUBLISHED[name]
        assert layout.folder == f"{source.__name__}/raw"
        assert layout.files == tuple(file.removesuffix(".gz") for file, _ in source.resources)


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_a_second_start_reads_the_cache_without_torchvision(monkeypatch, name):
    make_idx(data.DEFAULT_ROOT / FOLDERS["mnist"])
    make_svhn(monkeypatch, data.DEFAULT_ROOT)
    first = load(name)
    for module in [module for module in sys.modules if module.startswith("torchvision")]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("mnist", "svhn"):
        monkeypatch.delitem(sys.modules, f"blink.training.data.{module}")
    second = load(name)
    assert (second.fingerprint, second.mirror, second.classes) == (first.fingerprint, False, first.classes)
    assert torch.equal(second.train_images, first.train_images)


def test_another_file_beside_svhn_leaves_its_cached_copy(tmp_path, monkeypatch):
    make_svhn(monkeypatch, data.DEFAULT_ROOT)
    load("svhn")
    (data.DEFAULT_ROOT / "other").write_text("x")
    load("svhn")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _long(path):
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE = {
    "truncated": _cut,
    "too long": _long,
    "half a head": lambda path: path.write_bytes(path.read_bytes()[:6]),
    "empty": lambda path: path.write_bytes(b""),
    "other type": lambda path: path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:]),
    "other format": lambda path: path.write_bytes(b"<html>not found</html>"),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", [IDX[0], IDX[3]])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_idx_file_is_named_in_one_line(tmp_path, name, damage):
    make_idx(tmp_path / "mnist")
    damage(tmp_path / "mnist" / name)
    with pytest.raises(UserError, match=name) as raised:
        mnist.read(tmp_path / "mnist", next(layout for layout in LAYOUTS if layout.name == "mnist"))
    assert "\n" not in str(raised.value) and str(raised.value).endswith("download it again")


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    make_idx(tmp_path / "mnist")
    labels = tmp_path / "mnist" / IDX[1]
    labels.write_bytes(idx(np.arange(29) % 10))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte has 30 images and 29 labels"):
        load(tmp_path / "mnist")
    labels.write_bytes(idx(np.arange(30) % 11))
    with pytest.raises(UserError, match=r"holds the label 10, but mnist has only 10 classes"):
        load(tmp_path / "mnist")
    make_idx(tmp_path / "mnist", train=0)
    with pytest.raises(UserError, match=r"has 0 images and 0 labels|no readable idx file"):
        load(tmp_path / "mnist")
    make_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / IDX[2]).write_bytes(idx(np.zeros((20, 27, 28))))
    with pytest.raises(UserError, match=r"images of 28x28 and 27x28; expected one size"):
        load(tmp_path / "mnist")


@pytest.mark.parametrize("damage", [_cut, _long, lambda path: path.unlink()], ids=["truncated", "too long", "missing"])
def test_damaged_mat_file_is_named_in_one_line(tmp_path, monkeypatch, damage):
    make_svhn(monkeypatch, tmp_path)
    damage(tmp_path / "test_32x32.mat")
    with pytest.raises(UserError, match=r"test_32x32\.mat") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value) and str(raised.value).endswith("download it again")


def _packed_half(folder):
    raw = gzip.compress((folder / IDX[3]).read_bytes())
    (folder / IDX[3]).unlink()
    (folder / f"{IDX[3]}.gz").write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize(
    "name, damage, file",
    [
        ("mnist", lambda: _cut(data.DEFAULT_ROOT / FOLDERS["mnist"] / IDX[0]), IDX[0]),
        ("mnist", lambda: _packed_half(data.DEFAULT_ROOT / FOLDERS["mnist"]), f"{IDX[3]}.gz"),
        ("svhn", lambda: _cut(data.DEFAULT_ROOT / "train_32x32.mat"), "train_32x32.mat"),
    ],
    ids=["idx", "packed", "mat"],
)
def test_a_damaged_copy_in_data_is_said_how_to_replace(tmp_path, monkeypatch, name, damage, file):
    """What it says is then done. torchvision leaves such files where it is interrupted."""
    make_idx(data.DEFAULT_ROOT / FOLDERS["mnist"])
    make_svhn(monkeypatch, data.DEFAULT_ROOT)
    files, _ = prepared(tmp_path, monkeypatch, name)
    offer(monkeypatch, files)
    damage()
    with pytest.raises(UserError, match=rf"{file} .*\(--data {name} downloads it once that file is removed\)$"):
        load(name)
    (found,) = data.DEFAULT_ROOT.rglob(file)
    found.unlink()
    notes = []
    assert load(name, notes).name == name and notes == [f"downloading {name} ..."]


@pytest.mark.parametrize("name", ["train.gz", "meta.gz", "data_batch_1.gz"])
def test_another_packed_file_makes_no_published_set_of_a_folder(tmp_path, image_folder, name):
    (image_folder / name).write_bytes(b"x")
    for half in ("train", "test"):
        (image_folder / half).rename(tmp_path / half)
    for folder in list((tmp_path / "train").iterdir()):
        folder.rename(image_folder / folder.name)
    assert load(image_folder).name == "images"


def offer(monkeypatch, files: dict[str, bytes], fail_at: str | None = None, with_what: BaseException | None = None):
    """Make `files` what downloads bring, by file name; the one called `fail_at` breaks off half way."""
    asked = []

    def bring(url, root, filename, md5):
        assert socket.getdefaulttimeout() == downloading.SOCKET_TIMEOUT_SECONDS
        asked.append(url)
        content = files[filename]
        if filename == fail_at:
            (Path(root) / filename).write_bytes(content[: len(content) // 2])
            raise with_what
        assert hashlib.md5(content).hexdigest() == md5
        (Path(root) / filename).write_bytes(content)

    for module in (mnist, svhn):
        monkeypatch.setattr(module, "download_url", bring)
    return asked


def publish_idx(monkeypatch, name: str, folder: Path) -> dict[str, bytes]:
    """What make_idx wrote as the published archives of `name`."""
    files = {f"{file}.gz": gzip.compress((folder / file).read_bytes()) for file in IDX}
    resources = [(file, hashlib.md5(raw).hexdigest()) for file, raw in files.items()]
    source = {"mnist": MNIST, "fashionmnist": FashionMNIST}[name]
    monkeypatch.setitem(mnist.PUBLISHED, name, type(source.__name__, (source,), {"resources": resources}))
    return files


@pytest.mark.parametrize("name", FOLDERS)
def test_idx_files_are_downloaded_to_where_torchvision_puts_them(tmp_path, monkeypatch, name):
    make_idx(tmp_path / "made")
    offer(monkeypatch, publish_idx(monkeypatch, name, tmp_path / "made"))
    notes = []
    dataset = load(name, notes)
    assert notes == [f"downloading {name} ..."] and len(dataset.train_images) == 30
    assert sorted(path.name for path in (data.DEFAULT_ROOT / FOLDERS[name]).iterdir()) == sorted(IDX)
    assert [path.name for path in data.DEFAULT_ROOT.iterdir()] == [FOLDERS[name].split("/")[0]]


def test_a_mirror_that_fails_is_followed_by_the_next(tmp_path, monkeypatch):
    make_idx(tmp_path / "made")
    publish_idx(monkeypatch, "mnist", tmp_path / "made")
    asked = []

    def fail(url, root, filename, md5):
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(mnist, "download_url", fail)
    with pytest.raises(UserError, match=r"could not download mnist \(no route to host\)"):
        load("mnist")
    assert asked == [f"{mirror}{IDX[0]}.gz" for mirror in MNIST.mirrors]


FAILURES = [URLError("no route"), TimeoutError("timed out"), RuntimeError("corrupted"), OSError(28, "full")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_a_failing_download_is_one_line_and_the_next_one_succeeds(tmp_path, monkeypatch, name, failure):
    files, last = prepared(tmp_path, monkeypatch, name)
    offer(monkeypatch, files, last, failure)
    with pytest.raises(UserError, match=f"could not download {name}") as raised:
        load(name)
    assert "\n" not in str(raised.value) and str(data.DEFAULT_ROOT) in str(raised.value)
    offer(monkeypatch, files)
    assert load(name).name == name


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_an_interrupted_download_does_not_block_the_next_start(tmp_path, monkeypatch, name):
    files, last = prepared(tmp_path, monkeypatch, name)
    offer(monkeypatch, files, last, KeyboardInterrupt())
    before = socket.getdefaulttimeout()
    with pytest.raises(KeyboardInterrupt):
        load(name)
    assert socket.getdefaulttimeout() == before
    assert not [path for path in data.DEFAULT_ROOT.rglob("*") if path.name in (last, last.removesuffix(".gz"))]
    asked = offer(monkeypatch, files)
    assert load(name).name == name
    # SVHN's files are large: the one that was whole is kept
    assert len(asked) == {"mnist": 4, "svhn": 1}[name]


def prepared(tmp_path, monkeypatch, name) -> tuple[dict[str, bytes], str]:
    """(what a download brings, the last file of it)"""
    if name == "mnist":
        make_idx(tmp_path / "made")
        return publish_idx(monkeypatch, name, tmp_path / "made"), f"{IDX[3]}.gz"
    make_svhn(monkeypatch, tmp_path / "made")
    return {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}, "test_32x32.mat"
