"""CIFAR readers on small files in the published formats, downloads, and the default source's fallback."""

import hashlib
import os
import pickle
import shutil
import socket
import sys
import tarfile
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from blink.errors import UserError
from blink.training import data
from blink.training.data import cifar, downloading
from blink.training.data.dataset import CIFAR10_MEAN, CIFAR10_STD, fixed_order
from blink.training.data.layouts import LAYOUTS, Layout

ROWS = 4
CLASSES = {"cifar10": 10, "cifar100": 100}
LABEL_KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEFAULT_ROOT", tmp_path / "data")


def layout_of(name: str, binary: bool) -> Layout:
    (layout,) = [each for each in LAYOUTS if (each.name, each.label_bytes > 0) == (name, binary)]
    return layout


def load(source, notes=None):
    return data.load(source, lambda done, total: None, (notes if notes is not None else []).append)


def dump(content, module="numpy.core.multiarray") -> bytes:
    """A protocol 2 pickle that names numpy's `_reconstruct` under the given module, as files old or new."""
    raw = pickle.dumps(content, protocol=2)
    for written in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
        raw = raw.replace(written, f"c{module}\n".encode())
    return raw


def put(folder: Path, name: str, raw: bytes) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return name, hashlib.md5(raw).hexdigest()


def publish(monkeypatch, name, **changes):
    """Let torchvision's class of this name say something else in this test."""
    monkeypatch.setitem(cifar.PUBLISHED, name, type("Changed", (cifar.PUBLISHED[name],), changes))


def make_python(monkeypatch, folder: Path, name="cifar10", module="numpy.core.multiarray"):
    """Write a published folder of random images, whose md5 sums are then the published ones; returns its layout and
    each half's (rows, labels).
    """
    source = cifar.PUBLISHED[name]
    random = np.random.RandomState(1)
    written, halves = [], []
    for files in (source.train_list, source.test_list):
        sums, rows, labels = [], [], []
        for file, _ in files:
            batch = random.randint(0, 256, (ROWS, 3072), dtype=np.uint8)
            numbers = random.randint(0, CLASSES[name], ROWS).tolist()
            sums.append(put(folder, file, dump({"data": batch, LABEL_KEYS[name]: numbers}, module)))
            rows.append(batch)
            labels += numbers
        written.append(sums)
        halves.append((np.concatenate(rows), labels))
    names = [f"class {i}" for i in range(CLASSES[name])]
    file, md5 = put(folder, source.meta["filename"], dump({source.meta["key"]: names}))
    meta = {"filename": file, "key": source.meta["key"], "md5": md5}
    publish(monkeypatch, name, train_list=written[0], test_list=written[1], meta=meta)
    return layout_of(name, binary=False), halves


def with_file(monkeypatch, folder: Path, raw: bytes) -> None:
    """CIFAR-10's first training file replaced by `raw`, md5 sum included."""
    first, *others = cifar.PUBLISHED["cifar10"].train_list
    publish(monkeypatch, "cifar10", train_list=[put(folder, first[0], raw), *others])


def pixels_of(rows: np.ndarray) -> np.ndarray:
    """The published row order spelled out: all of red, then green, then blue, each by rows."""
    out = np.empty((len(rows), 32, 32, 3), np.uint8)
    for channel in range(3):
        for y in range(32):
            start = channel * 1024 + y * 32
            out[:, y, :, channel] = rows[:, start : start + 32]
    return out


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_python_batches_give_every_pixel_and_label(tmp_path, monkeypatch, name, module):
    layout, halves = make_python(monkeypatch, tmp_path, name, module)
    assert f"c{module}\n_reconstruct".encode() in (tmp_path / layout.train[0]).read_bytes()
    classes, *arrays = cifar.read(tmp_path, layout)
    assert classes == tuple(f"class {i}" for i in range(CLASSES[name]))
    for images, labels, (rows, numbers) in zip(arrays[::2], arrays[1::2], halves, strict=True):
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        np.testing.assert_array_equal(images, pixels_of(rows))
        assert labels.tolist() == numbers


def test_wrong_md5_names_the_file(tmp_path, monkeypatch):
    layout, _ = make_python(monkeypatch, tmp_path)
    path = tmp_path / "data_batch_3"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"data_batch_3 does not match its published md5"):
        cifar.read(tmp_path, layout)


