"""Folders of Parquet files as Hugging Face publishes image data sets: encoded images in one column, labels in another.

Source: https://huggingface.co/docs/hub/datasets-image (files train-00000-of-00001.parquet, ...; an image is {bytes,
path}; the schema's metadata has the names of the classes).
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from os import cpu_count
from pathlib import Path

import numpy as np

from blink.errors import UserError
from blink.training.data.dataset import Arrays, beginning, held_back_by_class
from blink.training.data.decoding import common_size, decode, size_of
from blink.training.data.image_tree import TESTS, TRAIN, VAL_SPLIT, held_back_note

# the folder that holds the files, where they are not in the data set's own
INNER = "data"
# a word of a file's name, as in train-00000-of-00001, mnist_test and training
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join((TRAIN, *TESTS))})(ing)?(?![a-z])")
# what columns are called, the likeliest first
_IMAGES, _LABELS = ("image", "img", "images"), ("label", "labels", "fine_label")
# encoded images in memory at a time
_BATCH = 64


def locate(path: Path) -> tuple[Path, list[str]] | None:
    """(the folder of the Parquet files that `path` is meant for, notes): itself, data/ in it or its only folder that
    has any. None where there are none.
    """
    if _files(path):
        return path, []
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _files(folder)]
    if path / INNER in inner:
        return path / INNER, []
    return (inner[0], [f"the images are in {inner[0]}"]) if len(inner) == 1 else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def read(
    root: Path,
    progress: Callable[[int, int], None],
    note: Callable[[str], None] = lambda line: None,
    size: int | None = None,
    val_split: float | None = None,
    limit: int | None = None,
) -> Arrays:
    """Decode the images of the files that `locate` found, which need pyarrow; the arguments are `image_tree.read`'s.

    Files whose names have the word train are for training, those with test (or else val, valid, validation) for
    testing, others are left out; without such names all are one half. Raises UserError, which names file and row (the
    first is 0) of what cannot be used.
    """
    train, test = _halves(root, note)
    if test and val_split is not None:
        raise UserError(f"--val-split: {root} has test images of its own, in {test[0].name}; leave it out")
    files = [*train, *test]
    described = [_columns(path) for path in files]
    for path, found in zip(files, described):
        if found != described[0]:
            raise UserError(
                f"{path} has other columns or classes than {files[0].name}; put them in folders of their own"
            )
    image_column, label_column, names = described[0]
    labels = [_labels(path, label_column, names) for path in files]
    cut, labels = sum(map(len, labels[: len(train)])), np.concatenate(labels)
    if not cut or (test and cut == len(labels)):
        raise UserError(f"{train[0] if not cut else test[0]} and its like hold no row; download them again")
    highest = int(labels.max())
    if names is None:
        note(f"the files name no classes: {label_column} has numbers")
        if highest >= len(labels):
            raise UserError(f"{root} has the label {highest} among {len(labels)} images; labels are 0, 1, 2, ...")
        names = tuple(map(str, range(highest + 1)))
    rows = np.arange(len(labels))
    if test:
        halves = [rows[:cut], rows[cut:]]
    else:
        part = VAL_SPLIT if val_split is None else val_split
        note(held_back_note(part))
        held = held_back_by_class(labels, names, part)
        halves = [rows[~held], rows[held]]
    taken = [half[beginning(len(half), limit)] for half in halves]
    images = _decode(files, image_column, np.concatenate(taken), len(labels), size, progress, note)
    first, second = len(taken[0]), taken[1]
    return names, images[:first], labels[taken[0]], images[first:], labels[second]


def _halves(root: Path, note: Callable[[str], None]) -> tuple[list[Path], list[Path]]:
    """The files of training and of testing, the latter none where there are none. Raises UserError."""
    splits: dict[str, list[Path]] = {}
    for path in _files(root):
        found = _SPLIT.search(path.name.lower())
        splits.setdefault(found[1] if found else "", []).append(path)
    if list(splits) == [""]:
        return splits[""], []
    if TRAIN not in splits:
        raise UserError(f"{root} has no train-*.parquet, but {', '.join(p[0].name for p in splits.values())}")
    test = next((name for name in TESTS if name in splits), None)
    others = [path.name for name, paths in splits.items() if name not in (TRAIN, test) for path in paths]
    if others:
        note(f"{len(others)} Parquet files are left out ({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})")
    return splits[TRAIN], splits.get(test, [])


@contextmanager
def _opened(path: Path) -> Iterator:
    """A pyarrow.parquet.ParquetFile. Raises UserError for whatever pyarrow says of it while it is open."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    try:
        # buffered: a row group is not read as a whole
        with ParquetFile(path, buffer_size=1 << 20) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no readable Parquet file ({reason}); download it again") from error


