"""Decoded data sets on disk, so that a second start loads in under a second.

A cache file is named by a key taken over the source's place, file names, sizes and modification times: a changed or
moved source has another key and is decoded anew. Writes are atomic: another process never sees half a file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blink.errors import UserError
from blink.files import replacing
from blink.training.data.dataset import Dataset

_FORMAT = "3"
_TENSORS = tuple(f.name for f in fields(Dataset) if f.type is Tensor or f.type == "Tensor")


def folder() -> Path:
    """$BLINK_CACHE, else blink under the user's cache folder."""
    if os.environ.get("BLINK_CACHE"):
        return Path(os.environ["BLINK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blink"


def source_key(root: Path, options: str = "", files: Sequence[str] | None = None) -> str:
    """A digest of where `root` is, of every file under it (or of `files`, as far as they are there, packed or not):
    relative name, size, modification time; and of how it is read.
    """
    digest = hashlib.sha256(f"{_FORMAT} {options} ".encode() + os.fsencode(root.resolve()))
    found = _walk(root, "") if files is None else ((name, (root / name).stat()) for name in _present(root, files))
    for relative, stat in sorted(found):
        digest.update(os.fsencode(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    return digest.hexdigest()[:24]


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
    """The cached data set, or None if there is none, and what was noted when it was read.

    Raises UserError when the file is damaged or does not belong to the source its name says.
    """
    path = folder() / f"{key}.safetensors"
    if not os.path.isfile(path):  # False too where the folder cannot be entered
        return None, []
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("key") != key or set(tensors) != set(_TENSORS):
            raise ValueError(f"it was made for the source {meta.get('key')}, expected {key}")
        if len(tensors["train_images"]) != len(tensors["train_labels"]):
            raise ValueError("its images and labels differ in number")
        told = dict(classes=tuple(json.loads(meta["classes"])), mirror=json.loads(meta["mirror"]))
        dataset = Dataset(meta["name"], meta["fingerprint"], **told, **tensors)
        return dataset, json.loads(meta["notes"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the cache {path} does not match its data set ({reason}); delete it and run again") from error


def store(key: str, dataset: Dataset, notes: list[str]) -> str | None:
    """Write the data set under its key, with what was noted of it. Returns None, or one line that says why it was not
    cached.
    """
    path = folder() / f"{key}.safetensors"
    meta = dict(key=key, name=dataset.name, fingerprint=dataset.fingerprint)
    meta |= dict(classes=json.dumps(list(dataset.classes)), mirror=json.dumps(dataset.mirror), notes=json.dumps(notes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: getattr(dataset, name) for name in _TENSORS}, temporary, metadata=meta)
        return None
    except (OSError, SafetensorError) as error:
        return f"the decoded images were not cached in {path.parent} ({error}); the next start decodes them again"
