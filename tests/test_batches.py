"""Training batches against explicit padding, cropping and mirroring."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blink.kernels.gather import augment, gathered, reflect
from blink.training.batches import Batches, resize
from tests.small import random_images


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=40)
def test_reflect_reads_what_reflect_padding_would(size, choice):
    pad = choice.draw(st.integers(0, size - 1))
    row = torch.arange(size).double()[None]
    padded = F.pad(row, (pad, pad), mode="reflect")[0] if pad else row[0]
    folded = reflect(torch.arange(-pad, size + pad), size)
    assert folded.tolist() == padded.long().tolist()


def pad_crop_flip(image, move_y, move_x, flip, pad):
    """[H, W, C] -> [C, H, W] the long way."""
    height, width, _ = image.shape
    padded = F.pad(image.permute(2, 0, 1).double()[None], (pad,) * 4, mode="reflect")[0].to(torch.uint8)
    top, left = pad + move_y, pad + move_x
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(2) if flip else crop


@given(st.integers(4, 9), st.integers(4, 9), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_augment_equals_pad_crop_and_flip(height, width, seed):
    images = random_images(6, height, width, seed)
    random = np.random.RandomState(seed)
    batch = 8
    index = torch.from_numpy(random.randint(0, 6, batch))
    move_y, move_x = (torch.from_numpy(random.randint(-3, 4, batch)) for _ in range(2))
    flip = torch.from_numpy(random.randint(0, 2, batch).astype(bool))
    out = augment(images, index, move_y, move_x, flip)
    assert out.shape == (batch, 3, height, width) and out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    for i in range(batch):
        expected = pad_crop_flip(images[index[i]], int(move_y[i]), int(move_x[i]), bool(flip[i]), 3)
        assert torch.equal(out[i], expected)


def coded_images(count, size):
    """Images whose pixels tell image, row and column: channel 0 is the image, 1 the row, 2 the column."""
    images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    images[..., 0] = torch.arange(count)[:, None, None]
    images[..., 1] = torch.arange(size)[:, None]
    images[..., 2] = torch.arange(size)
    return images


def built(batches):
    """The (images, labels) of every batch of the epoch that `batches` holds."""
    taken = [batches.take(torch.tensor([i]), batches.size) for i in range(batches.steps)]
    return [(gathered(batches.images(batches.size), gather, None), labels) for gather, labels in taken]


def epoch(images, batch_size, translation=3, flip="random", seed=0):
    batches = Batches(images, torch.arange(len(images)) * 7, batch_size, translation, flip)
    batches.draw(torch.Generator().manual_seed(seed), 0)
    return built(batches)


@pytest.mark.parametrize(
    ("count", "batch", "steps"),
    [(40, 8, 5), (43, 8, 5), (47, 8, 5), (5, 5, 1), (1, 1, 1)],
    ids=["even", "3 left", "7 left", "one batch", "one image"],
)
def test_each_image_at_most_once_and_the_partial_batch_dropped(count, batch, steps):
    batches = epoch(coded_images(count, 16), batch)
    assert len(batches) == steps
    seen = []
    for images, labels in batches:
        assert images.shape == (batch, 3, 16, 16) and len(labels) == batch
        # channel 0 holds the image's number whatever the translation: labels follow images
        assert torch.equal(images[:, 0].long(), (labels // 7)[:, None, None].expand(-1, 16, 16))
        seen += labels.tolist()
    assert len(set(seen)) == len(seen) == steps * batch


def offsets(batches, size):
    """(move_y, move_x, mirrored) of every image, read from the coded rows and columns in the middle."""
    found = []
    half = size // 2
    for images, _ in batches:
        for image in images.long():
            columns = image[2, half]
            mirrored = bool(columns[half] > columns[half + 1])
            column = columns[size - 1 - half] if mirrored else columns[half]
            found.append((int(image[1, half, half]) - half, int(column) - half, mirrored))
    return found


def test_all_seven_offsets_occur_in_both_axes_mirrored_and_not():
    found = offsets(epoch(coded_images(240, 16), 60), 16)
    for mirrored in (False, True):
        assert {y for y, _, m in found if m == mirrored} == set(range(-3, 4))
        assert {x for _, x, m in found if m == mirrored} == set(range(-3, 4))
    assert len({(y, x) for y, x, _ in found}) > 40, "rows and columns move independently"
    assert 80 < sum(mirrored for *_, mirrored in found) < 160


def test_flip_off_never_flips_and_translation_0_never_moves():
    found = offsets(epoch(coded_images(240, 16), 60, flip="none"), 16)
    assert not any(mirrored for *_, mirrored in found)
    still = offsets(epoch(coded_images(60, 16), 60, translation=0, flip="none"), 16)
    assert set(still) == {(0, 0, False)}


def test_translation_is_limited_by_tiny_images():
    batches = epoch(random_images(30, 2, 1), 10)
    assert len(batches) == 3 and all(images.shape == (10, 3, 2, 1) for images, _ in batches)


def test_the_generator_alone_decides():
    images = random_images(24, 8, 8)
    torch.manual_seed(1)
    first = epoch(images, 8, seed=5)
    torch.manual_seed(2)
    again, other = epoch(images, 8, seed=5), epoch(images, 8, seed=6)
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in other]))


def test_epochs_from_one_generator_differ():
    batches = Batches(random_images(24, 8, 8), torch.arange(24), 8, 3, "random")
    generator = torch.Generator().manual_seed(0)
    orders = []
    for number in range(2):
        batches.draw(generator, number)
        orders.append(torch.cat([labels for _, labels in built(batches)]).tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(24))


def test_cutout_and_jitter_are_drawn_within_their_bounds():
    images = torch.full((400, 16, 12, 3), 200, dtype=torch.uint8)
    batches = Batches(images, torch.arange(400), 100, 0, "none", cutout=4, jitter=(0.3, 0.1))
    batches.draw(torch.Generator().manual_seed(0), 0)
    contrast, brightness = batches.jitter.reshape(-1, 2).unbind(1)
    for values, middle, deviation in ((contrast, 1.0, 0.3), (brightness, 0.0, 0.1)):
        assert (values - middle).abs().max() <= deviation + 1e-6
        assert values.min() < middle - 0.8 * deviation and values.max() > middle + 0.8 * deviation
    corners = batches.cutout.reshape(-1, 2)
    assert corners.min(0).values.tolist() == [-2, -2] and corners.max(0).values.tolist() == [13, 9]
    gather, _ = batches.take(torch.tensor([1]), batches.size)
    cut = gathered(batches.images(batches.size), gather, torch.full((3,), 0.5)) == 128
    areas = cut[:, 0].sum((1, 2))
    assert areas.max() == 16 and 4 <= areas.min() < 16
    plain = Batches(images, torch.arange(400), 100, 0, "none")
    plain.draw(torch.Generator().manual_seed(0), 0)
    gather, _ = plain.take(torch.tensor([0]), plain.size)
    assert gather.cutout is None and gather.jitter is None


def test_an_epoch_is_drawn_into_the_same_memory():
    """A captured step reads wherever the first epoch was."""
    batches = Batches(random_images(12, 8, 8), torch.arange(12), 4, 2, "alternating")
    tensors = (batches.index, batches.translation, batches.flip, batches.labels)
    before = [(t.data_ptr(), t.clone()) for t in tensors]
    for number in range(2):
        batches.draw(torch.Generator().manual_seed(number), number)
    assert all(a is b for a, b in zip(tensors, (batches.index, batches.translation, batches.flip, batches.labels)))
    assert [t.data_ptr() for t in tensors] == [pointer for pointer, _ in before]
    assert not torch.equal(batches.index, before[0][1])


def test_alternating_flip_mirrors_each_image_in_every_other_epoch():
    n = 60
    batches = Batches(coded_images(n, 16), torch.arange(n), 20, 0, "alternating")
    generator = torch.Generator().manual_seed(0)
    flips = []
    for number in range(4):
        batches.draw(generator, number)
        mirrored = torch.empty(n, dtype=torch.bool)
        mirrored[batches.index.flatten()] = batches.flip.flatten()
        flips.append(mirrored)
    assert 15 < flips[0].sum() < 45
    assert torch.equal(flips[2], flips[0]) and torch.equal(flips[1], ~flips[0]) and torch.equal(flips[3], ~flips[0])


@pytest.mark.parametrize("size", [(24, 24), (9, 13), (32, 20)])
def test_resized_images_are_pillows(size):
    """Pillow's bilinear filter is antialiased too; roundings may differ by one level."""
    images = random_images(7, 32, 32)
    out = torch.zeros(7, *size, 3, dtype=torch.uint8)
    resize(images, out)
    for image, got in zip(images, out):
        want = np.asarray(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(want.astype(int) - got.numpy()).max() <= 1


def test_smaller_batches_are_of_the_same_images_moved_in_proportion():
    images = random_images(12, 16, 16)
    batches = Batches(images, torch.arange(12), 4, 4, "random", cutout=8, sizes=[(8, 8), (16, 16)])
    assert not batches.images((8, 8)).any()
    batches.resize()
    small = torch.zeros(12, 8, 8, 3, dtype=torch.uint8)
    resize(images, small)
    assert torch.equal(batches.images((8, 8)).permute(0, 2, 3, 1), small)
    assert torch.equal(batches.images((16, 16)).permute(0, 2, 3, 1), images)
    batches.draw(torch.Generator().manual_seed(0), 0)
    (whole, labels), (half, same) = (batches.take(torch.tensor([1]), (side, side)) for side in (16, 8))
    assert torch.equal(labels, same) and torch.equal(whole.index, half.index) and torch.equal(whole.flip, half.flip)
    assert (whole.translation.double() / 2 - half.translation).abs().max() <= 0.5
    assert (whole.cutout.double() / 2 - half.cutout).abs().max() <= 0.5 and half.cutout_size == 4
    assert half.translation.dtype == half.cutout.dtype == torch.int64


def test_an_epoch_keeps_the_hardest_and_those_that_sat_out():
    """Losses are known here: image i's is i, so that the last are kept, and the first return every other time."""
    n = 40
    batches = Batches(random_images(n, 8, 8), torch.arange(n), 10, 0, "alternating", keep=0.75)
    generator = torch.Generator().manual_seed(0)
    assert batches.steps == 3
    seen, flips = [], []
    for number in range(4):
        batches.draw(generator, number)
        index = batches.index.flatten()
        assert len(index.unique()) == 30
        seen.append(set(index.tolist()))
        flips.append({int(i): bool(flip) for i, flip in zip(index, batches.flip.flatten())})
        batches.hardness[index] = index.float()
    absent = [set(range(n)) - kept for kept in seen]
    assert absent[0] != set(range(10)), "the first epoch keeps by chance"
    for before, now in pairwise(absent):
        assert not before & now
        assert now == set(sorted(set(range(n)) - before)[:10])
    for i in range(n):
        own = [epoch[i] for epoch in flips if i in epoch]
        assert all(a != b for a, b in pairwise(own)), "mirrored every other time that it is taken"
    everything = Batches(random_images(n, 8, 8), torch.arange(n), 10, 0, "none")
    assert everything.hardness is None and everything.steps == 4
