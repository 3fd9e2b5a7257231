"""What a classifier's probabilities [N, classes] are worth beside their accuracy; labels [N] int64."""

import torch
from torch import Tensor

_BINS = 15


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


def confident_mistakes(probabilities: Tensor, labels: Tensor, most: int) -> Tensor:
    """Indices of at most `most` images that were taken for another class, the surest first."""
    best, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[best[wrong].argsort(descending=True, stable=True)[:most]]
