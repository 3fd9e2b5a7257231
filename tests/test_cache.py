"""The cache of decoded images: never stale, never in the way, and for a whole group."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from blink.training import data
from blink.training.data import cache


def tree(root: Path, value: int) -> Path:
    """Twelve images whose files are of equal names, sizes and times, whatever the value."""
    for half in ("train", "test"):
        for name in "ab":
            folder = root / half / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((12, 12, 3), value, dtype=np.uint8)).save(folder / f"{i}.bmp")
                os.utime(folder / f"{i}.bmp", ns=(10**18, 10**18))
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(root) -> tuple[data.Dataset, list[str]]:
    notes = []
    return data.load(str(root), lambda done, total: None, notes.append), notes


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_other_images_of_equal_names_sizes_and_times(tmp_path, folder):
    root = tree(tmp_path / "images", 10)
    assert loaded(root)[0].train_images.unique().tolist() == [10]
    shutil.rmtree(root)
    tree(root, 20)
    assert loaded(root)[0].train_images.unique().tolist() == [20]


def test_even_of_equal_inodes_and_change_times(tmp_path, folder, monkeypatch):
    """What is in the files tells."""
    walk = cache._walk

    class Alike:
        st_size, st_mtime_ns, st_ctime_ns, st_ino = 1, 1, 1, 1

        def __lt__(self, other):
            return False

    monkeypatch.setattr(cache, "_walk", lambda root, prefix: ((name, Alike()) for name, _ in walk(root, prefix)))
    root = tree(tmp_path / "images", 10)
    first = cache.source_key(root)
    assert cache.source_key(root) == first
    shutil.rmtree(root)
    assert cache.source_key(tree(root, 20)) != first


def test_a_second_load_decodes_nothing(tmp_path, folder, monkeypatch):
    root = tree(tmp_path / "images", 10)
    before, _ = loaded(root)
    monkeypatch.setattr("blink.training.data.image_tree.decode", None)
    after, notes = loaded(root)
    assert notes == [] and torch.equal(before.train_images, after.train_images)


def rewrite(path, change_tensors=lambda t: None, change_meta=lambda m: None):
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change_tensors(tensors)
    change_meta(meta)
    save_file(tensors, path, metadata=meta)


def shorten(tensors):
    tensors["train_labels"] = tensors["train_labels"][1:].clone()


def spoil(path):
    """One pixel."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"\n\n\n\n")] = 99
    path.write_bytes(content)


DAMAGE = {
    "pixel": spoil,
    "header": lambda path: path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "other source": lambda path: rewrite(path, change_meta=lambda m: m.update(key="0" * 24)),
    "tensor missing": lambda path: rewrite(path, change_tensors=lambda t: t.pop("std")),
    "label missing": lambda path: rewrite(path, change_tensors=shorten),
    "no classes": lambda path: rewrite(path, change_meta=lambda m: m.pop("classes")),
    "bad classes": lambda path: rewrite(path, change_meta=lambda m: m.update(classes="[")),
}


@pytest.mark.parametrize("damage", [*DAMAGE.values(), None], ids=[*DAMAGE, "unreadable"])
def test_a_cache_of_no_use_is_made_anew(tmp_path, folder, damage, monkeypatch):
    root = tree(tmp_path / "images", 10)
    before, _ = loaded(root)
    file, real = only(folder), cache.safe_open

    def refuse(path, framework):
        monkeypatch.setattr(cache, "safe_open", real)
        raise PermissionError(13, "Permission denied")

    if damage is None:
        monkeypatch.setattr(cache, "safe_open", refuse)
    else:
        damage(file)
    after, (note,) = loaded(root)
    assert note.startswith(f"the cached images in {file} are of no use (") and "\n" not in note
    assert torch.equal(before.train_images, after.train_images) and after.fingerprint == before.fingerprint
    # and is of use again
    assert loaded(root)[1] == []


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, folder, mask, mode):
    before = os.umask(mask)
    try:
        loaded(tree(tmp_path / "images", 10))
    finally:
        os.umask(before)
    assert only(folder).stat().st_mode & 0o777 == mode and folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_without_a_home_nothing_is_cached(tmp_path, monkeypatch):
    for name in ("BLINK_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    for _ in range(2):
        dataset, notes = loaded(tmp_path / "images" if (tmp_path / "images").exists() else tree(tmp_path / "images", 9))
        assert notes == ["the decoded images were not cached (no home folder); BLINK_CACHE names another"]
        assert len(dataset.train_images) == 6


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "file" / "cache"))
    dataset, (note,) = loaded(tree(tmp_path / "images", 10))
    assert note.startswith("the decoded images were not cached in") and len(dataset.train_images) == 6


def test_what_a_killed_process_left_is_removed(tmp_path, folder):
    from blink.files import _node

    folder.mkdir()
    left = folder / f"x.safetensors.{_node()}-999999999.tmp"
    left.write_text("half")
    own = folder / f"y.safetensors.{_node()}-{os.getpid()}.tmp"
    own.write_text("in work")
    loaded(tree(tmp_path / "images", 10))
    assert not left.exists() and own.exists()
