"""Images, filters and features as PNG data that a page can hold."""

import io
from base64 import b64encode

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blink.inference.classifier import Classifier
from blink.model.layers import FrozenStem

_COLUMNS = 8
_MOST_CHANNELS = 64
# a picture of many channels shows no more of a large image
_MOST_SIDE = 64


def png(pixels: Tensor | np.ndarray) -> str:
    """[H, W, 1, 3 or 4] uint8 as a data: URI."""
    array = np.asarray(pixels)
    out = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + b64encode(out.getvalue()).decode()


def sheet(tiles: np.ndarray) -> np.ndarray:
    """Tiles [N, h, w] uint8, eight a row with a pixel between them, as [H, W, 4]: between them it is transparent."""
    count, height, width = tiles.shape
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    out = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4), dtype=np.uint8)
    for at, tile in enumerate(tiles):
        top, left = at // columns * (height + 1), at % columns * (width + 1)
        out[top : top + height, left : left + width, :3] = tile[..., None]
        out[top : top + height, left : left + width, 3] = 255
    return out


def filters(classifier: Classifier) -> tuple[str, np.ndarray]:
    """(what they are, [F, k, k, C] uint8) of a network's first convolution, each from -max to max of itself, 0 is grey.

    Of a filter and its negative, the filter.
    """
    stem = classifier.network.stem
    if isinstance(stem, FrozenStem):
        weight, what = stem.whiten.weight, "whitening filters"
        half = len(weight) // 2
        if half and torch.equal(weight[:half], -weight[half:]):
            weight, what = weight[:half], "whitening filters; the negative of each is one too"
    else:
        weight, what = stem.conv.weight, "trained filters of the first convolution"
    weight = weight.detach().float().cpu()
    largest = weight.flatten(1).abs().amax(1).clamp_min(1e-12)[:, None, None, None]
    return what, (127.5 + 127.5 * weight / largest).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def features(classifier: Classifier, images: Tensor) -> np.ndarray:
    """[N, channels, h, w] uint8: what the first layer makes of images [N, H, W, C] uint8, each channel from its least
    value over all of them to one that 1 % exceed.

    Of at most 64 channels, and no larger than 64 pixels. Raises ValueError for images that the network does not take.
    """
    shape = (images.shape[3], *images.shape[1:3])
    if shape != classifier.image_shape:
        raise ValueError(f"test images of {shape} for a network that takes {classifier.image_shape}")
    batch = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    found = classifier.network.stem(batch.to(classifier.device), None, torch.float32)[:, :_MOST_CHANNELS].float().cpu()
    if max(found.shape[2:]) > _MOST_SIDE:
        scale = _MOST_SIDE / max(found.shape[2:])
        size = [max(1, round(side * scale)) for side in found.shape[2:]]
        found = torch.nn.functional.interpolate(found, size, mode="area")
    values = found.transpose(0, 1).flatten(1)
    # few pixels are far above the others
    low, high = values.amin(1)[:, None, None], values.quantile(0.99, 1)[:, None, None]
    return (255 * (found - low) / (high - low).clamp_min(1e-12)).round().clamp(0, 255).byte().numpy()
