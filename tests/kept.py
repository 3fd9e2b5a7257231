"""Trainings of a moment, kept as a user keeps them, for the tests of what shows them."""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from blink.__main__ import main

CLASSES = ("<script>alert(1)</script>".replace("/", "\\"), "cat & dog", 'a "bird" \udce9')
TINY = [
    *("--recipe", "hlb", "--batch-size", "8", "--steps", "9", "--device", "cpu", "--dtype", "fp32"),
    *(word for i in range(3) for word in ("--set", f"network.conv_groups.{i}.channels=8")),
]


def tree(root: Path) -> Path:
    """Images of 12x12 of three classes whose names a page must not believe."""
    random = np.random.RandomState(0)
    for half in ("train", "test"):
        for name in CLASSES:
            folder = root / half / name
            folder.mkdir(parents=True)
            for i in range(12):
                Image.fromarray(random.randint(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@contextmanager
def own_cache(folder: Path):
    """For fixtures that outlive a test's monkeypatch."""
    before = os.environ.get("BLINK_CACHE")
    os.environ["BLINK_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["BLINK_CACHE"]
        if before is not None:
            os.environ["BLINK_CACHE"] = before


def keep(data: Path, out: Path, *options: str) -> Path:
    """`out`, the folder of a training of two runs on these images."""
    assert main(["train", "--data", str(data), *TINY, "--runs", "2", "--out", str(out), *options]) == 0
    return out
