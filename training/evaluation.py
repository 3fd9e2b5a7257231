"""Evaluation: logits averaged over an image and its mirror."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, mirror: bool, batch_size: int = 1000) -> Tensor:
    """images [N, H, W, C] uint8 -> logits [N, classes] float32, the network left in the mode it was in."""
    was_training = network.training
    network.eval()
    out = []
    for chunk in images.split(batch_size):
        x = chunk.permute(0, 3, 1, 2)
        logits = network(x)
        if mirror:
            flipped = x.flip(3).contiguous(memory_format=torch.channels_last)
            logits = (logits + network(flipped)) / 2
        out.append(logits)
    network.train(was_training)
    return torch.cat(out)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is the label; a row with a NaN counts as wrong."""
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return right.double().mean().item()