def test_missing_file_is_named(tmp_path, monkeypatch):
    layout, _ = make_python(monkeypatch, tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(UserError, match="lacks test_batch"):
        cifar.read(tmp_path, layout)


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    folder, mark = tmp_path / "batches", tmp_path / "executed"
    layout, _ = make_python(monkeypatch, folder)
    with_file(monkeypatch, folder, dump({"data": Malicious(f"touch {mark}")}))
    with pytest.raises(UserError, match=r"data_batch_1.*system"):
        cifar.read(folder, layout)
    assert not mark.exists()


def _truncated():
    raw = dump({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(_truncated(), id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(dump([1, 2]), id="no dictionary"),
        pytest.param(dump({"labels": [0]}), id="no data"),
        pytest.param(dump({"data": np.zeros((1, 3072), np.float32), "labels": [0]}), id="float data"),
        pytest.param(dump({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), id="too few labels"),
        pytest.param(dump({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}), id="short rows"),
    ],
)
def test_malformed_python_batch_is_named(tmp_path, monkeypatch, raw):
    layout, _ = make_python(monkeypatch, tmp_path)
    with_file(monkeypatch, tmp_path, raw)
    with pytest.raises(UserError, match="data_batch_1"):
        cifar.read(tmp_path, layout)


@pytest.mark.parametrize("label", [10, -1])
def test_python_label_out_of_range(tmp_path, monkeypatch, label):
    layout, _ = make_python(monkeypatch, tmp_path)
    raw = dump({"data": np.zeros((1, 3072), np.uint8), "labels": [label]})
    with_file(monkeypatch, tmp_path, raw)
    with pytest.raises(UserError, match="label"):
        cifar.read(tmp_path, layout)


def make_binary(folder: Path, name: str):
    """Write the binary version; the label is the record's last label byte (CIFAR-100: coarse, then fine)."""
    layout = layout_of(name, binary=True)
    random = np.random.RandomState(2)
    halves = []
    for files in (layout.train, layout.test):
        records = []
        for file in files:
            record = random.randint(0, 256, (ROWS, layout.label_bytes + 3072), dtype=np.uint8)
            record[:, layout.label_bytes - 1] = random.randint(0, CLASSES[name], ROWS)
            put(folder, file, record.tobytes())
            records.append(record)
        records = np.concatenate(records)
        halves.append((records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].tolist()))
    names = "".join(f"class {i}\n" for i in range(CLASSES[name]))
    (folder / layout.classes).write_text(names + "\n")
    return layout, halves


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_binary_batches_give_every_pixel_and_label(tmp_path, name):
    layout, halves = make_binary(tmp_path, name)
    classes, *arrays = cifar.read(tmp_path, layout)
    assert classes == tuple(f"class {i}" for i in range(CLASSES[name]))
    for images, labels, (rows, numbers) in zip(arrays[::2], arrays[1::2], halves, strict=True):
        np.testing.assert_array_equal(images, pixels_of(rows))
        assert labels.tolist() == numbers


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("keep", [0, 3072, -1], ids=["empty", "half a record", "a byte short"])
def test_truncated_binary_batch_is_named(tmp_path, name, keep):
    layout, _ = make_binary(tmp_path, name)
    path = tmp_path / layout.train[-1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path.name} is truncated"):
        cifar.read(tmp_path, layout)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_binary_label_out_of_range(tmp_path, name):
    layout, _ = make_binary(tmp_path, name)
    path = tmp_path / layout.test[0]
    raw = bytearray(path.read_bytes())
    raw[layout.label_bytes - 1] = CLASSES[name]
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"label {CLASSES[name]}, but names only {CLASSES[name]} classes"):
        cifar.read(tmp_path, layout)


@pytest.mark.parametrize("missing", ["data_batch_2.bin", "batches.meta.txt"])
def test_missing_binary_file_is_named(tmp_path, missing):
    layout, _ = make_binary(tmp_path, "cifar10")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"lacks {missing}"):
        cifar.read(tmp_path, layout)


@pytest.mark.parametrize("parent", [False, True], ids=["folder itself", "its parent"])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_a_cifar_folder_is_recognized(tmp_path, monkeypatch, kind, parent):
    name = layout_of("cifar10", kind == "binary").folder
    make = partial(make_python, monkeypatch) if kind == "python" else make_binary
    _, halves = make(tmp_path / name, "cifar10")
    dataset = load(str(tmp_path if parent else tmp_path / name))
    assert (dataset.name, dataset.generated) == ("cifar10", False)
    assert torch.equal(dataset.mean, torch.tensor(CIFAR10_MEAN))
    assert torch.equal(dataset.std, torch.tensor(CIFAR10_STD))
    rows, labels = halves[0]
    order = fixed_order(len(rows))
    np.testing.assert_array_equal(dataset.train_images.numpy(), pixels_of(rows)[order])
    assert dataset.train_labels.tolist() == np.array(labels)[order].tolist()


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_a_second_start_does_without_torchvision(tmp_path, monkeypatch, kind):
    """Its import takes two seconds."""
    if kind == "python":
        make_python(monkeypatch, tmp_path / "cifar-10-batches-py")
    else:
        make_binary(tmp_path / "cifar-10-batches-bin", "cifar10")
    first = load(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "blink.training.data.cifar")
    monkeypatch.delattr(data, "cifar")
    assert load(str(tmp_path)).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", cifar.PUBLISHED)
