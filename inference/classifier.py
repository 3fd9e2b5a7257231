"""A trained network to be used: what it takes, and what its results mean."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from blink.errors import UserError
from blink.inference.images import batches
from blink.model import backend as backends
from blink.model.config import Group, NetworkConfig
from blink.model.network import Network
from blink.model.saved import EXPECTED, read


class Classifier(nn.Module):
    """A trained network with what it takes and what its results mean.

    Called with images [B, C, height, width] uint8 of `image_shape`, in any memory and on its device -> logits
    [B, classes] float32, differentiable but for the images. Normalization is inside. It starts in evaluation mode.
    classes: the names, in the order of the logits. facts: all that its file says of it (see `save`).
    """

    def __init__(self, network: Network, classes: tuple[str, ...], image_shape: tuple[int, int, int], facts: dict):
        super().__init__()
        self.network, self.classes, self.image_shape, self.facts = network, classes, image_shape, facts

    @property
    def device(self) -> torch.device:
        return self.network.head.weight.device

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            shape, dtype = list(images.shape), str(images.dtype).removeprefix("torch.")
            raise ValueError(
                f"images must be [B, {', '.join(map(str, self.image_shape))}] uint8, found {shape} {dtype}"
            )
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def predict(self, images: Iterable, batch: int = 256) -> Tensor:
        """Probabilities [N, classes] float32 on the CPU, of images that need not be of the network's size.

        images: paths, PIL images or uint8 arrays or tensors [H, W], [H, W, C] or [C, H, W], alone or mixed, each
        brought to the network's size (see `inference.images.fitted`). Raises UserError for an image that cannot be
        read.
        """
        found = [self.probabilities(part) for part in batches(images, self.image_shape, batch)]
        return torch.cat(found) if found else torch.empty(0, len(self.classes))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """[B, classes] float32 on the CPU, of images as a call takes them, on any device."""
        return self(images.to(self.device)).softmax(1).cpu()


def load(
    path: str | Path, device: str | torch.device | None = None, kernels: str | backends.Backend = "auto"
) -> Classifier:
    """The network of a file that a run kept (`model.saved.save`), with float32 weights, in evaluation mode.

    device: by default a GPU if there is one; kernels: see `backend.select`, but that auto is reference on a CPU;
    or a backend itself. Raises UserError for what is no such file, or cannot be used here.
    """
    content, state = read(Path(path))
    try:
        fields = dict(content["network"])
        config = NetworkConfig(**{**fields, "conv_groups": tuple(Group(**g) for g in fields["conv_groups"])})
        classes, image_shape = tuple(map(str, content["classes"])), tuple(map(int, content["image_shape"]))
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_sizes(config, len(classes), image_shape, state)
        if kernels == "auto" and device.type == "cpu":
            # to compile would take longer than most predictions
            kernels = "reference"
        backend = kernels if isinstance(kernels, backends.Backend) else backends.select(kernels, device)
        network = Network(config, len(classes), image_shape, backend)
        network.load_state_dict(state)
        network = network.to_compute_dtype(torch.float32).to(device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be used here ({reason[:200]}); {EXPECTED}") from error
    return Classifier(network, classes, image_shape, content).eval().requires_grad_(False)


def check_sizes(
    config: NetworkConfig, classes: int, image_shape: tuple[int, int, int], state: dict[str, Tensor]
) -> None:
    """Raises ValueError where a network is not what its weights are of, before memory is taken for it."""
    if len(config.conv_groups) > len(state) or classes > max((len(t) for t in state.values() if t.dim()), default=0):
        raise ValueError("size mismatch: it tells of more than its weights are of")
    with torch.device("meta"):
        sketch = Network(config, classes, image_shape, backends.reference()).state_dict()
    for name, value in sketch.items():
        if name not in state or state[name].shape != value.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"size mismatch for {name}: {found} where {list(value.shape)} is told of")