def _columns(path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of images and labels, and the names of the classes or None. Raises UserError."""
    with _opened(path) as file:
        from pyarrow import types

        schema = file.schema_arrow
        kinds = {
            "images {bytes, path}": (_IMAGES, [f.name for f in schema if types.is_struct(f.type) and _has_bytes(f)]),
            "labels (integers)": (_LABELS, [f.name for f in schema if types.is_integer(f.type)]),
        }
        chosen = []
        for what, (likely, fitting) in kinds.items():
            named = [name for name in likely if name in fitting] or (fitting if len(fitting) == 1 else [])
            if not named:
                columns = ", ".join(f"{f.name} ({str(f.type).split('<')[0]})" for f in schema)
                raise UserError(f"{path} has no column of {what} called {', '.join(likely)}; it has {columns}")
            chosen.append(named[0])
        told = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        names = json.loads(told)
    except ValueError:
        # files that others than Hugging Face wrote; it is said that their classes have no names
        names = None
    for key in ("info", "features", chosen[1], "names"):
        names = names.get(key) if isinstance(names, dict) else None
    return *chosen, tuple(map(str, names)) if isinstance(names, list) and names else None


def _has_bytes(field) -> bool:
    return field.type.get_field_index("bytes") >= 0


def _labels(path: Path, column: str, names: tuple[str, ...] | None) -> np.ndarray:
    """[N] int64 of a file. Raises UserError for one that is missing, negative or beyond the names."""
    with _opened(path) as file:
        values = file.read(columns=[column]).column(0)
        if values.null_count:
            row = values.is_null().to_numpy().argmax()
            raise UserError(f"{path}, row {row} has no label; remove it")
        labels = values.to_numpy().astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names) if names else False))
    if len(wrong):
        expected = f"0 to {len(names) - 1}" if names else "0, 1, 2, ..."
        raise UserError(f"{path}, row {wrong[0]} has the label {labels[wrong[0]]}, expected {expected}; remove it")
    return labels


def _decode(
    files: list[Path], column: str, rows: np.ndarray, total: int, size: int | None, progress: Callable, note: Callable
) -> np.ndarray:
    """The images of these rows, [N, H, W, 3] uint8, of the `total` that the files have one after another."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        if size is None:
            everything = _encoded(files, column, np.arange(total))
            sizes = (one for batch in everything for one in pool.map(lambda each: size_of(*each[1:]), batch))
            height, width = common_size(sizes, note)
        else:
            height = width = size
        images = np.empty((len(rows), height, width, 3), dtype=np.uint8)
        places = np.full(total, -1)
        places[rows] = np.arange(len(rows))

        def decode_one(each: tuple[int, BytesIO, str]) -> None:
            place, raw, name = each
            images[place] = decode(raw, name, (height, width))

        done = 0
        for batch in _encoded(files, column, places):
            done += len(list(pool.map(decode_one, batch)))
            progress(done, len(rows))
    return images


def _encoded(files: list[Path], column: str, places: np.ndarray) -> Iterator[list[tuple[int, BytesIO, str]]]:
    """(place, encoded image, what messages call it) of the rows that have a place, -1 being none, a batch at a time;
    row groups without any are not read. Raises UserError.
    """
    start = 0
    for path in files:
        before = start
        with _opened(path) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                wanted = places[start : start + count]
                batches = file.iter_batches(_BATCH, [group], [column]) if (wanted >= 0).any() else ()
                row = start
                for batch in batches:
                    found = batch.column(0).field("bytes")
                    named = [
                        (int(places[row + i]), found[i], f"{path}, row {row + i - before}")
                        for i in range(len(found))
                        if places[row + i] >= 0
                    ]
                    row += len(found)
                    yield [(place, _bytes(value.as_py(), name), name) for place, value, name in named]
                start += count


def _bytes(value: bytes | None, name: str) -> BytesIO:
    if value is None:
        raise UserError(f"{name} holds no bytes of an image; replace or remove it")
    return BytesIO(value)
