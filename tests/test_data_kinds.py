"""Every kind of image file, size and number of classes that a folder may have; unequal classes are said."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from blink.command import python_path
from blink.errors import UserError
from blink.experiments.plans import narrowed
from blink.model import backend
from blink.training import data, precision
from blink.training.budget import plan_budget
from blink.training.data.dataset import assemble
from blink.training.data.decoding import decode, fit, pixels_of, size_of
from blink.training.job import unequal_classes
from blink.training.loop import train
from blink.training.recipes import BLINK, HLB
from blink.training.trainer import Trainer
from tests.oracle import DEVICE
from tests.small import random_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    return data.load(str(path), lambda done, total: None, lambda line: None, **options)


def grey(height=5, width=7) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (height, width), dtype=np.uint8)


def colour(channels=3) -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, (5, 7, channels), dtype=np.uint8)


def three(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


def palette() -> tuple[Image.Image, np.ndarray]:
    """Five colours, and pixels that are their numbers."""
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9], [200, 100, 50]], dtype=np.uint8)
    numbers = grey() % 5
    image = Image.fromarray(numbers, "P")
    image.putpalette(colours.flatten().tolist())
    return image, colours[numbers]


def one_bit() -> tuple[Image.Image, np.ndarray]:
    bits = grey() > 127
    return Image.fromarray(bits), three(bits.astype(np.uint8) * 255)


def cmyk() -> tuple[Image.Image, np.ndarray]:
    """A flat one, as JPEG keeps it; red is what cyan leaves of what black leaves."""
    ink = np.array([51, 0, 102, 0], dtype=np.uint8)
    expected = np.broadcast_to(255 - ink[:3], (5, 7, 3))
    return Image.fromarray(np.broadcast_to(ink, (5, 7, 4)).copy(), "CMYK"), expected


def sixteen_bits(kind) -> tuple[Image.Image, np.ndarray]:
    wide = (np.arange(35).reshape(5, 7) * 1872).astype(kind)
    return Image.fromarray(wide), three((wide // 256).astype(np.uint8))


KINDS = {
    "grey.png": (Image.fromarray(grey()), three(grey())),
    "grey and alpha.png": (Image.fromarray(colour(2), "LA"), three(colour(2)[..., 0])),
    "alpha.png": (Image.fromarray(colour(4), "RGBA"), colour(4)[..., :3]),
    "palette.png": palette(),
    "palette.gif": palette(),
    "one bit.png": one_bit(),
    "one bit.tif": one_bit(),
    "cmyk.jpg": cmyk(),
    "cmyk.tif": cmyk(),
    "16 bits.png": sixteen_bits(np.uint16),
    "32 bits that are 16.tif": sixteen_bits(np.int32),
    "colour.bmp": (Image.fromarray(colour()), colour()),
    "colour.webp": (Image.fromarray(colour()), colour()),
    "colour.ppm": (Image.fromarray(colour()), colour()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_out_rgb(tmp_path, name):
    image, expected = KINDS[name]
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    # a flat JPEG is off by rounding, in YCCK
    tolerance = 2 if name.endswith("jpg") else 0
    np.testing.assert_allclose(decode(tmp_path / name).astype(int), expected, atol=tolerance)
    assert decode(tmp_path / name).dtype == np.uint8


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.ones((5, 7), np.float32), "has floating-point pixels, whose range is unknown; save it with 8 or 16 bits"),
        (np.full((5, 7), -3, np.int32), "has pixels from -3 to -3; save it with 8 or 16 bits"),
        (np.full((5, 7), 65536, np.int32), "has pixels from 65536 to 65536; save it with 8 or 16 bits"),
    ],
    ids=["floats", "negative", "beyond 16 bits"],
)
def test_what_8_bits_cannot_hold_is_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "image.tif")
    with pytest.raises(UserError, match=f"image.tif {message}"):
        decode(tmp_path / "image.tif")


# what EXIF's orientations do to a stored image, from the standard's own words: where its row 0 and column 0 are
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    "pixels", [grey(), colour(), grey().astype(np.uint16) * 256], ids=["grey", "colour", "16 bits"]
)
def test_an_image_stands_upright_as_its_camera_says(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    expected = UPRIGHT[orientation](pixels if pixels.dtype == np.uint8 else pixels // 256)
    np.testing.assert_array_equal(decode(tmp_path / "image.png"), three(expected) if expected.ndim == 2 else expected)


def fill(folder, classes, count, size=(11, 13)):
    for label in range(classes):
        (folder / f"{label:04}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (label % 256, label // 256, i)).save(folder / f"{label:04}" / f"{i}.png")


@pytest.mark.parametrize("size", [16, 64, 128])
def test_a_folder_is_brought_to_the_size_that_is_asked_for(tmp_path, size):
    fill(tmp_path / "set", 2, 3)
    dataset = load(tmp_path / "set", size=size)
    assert dataset.image_shape == (3, size, size) and dataset.classes == ("0000", "0001")
    assert dataset.train_images[:, :, :, 0].amax((1, 2)).tolist() == dataset.train_labels.tolist()


def test_a_thousand_classes(tmp_path):
    fill(tmp_path / "set", 1000, 2, (4, 4))
    dataset = load(tmp_path / "set")
    assert len(dataset.classes) == len(dataset.train_images) == len(dataset.test_images) == 1000
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        red, green, _ = images[:, 0, 0].long().unbind(1)
        assert torch.equal(red + 256 * green, labels) and len(labels.unique()) == 1000


@pytest.mark.parametrize("recipe", [BLINK, HLB], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("side, classes", [(16, 10), (128, 10), (32, 2), (32, 1000), (28, 10)])
def test_a_network_trains_on_them(recipe, side, classes):
    """Two steps; the loss begins near that of a guess and every class has its logit."""
    images, tests = random_images(16, side, side).numpy(), random_images(4, side, side, seed=1).numpy()
    labels = (np.arange(16) * 997) % classes
    dataset = assemble("random", tuple(map(str, range(classes))), images, labels, tests, labels[:4]).to(DEVICE)
    recipe = narrowed(recipe, 0.125)
    budget = plan_budget(recipe, 16, 8, steps=2)
    compute = precision.choose("fp32", DEVICE, True)
    result = train(Trainer(recipe, dataset, budget, backend.reference(), compute, graph=False), 0)
    assert len(result.losses) == 2 and np.isfinite(result.losses).all()
    assert result.losses[0] == pytest.approx(np.log(classes), rel=0.5)
    assert result.state["head.weight"].shape[0] == classes and 0 <= result.accuracy <= 1


PEAKS = """
import re
import sys
from pathlib import Path

