"""Evaluation: logits averaged over an image and its test-time augmentations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blink.kernels.gather import Gather
from blink.model.network import Network
from blink.training.distributed import ALONE, Ranks

# of each view beside the image itself: by how many pixels it is moved along both axes, and whether it is then mirrored
VIEWS: dict[str | None, tuple[tuple[int, bool], ...]] = {
    None: (),
    "mirror": ((0, True),),
    "translate": ((-1, False), (1, False)),
    "mirror+translate": ((0, True), (-1, False), (-1, True), (1, False), (1, True)),
}

# beyond it an activation's elements need 64-bit offsets, which libraries have slower kernels for, if any
_MOST_BYTES = 2**31
_PART_OF_GPU = 16
# a CPU gains nothing from more
_CPU_BYTES = 2**27
_ALIKE = 16


def images_at_once(
    network: Network, image_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> int:
    """How many images [C, H, W] are evaluated at once: those whose widest activations, in `dtype`, fill the room.

    The room is a sixteenth of a GPU's memory and at most 2 GiB, so that launches are few and large and the number is
    the same in every run; all that is alive at once takes about twice the room.
    """
    room = _CPU_BYTES
    if device.type == "cuda":
        room = min(_MOST_BYTES, torch.cuda.get_device_properties(device).total_memory // _PART_OF_GPU)
    return max(1, room // (network.widest_activation(image_shape[1:]) * dtype.itemsize))


def in_parts(tensor: Tensor, most: int) -> tuple[Tensor, ...]:
    """As few parts as `most` elements each allow, alike in size and, where that is at least 16, multiples of 16.

    Triton compiles once for all such sizes, and anew for others.
    """
    if most >= _ALIKE:
        most = most // _ALIKE * _ALIKE
    size = math.ceil(len(tensor) / math.ceil(len(tensor) / most))
    return tensor.split(min(most, math.ceil(size / _ALIKE) * _ALIKE))


def view_gather(index: Tensor, views: tuple[tuple[int, bool], ...]) -> Gather:
    """All views of images `index` [n] int64 as one batch, view after view; what a translation uncovers is reflected."""
    translation = index.new_zeros(len(views), len(index), 2)
    flip = torch.zeros(len(views), len(index), dtype=torch.bool, device=index.device)
    for i, (pixels, mirrored) in enumerate(views):
        if pixels:
            translation[i] = pixels
        if mirrored:
            flip[i] = True
    moved = any(pixels for pixels, _ in views)
    return Gather(index.repeat(len(views)), translation.flatten(0, 1) if moved else None, flip.flatten())


def averaged(own: Tensor, others: Tensor, views: tuple[tuple[int, bool], ...]) -> Tensor:
    """The mean over an image and its mirror; where it was translated, half of that and half of those views' mean.

    own [n, classes]: the images' logits; others [views, n, classes]: those of `views`. Source: airbench94.
    """
    centred, moved = own, others
    if views[0] == (0, True):
        centred, moved = (own + others[0]) / 2, others[1:]
    return centred if not len(moved) else (centred + moved.mean(0)) / 2


def unsure(count: int, fraction: float) -> int:
    """How many of `count` images are augmented where only the `fraction` that the network is least sure of is."""
    return math.ceil(fraction * count)


@torch.no_grad()
def logits_of(
    network: nn.Module, images: Tensor, tta: str | None, fraction: float = 1.0, at_once: int = 2000,
    ranks: Ranks = ALONE,
) -> Tensor:  # fmt: skip
    """images [N, H, W, C] uint8 -> logits [N, classes] float32, the network left in the mode it was in.

    tta: a key of `VIEWS`. fraction: below 1, only that part of the images is augmented whose two largest
    probabilities are closest; at_once: how many images, views counted, a batch has at most; ranks: who shares the
    images, all of whom get all logits. Source of the fraction: hiverge's cifar10-speedrun.
    """

    def in_batches(compute: Callable[[Tensor], Tensor], items: Tensor, most: int) -> Tensor:
        return ranks.rows(lambda share: torch.cat([compute(p) for p in in_parts(items[share], most)]), len(items))

    def augmented_logits(part: Tensor) -> Tensor:
        others = network(source, view_gather(part, views)).unflatten(0, (len(views), len(part)))
        return averaged(logits[part], others, views)

    was_training = network.training
    network.eval()
    count, views, source = len(images), VIEWS[tta], images.permute(0, 3, 1, 2)
    logits = in_batches(network, source, at_once)
    augmented = unsure(count, fraction) if views else 0
    if augmented:
        chosen = torch.arange(count, device=images.device)
        if augmented < count:
            largest = logits.softmax(1).topk(2, dim=1).values
            chosen = (largest[:, 1] - largest[:, 0]).topk(augmented).indices
        logits[chosen] = in_batches(augmented_logits, chosen, max(1, at_once // len(views)))
    network.train(was_training)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is the label; a row with a NaN counts as wrong."""
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return right.double().mean().item()
