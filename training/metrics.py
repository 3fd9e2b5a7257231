"""What a classifier's probabilities [N, classes] are worth beside their accuracy; labels [N] int64."""

import torch
from torch import Tensor

from blink.training.results import HeldOut

_BINS = 15
# the inverse temperatures that are tried: a classifier without a mistake has none that is best
_COLDEST, _HOTTEST = 1e3, 1e-3


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, classes] int64: how many images of the row's class were taken for the column's."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class_accuracy(counts: Tensor) -> Tensor:
    """[classes] float64 of a confusion matrix: the part of each class that was recognized; NaN: it has no image."""
    return counts.diagonal().double() / counts.sum(1)


def balanced_accuracy(counts: Tensor) -> float:
    """The mean of the classes' accuracies, those without an image left out: what accuracy would be if all classes had
    as many images.
    """
    return per_class_accuracy(counts).nanmean().item()


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error: how far the probability of the best class is from how often it is right, the
    mean over 15 bins of equal width, weighted by their images. Source: Guo et al. 2017.
    """
    best, predicted = probabilities.double().max(1)
    bins = (best * _BINS).long().clamp_(0, _BINS - 1)
    excess = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, best - (predicted == labels).double())
    return excess.abs().sum().item() / len(labels)


def held_out(logits: Tensor, labels: Tensor) -> HeldOut | None:
    """Of logits [N, classes]; None where one is not finite.

    The mean of logsumexp(b z) - b z_y is convex in the inverse temperature b, so that Newton's steps, halved where they
    leave what brackets the root of the slope, find its least. Source of the temperature: Guo et al. 2017.
    """
    if not logits.isfinite().all():
        return None
    z, rows = logits.double(), torch.arange(len(labels), device=logits.device)
    true = z[rows, labels]
    low, high, b = _HOTTEST, _COLDEST, 1.0
    for _ in range(60):
        p = (b * z).softmax(1)
        mean = (p * z).sum(1)
        slope = (mean - true).mean().item()
        low, high = (b, high) if slope < 0 else (low, b)
        curvature = ((p * z * z).sum(1) - mean**2).mean().item()
        step = b - slope / curvature if curvature > 0 else -1.0
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - b) <= 1e-9 * b:
            break
        b = following
    others = z.clone()
    others[rows, labels] = -torch.inf
    entropy = ((b * z).logsumexp(1) - b * true).mean().item()
    return HeldOut(entropy, 1 / b, b * (true - others.amax(1)).mean().item())


def confident_mistakes(probabilities: Tensor, labels: Tensor, most: int) -> Tensor:
    """Indices of at most `most` images that were taken for another class, the surest first."""
    best, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[best[wrong].argsort(descending=True, stable=True)[:most]]