from blink.training.data.decoding import decode


def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


before = peak()
for path in sys.argv[1:]:
    assert decode(Path(path), size=(16, 16)).shape == (16, 16, 3)
    print(peak() - before)
"""


def test_a_thread_holds_one_full_image_and_a_second_while_it_is_turned(tmp_path):
    """Pillow's take 4 bytes a pixel."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = Image.new("RGB", (5000, 4000), (1, 2, 3))
    whole.save(tmp_path / "upright.png")
    whole.save(tmp_path / "turned.png", exif=exif)
    command = [sys.executable, "-c", PEAKS, str(tmp_path / "upright.png"), str(tmp_path / "turned.png")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    upright, turned = (int(kibibytes) * 1024 / (4 * 5000 * 4000) for kibibytes in done.stdout.split())
    assert 0.9 < upright < 1.3 and turned < 2.3


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(5, 7), (4, 4), (16, 9)])
def test_an_image_decoded_to_a_size_is_the_fitted_one(tmp_path, name, size):
    KINDS[name][0].save(tmp_path / name)
    np.testing.assert_array_equal(decode(tmp_path / name, size=size), fit(decode(tmp_path / name), *size))


def test_a_palette_with_an_opacity_a_colour_needs_no_warning(tmp_path, recwarn):
    image, expected = palette()
    image.save(tmp_path / "image.png", transparency=bytes([0, 128, 255, 7, 9]))
    np.testing.assert_array_equal(decode(tmp_path / "image.png"), expected)
    assert not recwarn.list


def test_a_pil_image_is_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(colour())
    image.getexif().update(exif)
    np.testing.assert_array_equal(pixels_of(image), UPRIGHT[6](colour()))
    assert image.size == (7, 5) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize("shape, decoded", [((6, 6), False), ((6, 7), True)])
def test_the_size_of_a_square_is_known_without_its_pixels(tmp_path, monkeypatch, shape, decoded):
    """A PNG may end with what turns it."""
    loaded = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: loaded.append(1) or load(image))
    Image.fromarray(grey(*shape)).save(tmp_path / "image.png")
    loaded.clear()
    assert size_of(tmp_path / "image.png") == shape and bool(loaded) == decoded


def with_counts(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    names = tuple(f"class {i}" for i in range(len(counts)))
    return assemble("counts", names, images, labels, images[:1], labels[:1])


@pytest.mark.parametrize(
    "counts, note",
    [
        ((5, 5, 5), None),
        ((30, 10, 12), None),
        ((10, 31, 12), "unequal classes: 'class 1' has 31 training images, 'class 0' 10"),
        ((4, 4000, 1), "unequal classes: 'class 1' has 4,000 training images, 'class 2' 1"),
        ((4, 0), "unequal classes: 'class 0' has 4 training images, 'class 1' 0"),
    ],
)
def test_unequal_classes_are_said(counts, note):
    assert unequal_classes(with_counts(counts)) == ([note] if note else [])


@pytest.mark.parametrize("options, said", [((), True), (("--limit", "8"), False)])
def test_the_command_says_that_classes_are_unequal(tmp_path, capsys, options, said):
    """Not where --limit leaves their numbers to chance."""
    from blink.__main__ import main

    for half in ("train", "test"):
        fill(tmp_path / "set" / half, 2, 3)
    for i in range(20):
        Image.new("RGB", (11, 13)).save(tmp_path / "set" / "train" / "0000" / f"more{i}.png")
    (tmp_path / "small.py").write_text(
        "from blink.experiments.plans import narrowed\nfrom blink.training.recipes import BLINK\n"
        "SMALL = narrowed(BLINK, 0.125)\n"
    )
    arguments = ["--recipe", f"{tmp_path / 'small.py'}:SMALL", "--steps", "1", "--batch-size", "4", "--device", "cpu"]
    assert main(["train", "--data", str(tmp_path / "set"), *arguments, *options]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert ("unequal classes: '0000' has 23 training images, '0001' 3" in words) == said
