"""Decoded data sets on disk, so that a second start loads in under a second.

A cache file is named by a key taken over the source's place, file names, sizes, times and inodes, and a sample of what
is in the files: a changed or moved source has another key and is decoded anew, as is one whose cache is of no use.
Writes are atomic: another process never sees half a file.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blink.errors import brief
from blink.files import cache_folder, from_json, remove_leftovers, replacing
from blink.training.data.dataset import Dataset

_FORMAT = "4"
# how many files a key looks into, and how many bytes at each end of them
_SAMPLED, _BYTES = 16, 4096
_TENSORS = tuple(f.name for f in fields(Dataset) if f.type is Tensor or f.type == "Tensor")


def source_key(root: Path, options: str = "", files: Sequence[str] | None = None) -> str:
    """A digest of where `root` is, of every file under it (or of `files`, as far as they are there, packed or not):
    relative name, size, times, inode; of the ends of some of them; and of how it is read.
    """
    digest = hashlib.sha256(f"{_FORMAT} {options} ".encode() + os.fsencode(root.resolve()))
    found = _walk(root, "") if files is None else ((name, (root / name).stat()) for name in _present(root, files))
    listed = sorted(found)
    for relative, stat in listed:
        numbers = f"{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\n"
        digest.update(os.fsencode(f"{relative}\0{numbers}"))
    for relative, _ in listed[:: max(1, len(listed) // _SAMPLED)]:
        digest.update(_ends(root / relative))
    return digest.hexdigest()[:24]


def _ends(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(_BYTES)
            file.seek(-min(_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return head + file.read()
    except OSError:
        # the reader names it
        return b""


def _present(root: Path, files: Sequence[str]) -> Iterable[str]:
    return (name for file in files for name in (file, f"{file}.gz") if (root / name).exists())


def _walk(root: Path, prefix: str) -> Iterable[tuple[str, os.stat_result]]:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                # a broken link is left for the reader to name
                yield prefix + entry.name, entry.stat(follow_symlinks=entry.is_file())


def load(key: str) -> tuple[Dataset | None, list[str]]:
    """(the cached data set, what was noted when it was read); where there is none of use, None and a line that says so.

    What is read is held against the checksums that were written with it.
    """
    path = cache_folder() and cache_folder() / f"{key}.safetensors"
    if path is None or not os.path.isfile(path):  # False too where the folder cannot be entered
        return None, []
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("key") != key or set(tensors) != set(_TENSORS):
            raise ValueError(f"it was made for the source {meta.get('key')}, expected {key}")
        if from_json(meta["crc32"]) != _checksums(tensors):
            raise ValueError("its checksums differ")
        told = dict(classes=tuple(from_json(meta["classes"])), mirror=from_json(meta["mirror"]))
        dataset = Dataset(meta["name"], meta["fingerprint"], **told, **tensors)
        return dataset, from_json(meta["notes"])
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        return None, [f"the cached images in {path} are of no use ({brief(error)}): decoded anew"]


def _checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    # against damage; as fast as a disk reads
    return {name: zlib.crc32(tensor.contiguous().numpy()) for name, tensor in sorted(tensors.items())}


def store(key: str, dataset: Dataset, notes: list[str]) -> str | None:
    """Write the data set under its key, with what was noted of it, to be read by whom the umask allows to.

    Returns None, or one line that says why it was not cached.
    """
    if cache_folder() is None:
        return "the decoded images were not cached (no home folder); BLINK_CACHE names another"
    path, tensors = cache_folder() / f"{key}.safetensors", {name: getattr(dataset, name) for name in _TENSORS}
    meta = dict(key=key, name=dataset.name, fingerprint=dataset.fingerprint, crc32=json.dumps(_checksums(tensors)))
    meta |= dict(classes=json.dumps(list(dataset.classes)), mirror=json.dumps(dataset.mirror), notes=json.dumps(notes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=meta)
            # safetensors' own can be read by their owner only
            temporary.chmod(mode)
        return None
    except (OSError, SafetensorError) as error:
        return f"the decoded images were not cached in {path.parent} ({error}); the next start decodes them again"