def test_the_names_of_a_folder_are_torchvisions(name):
    layout, source = layout_of(name, binary=False), {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    assert (layout.folder, layout.classes) == (source.base_folder, source.meta["filename"])
    for own, theirs in ((layout.train, source.train_list), (layout.test, source.test_list)):
        assert own == tuple(file for file, _ in theirs)


def test_cifar100_takes_its_own_statistics(tmp_path):
    make_binary(tmp_path, "cifar100")
    dataset = load(str(tmp_path))
    pixels = dataset.train_images.double() / 255
    torch.testing.assert_close(dataset.mean.double(), pixels.mean((0, 1, 2)), atol=1e-6, rtol=0)


def test_default_source_is_a_local_cifar10(tmp_path, monkeypatch):
    make_binary(data.DEFAULT_ROOT / "cifar-10-batches-bin", "cifar10")

    def never(*args):
        raise AssertionError("downloaded although the data set is there")

    monkeypatch.setattr(cifar, "download_url", never)
    assert load(None).name == "cifar10"
    assert load("cifar10").fingerprint == load(None).fingerprint


@pytest.fixture
def small_generated(monkeypatch):
    from blink.training.data import synthetic

    generate = synthetic.generate
    monkeypatch.setattr(synthetic, "generate", lambda: generate(train=20, test=10))


@pytest.mark.parametrize(
    "failure",
    [
        URLError("no route to host"),
        TimeoutError(),
        RuntimeError("File not found or corrupted."),
        OSError(28, "full"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_failing_download_falls_back_with_a_note_or_is_one_line(monkeypatch, small_generated, failure):
    def fail(*args):
        raise failure

    monkeypatch.setattr(cifar, "download_url", fail)
    notes = []
    dataset = load(None, notes)
    assert dataset.generated and dataset.name != "cifar10"
    assert any("could not download cifar10" in note for note in notes)
    assert all("\n" not in note for note in notes)
    for name in ("cifar10", "cifar100"):
        with pytest.raises(UserError, match=f"could not download {name}"):
            load(name)


@pytest.fixture
def listener():
    """A socket that accepts connections and answers with what the test sends, or never."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def point_at(monkeypatch, server):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
    publish(monkeypatch, "cifar10", url=url)


@pytest.mark.parametrize("before", [None, 77.0], ids=["no default timeout", "a default timeout"])
def test_silent_network_times_out_and_default_is_kept(monkeypatch, small_generated, listener, before):
    monkeypatch.setattr(downloading, "SOCKET_TIMEOUT_SECONDS", 0.2)
    point_at(monkeypatch, listener)
    kept = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        notes = []
        assert load(None, notes).generated
        assert any("timed out" in note for note in notes)
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(kept)


def test_an_answer_that_is_not_http_is_one_line(monkeypatch, listener):
    import threading

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"this is no HTTP\r\n\r\n")

    point_at(monkeypatch, listener)
    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(UserError, match="could not download cifar10"):
        load("cifar10")
    thread.join()


def offer(monkeypatch, archive: Path):
    """Make `archive` what a download of CIFAR-10 brings."""

    def copy(url, root, filename, md5):
        assert (url, filename, md5) == (CIFAR10.url, CIFAR10.filename, CIFAR10.tgz_md5)
        assert socket.getdefaulttimeout() == downloading.SOCKET_TIMEOUT_SECONDS
        shutil.copy(archive, Path(root) / filename)

    monkeypatch.setattr(cifar, "download_url", copy)


@pytest.mark.parametrize("source", [None, "cifar10"], ids=["default", "named"])
def test_downloaded_archive_is_unpacked_and_read(tmp_path, monkeypatch, source):
    folder = tmp_path / "made"
    layout, halves = make_python(monkeypatch, folder)
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as archive:
        archive.add(folder, layout.folder)
    offer(monkeypatch, tmp_path / "made.tar.gz")
    notes = []
    dataset = load(source, notes)
    assert dataset.name == "cifar10" and not dataset.generated
    assert len(dataset.train_images) == len(halves[0][0]) and len(dataset.test_images) == len(halves[1][0])
    assert notes == ["downloading cifar10 ..."]
    assert (data.DEFAULT_ROOT / layout.folder / "data_batch_1").is_file()


def test_archive_that_climbs_out_is_refused(tmp_path, monkeypatch):
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil", "../climbed")
    offer(monkeypatch, tmp_path / "evil.tar.gz")
    with pytest.raises(UserError, match="could not download cifar10"):
        load("cifar10")
    assert not (tmp_path / "climbed").exists()


def test_truncated_archive_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "noise").write_bytes(np.random.RandomState(0).bytes(100_000))
    with tarfile.open(tmp_path / "cut.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "noise", "cifar-10-batches-py/data_batch_1")
    raw = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(raw[: len(raw) // 2])
    offer(monkeypatch, tmp_path / "cut.tar.gz")
    with pytest.raises(UserError, match="could not download cifar10"):
        load("cifar10")
    assert not (data.DEFAULT_ROOT / "cifar-10-batches-py").exists()
