"""What a person wants to see of a run beside its numbers: what was confused, the surest mistakes, augmented images.

A file of its own beside the network's, small whatever the data set's size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blink.errors import UserError, brief
from blink.files import from_json
from blink.kernels.gather import Gather
from blink.kernels.reference import normalize
from blink.model.saved import write_tensors
from blink.training.data.dataset import Dataset
from blink.training.listener import Listener
from blink.training.metrics import confident_mistakes, confusion
from blink.training.results import EpochRow, RunResult
from blink.training.trainer import Trainer

FORMAT = 1
EXPECTED = "expected a .gallery.safetensors file that blink train --out wrote"
_KEY = "blink_gallery"
_MISTAKES, _TEST_IMAGES, _TRAIN_IMAGES, _VIEWS = 24, 4, 12, 6
# rows of logits that are made probabilities at once
_ROWS = 4096


@dataclass(frozen=True)
class Gallery:
    """classes: their names. accuracy: of the run, fingerprint: of its data, by which it is known.

    confusion [classes, classes] int32: test images of the row's class taken for the column's. The surest mistakes, the
    surest first: mistakes [M, H, W, C] uint8, true, taken_for [M] int64, probability [M] float32. test [T, H, W, C],
    train [N, H, W, C] uint8 with test_labels, train_labels int64: the first images of each half. views: by training
    image and epoch 0, 1, ..., the image [h, w, C] uint8 as the network took it then.
    """

    recipe: str
    seed: int
    accuracy: float
    fingerprint: str
    classes: tuple[str, ...]
    confusion: Tensor
    mistakes: Tensor
    true: Tensor
    taken_for: Tensor
    probability: Tensor
    test: Tensor
    test_labels: Tensor
    train: Tensor
    train_labels: Tensor
    views: dict[tuple[int, int], Tensor]


_TENSORS = (
    *("confusion", "mistakes", "true", "taken_for", "probability"),
    *("test", "test_labels", "train", "train_labels"),
)


class Views(Listener):
    """Notes how the first training images were taken in the first epochs of a run, from the batches of each epoch when
    it has ended, which is not timed.

    views: by image and epoch 0, 1, ... [h, w, C] uint8, of the size that the step took; without images that sat out.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def on_start(self, seed: int) -> None:
        self.views: dict[tuple[int, int], Tensor] = {}

    def on_resume(self, rows: list[EpochRow], losses: list[float]) -> None:
        """What those epochs took is not known any more."""

    def on_epoch(self, row: EpochRow) -> None:
        epoch, trainer = row.epoch - 1, self._trainer
        if epoch >= _VIEWS:
            return
        steps, batches = trainer.budget.steps_of(epoch), trainer.batches
        for image in range(min(_TRAIN_IMAGES, len(trainer.dataset.train_images))):
            # the last epoch may be cut short
            for batch, at in (batches.index[: len(steps)] == image).nonzero().tolist():
                size = trainer.phase_at(steps.start + batch).size
                taken, _ = batches.take(torch.tensor([batch], device=trainer.device), size)
                one = Gather(**{name: _only(value, at) for name, value in vars(taken).items()})
                self.views[image, epoch] = pixels(batches.images(size), one, trainer.dataset.mean)[0]


def _only(field: Tensor | int | None, at: int) -> Tensor | int | None:
    return field[at : at + 1] if isinstance(field, Tensor) else field


