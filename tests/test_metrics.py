"""Metrics against what a person counts by hand, and against torch's own where it has them."""

import math

import pytest
import torch

from blink.training import metrics

PROBABILITIES = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.4, 0.35, 0.25]])
LABELS = torch.tensor([0, 1, 1, 0, 0])


def test_confusion_and_accuracies_by_hand():
    counts = metrics.confusion(PROBABILITIES.argmax(1), LABELS, 3)
    assert counts.tolist() == [[2, 0, 1], [1, 1, 0], [0, 0, 0]] and counts.sum() == len(LABELS)
    first, second, third = metrics.per_class_accuracy(counts).tolist()
    assert (first, second) == (pytest.approx(2 / 3), 0.5) and math.isnan(third)
    assert metrics.balanced_accuracy(counts) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_balanced_accuracy_is_accuracy_where_classes_are_equal():
    labels = torch.arange(7).repeat(30)
    predicted = torch.where(torch.rand(210) < 0.6, labels, torch.randint(7, (210,)))
    counts = metrics.confusion(predicted, labels, 7)
    assert metrics.balanced_accuracy(counts) == pytest.approx((predicted == labels).double().mean().item())


def test_calibration_error_by_hand():
    # each of these falls in a bin of its own: |p - right| each
    expected = (0.1 + 0.3 + 0.6 + 0.8 + 0.6) / 5
    assert metrics.calibration_error(PROBABILITIES, LABELS) == pytest.approx(expected)
    sure = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    assert metrics.calibration_error(sure, torch.tensor([0] * 7 + [1] * 3)) == pytest.approx(0.3)
    # right as often as it says
    assert metrics.calibration_error(
        torch.tensor([[0.75, 0.25]]).repeat(8, 1), torch.tensor([0] * 6 + [1] * 2)
    ) == pytest.approx(0)


def test_the_surest_mistakes_come_first():
    assert metrics.confident_mistakes(PROBABILITIES, LABELS, 5).tolist() == [3, 2]
    assert metrics.confident_mistakes(PROBABILITIES, LABELS, 1).tolist() == [3]
    assert metrics.confident_mistakes(PROBABILITIES, PROBABILITIES.argmax(1), 3).tolist() == []


def test_held_out_is_at_the_temperature_that_is_best():
    """Against a search over temperatures, of logits that are too cold, too hot, and of no use."""
    labels = torch.randint(5, (400,))
    right = torch.nn.functional.one_hot(labels, 5).float()
    for scale, signal in ((0.01, 2.0), (30.0, 2.0), (1.0, 0.3)):
        logits = scale * (signal * right + torch.randn(400, 5))
        found = metrics.held_out(logits, labels)
        tried = torch.logspace(-3, 3, 4001, dtype=torch.float64)
        entropies = [torch.nn.functional.cross_entropy(logits.double() / t, labels).item() for t in tried]
        assert found.cross_entropy <= min(entropies) + 1e-12
        assert found.cross_entropy == pytest.approx(min(entropies), abs=1e-5)
        assert found.temperature == pytest.approx(tried[entropies.index(min(entropies))].item(), rel=5e-3)
        cooled = logits.double() / found.temperature
        others = cooled.masked_fill(right.bool(), -torch.inf).amax(1)
        assert found.margin == pytest.approx((cooled[right.bool()] - others).mean().item(), rel=1e-9)


def test_held_out_of_what_has_no_best_temperature():
    """Without a mistake colder is always better, and where all are mistakes hotter; the ends of the range hold."""
    labels = torch.arange(4).repeat(3)
    sure = torch.nn.functional.one_hot(labels, 4).float()
    assert metrics.held_out(sure, labels).cross_entropy < 1e-6
    assert metrics.held_out(-sure, labels).cross_entropy == pytest.approx(math.log(4), abs=1e-2)
    assert metrics.held_out(sure * torch.inf, labels) is None
