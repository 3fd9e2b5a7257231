"""A run's file is enough to use its network: saved, loaded, called and read by people."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blink
from blink.errors import UserError
from blink.inference.images import fitted
from blink.model import saved
from blink.model.network import Group, Network, NetworkConfig
from blink.training.recipes import RECIPES
from tests.oracle import DEVICE
from tests.small import narrow_network

CLASSES, SHAPE = ("cat", "caf\udce9", "dog"), (3, 12, 14)


def network(recipe: str) -> Network:
    return narrow_network(recipe, len(CLASSES), SHAPE)


def images(count: int = 4) -> torch.Tensor:
    return torch.randint(256, (count, *SHAPE), dtype=torch.uint8)


@pytest.fixture
def file(tmp_path):
    net = network("hlb")
    path = tmp_path / "hlb.safetensors"
    saved.save(path, net.state_dict(), net.config, CLASSES, SHAPE, {"accuracy": 0.5, "data": {"name": "x", "test": 8}})
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_network_is_the_saved_one(tmp_path, recipe):
    net, pixels = network(recipe), images()
    path = tmp_path / "one.safetensors"
    saved.save(path, net.state_dict(), net.config, CLASSES, SHAPE, {})
    model = blink.load(path, device="cpu", kernels="reference")
    assert torch.equal(model(pixels), net(pixels.contiguous(memory_format=torch.channels_last)))
    assert model.classes == CLASSES and model.image_shape == SHAPE and model.network.config == net.config
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_half_precision_weights_are_widened_exactly(tmp_path):
    net = network("blink").to_compute_dtype(torch.float16)
    path = tmp_path / "half.safetensors"
    saved.save(path, net.state_dict(), net.config, CLASSES, SHAPE, {})
    state = blink.load(path, device="cpu").network.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value.to(state[name].dtype)), name
        assert state[name].dtype != torch.float16


def test_modes_follow_the_umask(tmp_path, file):
    old = os.umask(0o027)
    try:
        net = network("air")
        path = tmp_path / "mode.safetensors"
        saved.save(path, net.state_dict(), net.config, CLASSES, SHAPE, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_predict_takes_images_of_any_kind(file, tmp_path):
    model = blink.load(file)
    array = np.random.RandomState(0).randint(256, size=(12, 14, 3)).astype(np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "p.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [tmp_path / "p.png", str(tmp_path / "p.png"), picture, array, tensor]
    probabilities = model.predict(kinds, batch=2)
    assert probabilities.shape == (5, 3) and torch.allclose(probabilities.sum(1), torch.ones(5))
    assert torch.allclose(probabilities, probabilities[:1].expand(5, 3))
    want = model(tensor[None].to(DEVICE)).softmax(1).cpu()
    assert torch.allclose(probabilities[:1], want, atol=1e-6)
    assert model.predict([]).shape == (0, 3)


def test_images_are_scaled_to_cover_and_cropped_to_the_middle():
    array = np.zeros((24, 60, 3), dtype=np.uint8)
    array[:, 16:44] = 200
    middle = fitted(array, (3, 12, 14))
    assert middle.shape == (3, 12, 14) and (middle[:, :, 1:-1] > 190).all()
    same = np.random.RandomState(0).randint(256, size=(12, 14)).astype(np.uint8)
    assert torch.equal(fitted(same, (3, 12, 14))[0], torch.from_numpy(same))
    assert fitted(Image.new("RGBA", (500, 3)), (3, 12, 14)).shape == (3, 12, 14)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photograph_stands_upright(tmp_path, orientation):
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    upright = np.random.RandomState(0).randint(256, size=(16, 16, 3)).astype(np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    for image in (tmp_path / "p.png", Image.open(tmp_path / "p.png")):
        assert np.array_equal(fitted(image, (3, 16, 16)).permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8), 3, None])
def test_what_is_no_image_is_said(image, file):
    with pytest.raises(UserError, match="an image is a path, a PIL image or uint8 pixels"):
        blink.load(file).predict([image])


@pytest.mark.parametrize("shape", [(4, 3, 12, 13), (3, 12, 14), (4, 1, 12, 14)])
def test_a_call_takes_images_of_the_networks_size(file, shape):
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 12, 14\] uint8, found"):
        blink.load(file)(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        blink.load(file)(torch.zeros(1, *SHAPE))


def test_files_of_no_use_are_one_line(tmp_path, file):
    with pytest.raises(UserError, match=r"there is no .*nothing\.safetensors; expected a \.safetensors file"):
        blink.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="is no saved network"):
        blink.load(tmp_path / "text")
    with pytest.raises(UserError, match="is no saved network"):
        blink.load(tmp_path)
    others = tmp_path / "others.safetensors"
    save_file({"a": torch.ones(1)}, others)
    with pytest.raises(UserError, match="no description of a network"):
        blink.load(others)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "is of a later version of blink"),
        ({"format": "1"}, "is no saved network"),
        ({"classes": ["one"]}, "at least 2 classes"),
        ({"classes": ["a", "b"]}, "cannot be used here .*size mismatch"),
        ({"image_shape": [3, 2, 2]}, "are too small"),
        ({"image_shape": "large"}, "cannot be used here"),
        ({"network": {}}, "cannot be used here"),
        ({"network": None}, "cannot be used here"),
        ({"network": {"conv_groups": [], "nonsense": 1}}, "cannot be used here"),
    ],
)
def test_a_file_that_was_tampered_with_is_one_line(file, change, message):
    with safe_open(file, "pt") as old:
        metadata = old.metadata()
    content = {**json.loads(metadata["blink"]), **change}
    save_file(load_file(file), file, {**metadata, "blink": json.dumps(content)})
    with pytest.raises(UserError, match=message) as caught:
        blink.load(file)
    assert "\n" not in str(caught.value)


def test_impossible_devices_and_kernels_are_one_line(file):
    with pytest.raises(UserError, match="unknown kernels 'none'"):
        blink.load(file, kernels="none")
    with pytest.raises(UserError, match="cannot be used here"):
        blink.load(file, device="gpu")


def test_the_card_says_what_it_is():
    groups = (Group(8),)
    content = {"network": NetworkConfig(conv_groups=groups), "classes": [str(i) for i in range(12)]}
    data = {"name": "photographs", "fingerprint": "abc", "train": 3000, "test": 1000, "generated": False}
    facts = {"accuracy": 0.91234, "data": data, "recipe": {"name": "blink"}, "command": ["blink", "train"]}
    card = saved.model_card({**content, **facts, "image_shape": SHAPE, "versions": {"torch": "2"}})
    assert card.startswith("# blink on photographs\n") and "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more" in card
    for part in ("1,000 test images", "0.9123", "fingerprint abc", "3,000 training images", "blink train", "torch 2"):
        assert part in card
    assert "means nothing elsewhere" in saved.model_card({**content, "image_shape": SHAPE, "data": {"generated": True}})