def pixels(images: Tensor, gather: Gather, mean: Tensor) -> Tensor:
    """[B, h, w, C] uint8 on the CPU: what `gather` makes of images [N, C, h, w] uint8, jitter included, which is
    rounded and clamped here only.
    """
    # what the reference gives the network, its normalization undone
    seen = normalize(images, mean, torch.ones_like(mean), torch.float32, gather) + mean[:, None, None]
    return (255 * seen).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def judged(logits: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The confusion matrix, and of at most `most` mistakes, the surest first, index, class taken for and probability.

    logits [N, classes], of which only some rows at a time are made probabilities: those that hold a NaN are no answer
    and left out. labels [N] int64.
    """
    counts, found = torch.zeros(2 * logits.shape[1:], dtype=torch.int32), []
    for first, part in zip(range(0, len(logits), _ROWS), logits.split(_ROWS)):
        rows = (~part.isnan().any(1)).nonzero()[:, 0]
        probabilities, own = part[rows].float().softmax(1), labels[first + rows]
        value, taken = probabilities.max(1)
        counts += confusion(taken, own, len(counts)).int()
        wrong = confident_mistakes(probabilities, own, most)
        found.append((first + rows[wrong], taken[wrong], value[wrong]))
    index, taken, value = map(torch.cat, zip(*found))
    order = value.argsort(descending=True, stable=True)[:most]
    return counts, index[order], taken[order], value[order]


@torch.no_grad()
def save(
    path: Path, result: RunResult, dataset: Dataset, views: dict[tuple[int, int], Tensor], recipe: str
) -> None:  # fmt: skip
    """The gallery of a run that has ended, atomically; views: those of `Views`. Raises UserError where it cannot be
    written.
    """
    labels = dataset.test_labels.cpu()
    counts, index, taken_for, probability = judged(result.logits, labels, _MISTAKES)
    # slices are cloned, because what is saved may not share memory
    tensors = {
        "confusion": counts,
        "mistakes": dataset.test_images[index.to(dataset.device)].cpu(),
        "true": labels[index],
        "taken_for": taken_for,
        "probability": probability,
        "test": dataset.test_images[:_TEST_IMAGES].cpu().clone(),
        "test_labels": labels[:_TEST_IMAGES].clone(),
        "train": dataset.train_images[:_TRAIN_IMAGES].cpu().clone(),
        "train_labels": dataset.train_labels[:_TRAIN_IMAGES].cpu().clone(),
        **{f"view.{image}.{epoch}": view for (image, epoch), view in views.items()},
    }
    about = {
        "format": FORMAT, "recipe": recipe, "seed": result.seed, "accuracy": result.accuracy,
        "fingerprint": dataset.fingerprint, "classes": list(dataset.classes),
    }  # fmt: skip
    write_tensors(path, tensors, {_KEY: json.dumps(about)})


def read(path: Path) -> Gallery:
    """What `save` wrote; nothing in it is executed. Raises UserError for what is no such file, whole and consistent."""
    try:
        with safe_open(path, "pt") as file:
            about = from_json((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] > FORMAT:
            raise UserError(f"{path} is of a later version of blink (format {about['format']}); update blink")
        views = {tuple(map(int, name.split(".")[1:])): view for name, view in tensors.items() if name[:5] == "view."}
        found = Gallery(
            str(about["recipe"]), int(about["seed"]), float(about["accuracy"]), str(about["fingerprint"]),
            tuple(map(str, about["classes"])), *(tensors[name] for name in _TENSORS), views=views,
        )  # fmt: skip
        _check(found)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {EXPECTED}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else brief(error)
        raise UserError(f"{path} is no gallery ({reason}); {EXPECTED}") from error
    return found


def _check(found: Gallery) -> None:
    """Raises ValueError where the tensors cannot be what `save` wrote."""
    classes = len(found.classes)
    if found.confusion.shape != (classes, classes) or found.confusion.dtype != torch.int32:
        raise ValueError(f"a confusion matrix of {list(found.confusion.shape)} for {classes} classes")
    images = {"mistakes": ("true", "taken_for"), "test": ("test_labels",), "train": ("train_labels",)}
    for name, labels in images.items():
        pictures = getattr(found, name)
        if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[3] not in (1, 3):
            raise ValueError(f"{name} are no images")
        for label in (getattr(found, label) for label in labels):
            if label.shape != pictures.shape[:1] or label.dtype != torch.int64:
                raise ValueError(f"the labels of {name} are not one an image")
            if len(label) and not 0 <= label.min() <= label.max() < classes:
                raise ValueError(f"the labels of {name} are of other classes")
    if found.probability.shape != found.true.shape or not found.probability.is_floating_point():
        raise ValueError("the probabilities are not one a mistake")
    for key, view in found.views.items():
        if len(key) != 2 or view.dtype != torch.uint8 or view.dim() != 3 or view.shape[2] not in (1, 3):
            raise ValueError("a view is no image")
