"""`blink.train`: data in memory, callbacks, settings, and what its result gives."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import blink
from blink.errors import UserError
from blink.training.data.in_memory import from_memory
from blink.training.listener import Listener
from blink.training.recipes import BLINK, with_network

QUICK = dict(batch_size=8, device="cpu", dtype="fp32", steps=4)


def pixels(count=40, side=12, channels=3):
    random = np.random.RandomState(0)
    shape = (count, side, side, channels) if channels else (count, side, side)
    return random.randint(0, 256, shape, dtype=np.uint8), np.arange(count) % 4


class Pairs(torch.utils.data.Dataset):
    """What torchvision's data sets look like."""

    classes = ("ant", "bee", "cat", "dog")

    def __init__(self, images, labels):
        self._images, self._labels = images, labels

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return Image.fromarray(self._images[i]), int(self._labels[i])


def test_all_forms_of_one_data_set_are_one():
    images, labels = pixels(60)
    tests = images[40:], labels[40:]
    images, labels = images[:40], labels[:40]
    plain = from_memory((images, labels, *tests))
    assert plain.train_images.shape == (40, 12, 12, 3) and plain.classes == ("0", "1", "2", "3")
    tensors = [torch.from_numpy(x) for x in (images.transpose(0, 3, 1, 2).copy(), labels, tests[0], tests[1])]
    assert from_memory(tuple(tensors)).fingerprint == plain.fingerprint
    assert from_memory((list(map(Image.fromarray, images)), list(labels), *tests)).fingerprint == plain.fingerprint
    both = from_memory((Pairs(images, labels), Pairs(*tests)))
    assert both.classes == Pairs.classes and torch.equal(both.train_images, plain.train_images)
    assert torch.equal(both.test_labels, plain.test_labels)


def test_grey_images_and_a_split_that_is_stratified():
    images, labels = pixels(40, channels=None)
    made = from_memory((images, labels), val_split=0.2, classes=["a", "b", "c", "d"])
    assert made.train_images.shape == (32, 12, 12, 3) and torch.equal(
        made.train_images[..., 0], made.train_images[..., 2]
    )
    assert made.test_labels.bincount().tolist() == [2, 2, 2, 2] and made.classes == ("a", "b", "c", "d")
    everything = torch.cat([made.train_images, made.test_images])[..., 0].flatten(1)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, images.reshape(40, -1).tolist()))


def test_images_of_many_sizes_are_brought_to_one():
    images = [np.full((8 + i, 20, 3), i, dtype=np.uint8) for i in range(8)]
    made = from_memory((images, [0, 1] * 4), size=10)
    assert made.image_shape == (3, 10, 10) and len(made.test_images) == 2


@pytest.mark.parametrize(
    "data, options, message",
    [
        (3, {}, "data is a path or a name, .* found int"),
        ((1, 2, 3), {}, "data is a path"),
        ((np.zeros((4, 8, 8, 3), np.uint8), [0, 1]), {}, "4 images and 2 labels"),
        ((np.zeros((0, 8, 8, 3), np.uint8), []), {}, "0 images"),
        ((np.zeros((2, 8, 8, 3), np.float32), [0, 1]), {}, "image 0: an image is .* found float32"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, -1]), {}, "a label -1"),
        ((np.zeros((2, 8, 8, 3), np.uint8), [0, 5]), {"classes": ["a", "b"]}, "a label 5, and classes are 2"),
        (([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], [0, 1]), {}, "image 1 is of 9x8"),
        ((*pixels(8), *pixels(8, side=10)), {}, "training and test images are of 12x12 and 10x10"),
        ((*pixels(8), *pixels(8)), {"val_split": 0.5}, "test images are given"),
        ((np.zeros((3, 8, 8, 3), np.uint8), [0, 0, 1]), {}, "class '1' has one image"),
    ],
)
def test_what_is_no_data_is_one_line(data, options, message):
    with pytest.raises(UserError, match=message) as caught:
        from_memory(data, **options)
    assert "\n" not in str(caught.value)


def test_a_result_has_what_the_command_writes_and_its_networks(tmp_path, capsys):
    images, labels = pixels(60)
    rows, starts = [], []
    result = blink.train(
        (images, labels), runs=2, callbacks=[rows.append, Listener(on_start=starts.append)], translation=1,
        settings={"network.norm_momentum": 0.5}, classes=["a", "b", "c", "d"], seed=3, **QUICK,
    )  # fmt: skip
    assert capsys.readouterr() == ("", "")
    assert starts == [3, 4] and len(rows) == 2 and [run.seed for run in result] == [3, 4] and len(result) == 2
    assert result.accuracy == pytest.approx((result[0].accuracy + result[1].accuracy) / 2) and result.seconds > 0
    assert result.curves["train_loss"] == [[row.train_loss] for row in rows] and result.curves["epoch"] == [[1], [1]]
    assert result.summary["recipe"]["translation"] == 1 and result.summary["recipe"]["network"]["norm_momentum"] == 0.5
    assert json.loads(json.dumps(result.summary))["runs"][1]["seed"] == 4
    result.save(tmp_path / "x.safetensors", run=1)
    loaded = blink.load(tmp_path / "x.safetensors", device="cpu")
    assert loaded.classes == result.classes == ("a", "b", "c", "d") and loaded.facts["seed"] == 4
    for name, value in result.network(1).network.state_dict().items():
        assert torch.equal(value.cpu(), loaded.network.state_dict()[name])
    assert result.model.predict(list(images[:2])).shape == (2, 4)
    result.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "blink on arrays" in page and "Most confident mistakes" in page and "data:image/png" in page


def test_the_callers_random_numbers_and_settings_stay():
    torch.manual_seed(5)
    wanted, before = torch.rand(3), (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    torch.manual_seed(5)
    blink.train(pixels(16), validate=0, deterministic=True, **QUICK)
    assert torch.equal(torch.rand(3), wanted)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


def test_a_recipe_of_ones_own_and_verbose_output(capsys):
    recipe = with_network(BLINK, conv_groups=BLINK.network.conv_groups[:2])
    result = blink.train(pixels(40), recipe, verbose=True, validate=0, **QUICK)
    assert "Blink: blink on arrays" in capsys.readouterr().out
    assert len(result.summary["recipe"]["network"]["conv_groups"]) == 2


def test_interrupted_and_resumed_from_python(tmp_path):
    data, options = pixels(40), dict(QUICK, steps=10, out=tmp_path / "out")

    def stop(row):
        if row.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blink.train(data, callbacks=[stop], **options)
    resumed = blink.train(data, resume=tmp_path / "out")
    whole = blink.train(data, **QUICK | {"steps": 10})
    assert resumed[0].losses == whole[0].losses and resumed.accuracy == whole.accuracy
    assert torch.equal(resumed.model.network.head.weight, whole.model.network.head.weight)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(colour="red"), "unrecognized arguments: --colour=red"),
        (dict(translation="far"), "--set translation='far': expected a whole number"),
        (dict(recipe="none"), "unknown recipe 'none'"),
        (dict(steps=0), "expected a whole number above 0"),
    ],
)
def test_mistakes_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        blink.train(pixels(8), device="cpu", **options)
