"""Files of unknown origin, damaged in many ways: read, or refused in one line, and nothing else.

BLINK_FUZZ_EXAMPLES=100000 pytest tests/test_hostile_files.py tries more of them.
"""

import io
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import blink
from blink.errors import UserError
from blink.experiments import records
from blink.training.data.decoding import decode, size_of
from tests.test_api import pixels

COUNT = int(os.environ.get("BLINK_FUZZ_EXAMPLES", "1500"))
FORMATS = [
    ("png", "RGB", {}), ("png", "P", {}), ("png", "I;16", {}), ("png", "1", {}), ("jpeg", "CMYK", {}),
    ("jpeg", "RGB", {"exif": b"Exif\0\0MM\0*"}), ("gif", "P", {}), ("bmp", "RGB", {}), ("bmp", "P", {}),
    ("ppm", "RGB", {}), ("webp", "RGB", {}),
    ("tiff", "RGB", {}), ("tiff", "L", {"compression": "tiff_lzw"}), ("tiff", "RGB", {"compression": "jpeg"}),
    ("tiff", "I;16", {}), ("tiff", "F", {}),
]  # fmt: skip
# what a damaged number becomes: the ends of what 1, 2 and 4 bytes hold
ENDS = [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\0", b"\xff\xff", b"\0\1"]


def mutant(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, numbers at their ends, cut off, doubled or moved."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        # what tells how the rest is read comes first, in most formats
        at = int(len(found) * chance.random() ** 2) if found else 0
        kind = chance.randrange(6)
        if kind == 0 and found:
            found[at] = chance.randrange(256)
        elif kind == 1 and found:
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            end = chance.choice(ENDS)
            found[at : at + len(end)] = end
        elif kind == 3:
            del found[at : at + chance.randrange(1, 40)]
        elif kind == 4:
            found[at:at] = found[at : at + chance.randrange(1, 40)]
        else:
            del found[max(at, len(found) // 2) :]
    return bytes(found)


def image_file(kind: str, mode: str, options: dict) -> bytes:
    values = np.random.RandomState(0).randint(0, 256, (9, 11, 3), dtype=np.uint8)
    if mode in ("F", "I;16"):
        image = Image.fromarray(values[..., 0].astype(np.float32 if mode == "F" else np.uint16))
    else:
        image = Image.fromarray(values).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def refused_or_read(read, *arguments) -> bool:
    """Whether it was read."""
    try:
        read(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


@pytest.mark.parametrize("kind, mode, options", FORMATS, ids=lambda value: str(value))
def test_images(kind, mode, options, tmp_path, capfd, recwarn):
    chance, content = random.Random(f"{kind} {mode} {options}"), image_file(kind, mode, options)
    path = tmp_path / f"image.{kind}"
    path.write_bytes(content)
    assert refused_or_read(decode, path) == (mode != "F")
    for _ in range(max(1, COUNT // len(FORMATS))):
        path.write_bytes(mutant(content, chance))
        refused_or_read(decode, path)
        refused_or_read(size_of, path)
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Of a small run with checkpoints left."""
    out = tmp_path_factory.mktemp("run") / "out"
    groups = {f"network.conv_groups.{i}.channels": 8 for i in range(3)}
    options = dict(batch_size=8, device="cpu", dtype="fp32", epochs=2, settings=groups, out=out)

    def stop(row):
        if row.epoch == 2 and len(list(out.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blink.train((*pixels(24), *pixels(8)), runs=2, callbacks=[stop], **options)
    return out


def header_mutant(content: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file: its JSON header changed as text, its length told rightly most of the time."""
    (length,) = struct.unpack("<Q", content[:8])
    header = mutant(content[8 : 8 + length], chance)
    told = len(header) if chance.random() < 0.8 else chance.choice((0, 2**63, 2**32, length))
    return struct.pack("<Q", told) + header + content[8 + length :]


@pytest.mark.parametrize("damage", [mutant, header_mutant])
def test_networks(run_folder, tmp_path, damage):
    chance, path = random.Random(0), tmp_path / "x.safetensors"
    content = (run_folder / "blink-seed0.safetensors").read_bytes()
    # the head of the file is what matters
    results = []
    for _ in range(max(1, COUNT // 30)):
        path.write_bytes(damage(content, chance))
        results.append(refused_or_read(blink.load, path, "cpu"))
    assert False in results


def described(content: bytes, change) -> bytes:
    """A network's file with what it says of itself changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["blink"])
    change(about)
    header["__metadata__"]["blink"] = json.dumps(about)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def huge_groups(about):
    about["network"]["conv_groups"][0]["channels"] = 10**7


def many_groups(about):
    about["network"]["conv_groups"] *= 10**4


def many_classes(about):
    about["classes"] = ["x"] * 10**7


@pytest.mark.parametrize("change", [huge_groups, many_groups, many_classes])
def test_a_network_that_says_it_is_huge_takes_no_memory(run_folder, tmp_path, change):
    path = tmp_path / "x.safetensors"
    path.write_bytes(described((run_folder / "blink-seed0.safetensors").read_bytes(), change))
    with pytest.raises(UserError, match="cannot be used here"):
        blink.load(path, "cpu")


def test_deep_nesting_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"__metadata__": {"blink": "[" * 100_000}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert not refused_or_read(blink.load, path)
    (tmp_path / "x.jsonl").write_text("[" * 100_000 + "\n{}\n")
    assert not refused_or_read(records.read, tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["summary.json", "checkpoint"])
def test_folders_to_resume(run_folder, tmp_path, name):
    """A damaged checkpoint is passed over, a damaged summary refused."""
    chance, out = random.Random(0), tmp_path / "out"
    for _ in range(max(1, COUNT // 500)):
        out.mkdir(exist_ok=True)
        for path in run_folder.iterdir():
            content = path.read_bytes()
            hit = path.name == name or path.suffix == f".{name}"
            (out / path.name).write_bytes(mutant(content, chance) if hit else content)
        refused_or_read(lambda: blink.train((*pixels(24), *pixels(8)), resume=out))


def test_lines_of_runs(tmp_path):
    chance, path = random.Random(0), tmp_path / "x.jsonl"
    line = json.dumps({"plan": "x", "variant": "a", "seed": 0, "accuracy": 0.5}) + "\n"
    for _ in range(max(1, COUNT // 10)):
        path.write_bytes(mutant(4 * line.encode(), chance))
        refused_or_read(records.read, path)


def test_a_pickle_is_not_opened(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    for name in ("x.safetensors", "x.png"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    assert not refused_or_read(blink.load, tmp_path / "x.safetensors")
    assert not refused_or_read(decode, tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()
