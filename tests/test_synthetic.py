"""The generated image set: shape, determinism, balance, and that a linear classifier cannot read it."""

import numpy as np
import pytest

from blink.training import data
from blink.training.data import synthetic


@pytest.fixture(scope="module")
def draw():
    return synthetic.generate(train=1500, test=500, seed=3)


def test_shapes_and_dtypes(draw):
    for images, labels, count in ((*draw[:2], 1500), (*draw[2:], 500)):
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64


def test_every_class_is_as_frequent_and_the_order_is_mixed(draw):
    for labels in (draw[1], draw[3]):
        counts = np.bincount(labels, minlength=len(synthetic.CLASSES))
        assert len(counts) == 10 and counts.min() == counts.max() == len(labels) // 10
        assert set(labels[:100]) == set(range(10))


def test_balance_within_one_when_the_count_is_no_multiple():
    _, labels, _, other = synthetic.generate(train=37, test=4)
    for found in (labels, other):
        counts = np.bincount(found, minlength=10)
        assert counts.max() - counts.min() <= 1


def test_images_use_the_range_and_differ(draw):
    images = draw[0]
    assert images.min() < 20 and images.max() > 235
    assert len({image.tobytes() for image in (*images, *draw[2])}) == 2000


def test_same_seed_same_bytes_other_seed_other_bytes():
    first, again, other = (synthetic.generate(train=30, test=20, seed=seed) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert a.tobytes() == b.tobytes()
    for i in (0, 2):
        assert (first[i] != other[i]).any(axis=(1, 2, 3)).all()


def test_splits_are_independent_draws():
    train_images, train_labels, test_images, test_labels = synthetic.generate(train=20, test=20)
    assert not np.array_equal(train_labels, test_labels)
    assert not np.array_equal(train_images, test_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(train=0), "train must be a positive"),
        (dict(test=0), "test must be a positive"),
        (dict(train=-3), "train must be a positive"),
        (dict(seed=-1), "seed must not be negative"),
    ],
    ids=["no training images", "no test images", "negative count", "negative seed"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic.generate(**{"train": 10, "test": 10, **arguments})


def test_a_linear_classifier_stays_below_40_percent(draw):
    """Ridge regression onto one-hot labels, the best of several penalties chosen on the test set itself."""
    train_images, train_labels, test_images, test_labels = draw
    x, x_test = (images.reshape(len(images), -1) / 255.0 for images in (train_images, test_images))
    mean = x.mean(0)
    x, x_test = x - mean, x_test - mean
    target = np.eye(10)[train_labels] - 0.1
    # the dual form: 1500 samples are fewer than the 3072 pixels
    gram, cross = x @ x.T, x_test @ x.T
    best = 0.0
    for penalty in (1.0, 100.0, 3000.0):
        scores = cross @ np.linalg.solve(gram + penalty * np.eye(len(x)), target)
        best = max(best, float((scores.argmax(1) == test_labels).mean()))
    assert best < 0.4


def test_embedded_set_is_marked_generated(monkeypatch):
    generate = synthetic.generate
    monkeypatch.setattr(synthetic, "generate", lambda: generate(train=20, test=10))
    dataset = data.generated()
    assert dataset.generated and "not CIFAR-10" in dataset.name
    assert dataset.classes == synthetic.CLASSES and dataset.image_shape == (3, 32, 32)
    named = data.load("synthetic", lambda done, total: None, lambda note: None)
    assert named.generated and named.fingerprint == dataset.fingerprint
