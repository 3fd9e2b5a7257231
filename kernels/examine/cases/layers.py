"""Cases of the ops between and after the convolutions."""

from dataclasses import replace

import torch
from torch import Tensor

from .base import Case, Cost, Tensors, activations, running_statistics


def _gate_weights(device, dtype, channels: int, hidden: int) -> Tensors:
    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(device=device, dtype=dtype)

    return {
        "weight1": weight(hidden, channels),
        "bias1": weight(hidden),
        "weight2": weight(channels, hidden),
        "bias2": weight(channels),
    }


_GATE_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")


def se_gate(batch: int, channels: int, hidden: int, activation: str | None = "gelu") -> Case:
    def make(device, dtype):
        squeeze = torch.randn(batch, channels).to(device=device, dtype=dtype).float()
        return {"squeeze": squeeze, **_gate_weights(device, dtype, channels, hidden)}

    def cost(itemsize):
        table, narrow = 4 * batch * channels, 4 * batch * hidden  # float32 [B, C] and [B, R]
        weights = 2 * channels * hidden
        read_write = 3 * table + 2 * narrow
        product = 2 * batch * channels * hidden
        return {
            # read squeeze and both weights, write gate and hidden
            "fwd": Cost(2 * table + narrow + weights * itemsize, 2 * product),
            # read dgate, gate, hidden, weights, write dsqueeze and dhidden; then, for the weights' gradients, read
            # dgate, gate, squeeze, hidden, dhidden and write both gradients in float32
            "bwd": Cost(read_write + weights * itemsize + read_write + 4 * weights, 4 * product),
        }

    label = f"{batch}x{channels}-{hidden}-{activation}"
    return Case("se_gate", label, make, ("squeeze", *_GATE_WEIGHTS), cost, options={"activation": activation})


def excite_norm_act_add(
    batch: int,
    channels: int,
    height: int,
    width: int,
    gate: bool = True,
    residual: bool = True,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
) -> Case:
    shape = (batch, channels, height, width)

    def make(device, dtype):
        return {
            "x": activations(device, dtype, *shape),
            "gate": torch.rand(batch, channels, device=device) if gate else None,
            "bias": torch.randn(channels, device=device),
            "residual": activations(device, dtype, *shape) if residual else None,
            **running_statistics(device, channels),
        }

    def cost(itemsize):
        x = batch * channels * height * width * itemsize
        return {
            # training reads x twice: z needs the batch statistics; read the residual, write y
            "fwd": Cost(x * ((2 if training else 1) + residual + 1)),
            # twice over dy and x: dx needs the sums of g and of g * xhat; write dx (the residual's gradient is dy)
            "bwd": Cost(x * (2 * 2 + 1)),
        }

    label = "x".join(map(str, shape)) + f"-{activation}"
    label += "".join(f"-no{name}" for name, on in (("gate", gate), ("residual", residual)) if not on)
    present = [name for name, on in (("gate", gate), ("residual", residual)) if on]
    return Case(
        "excite_norm_act_add",
        label + ("" if training else "-eval"),
        make,
        ("x", "bias", *present),
        cost,
        ("running_mean", "running_var"),
        {"training": training, "momentum": 0.8, "eps": eps, "activation": activation},
    )


def norm_act(
    batch: int,
    channels: int,
    height: int,
    width: int,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
) -> Case:
    whole = excite_norm_act_add(batch, channels, height, width, False, False, training, activation, eps)

    def make(device, dtype):
        return {name: t for name, t in whole.make(device, dtype).items() if name not in ("gate", "residual")}

    return replace(whole, op="norm_act", label=whole.label.replace("-nogate-noresidual", ""), make=make)


def pool_norm_act(
    batch: int,
    channels: int,
    height: int,
    width: int,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
    squeeze: bool = True,
    fork: bool = False,
) -> Case:
    """x is [batch, channels, height, width] before pooling."""
    shape = (batch, channels, height, width)

    def make(device, dtype):
        return {
            "x": activations(device, dtype, *shape),
            "bias": torch.randn(channels, device=device),
            **running_statistics(device, channels),
        }

    def cost(itemsize):
        x = batch * channels * height * width * itemsize
        windows = batch * channels * (height // 2) * (width // 2)
        pooled, index = windows * itemsize, windows // 4
        return {
            "fwd": Cost(x + 3 * pooled + index),  # read x, write pooled and index; read pooled, write y
            # every dy and pooled for the sums; these and index again, write all of dx
            "bwd": Cost(2 * (2 + fork) * pooled + index + x),
        }

    def combine(y, *others):
        *again, means = others
        if means is not None:
            y = y + means[:, :, None, None].to(y.dtype)
        # side by side, so that each gets a gradient of its own
        return torch.cat([y, *again])

    label = "x".join(map(str, shape)) + f"-{activation}" + ("" if training else "-eval")
    label += ("" if squeeze else "-nosqueeze") + ("-fork" if fork else "")
    options = {"training": training, "momentum": 0.8, "eps": eps, "activation": activation}
    options |= {"squeeze": squeeze, "fork": fork}
    return Case(
        "pool_norm_act", label, make, ("x", "bias"), cost, ("running_mean", "running_var"), options, combine=combine
    )


def squeeze_excite(
    batch: int, channels: int, height: int, width: int, hidden: int, activation: str | None = "relu"
) -> Case:
    def make(device, dtype):
        x = activations(device, dtype, batch, channels, height, width)
        return {"x": x, **_gate_weights(device, dtype, channels, hidden)}

    def cost(itemsize):
        x = batch * channels * height * width * itemsize
        product = 2 * batch * channels * hidden
        return {
            # read x, write y; the image is still cached when it is scaled
            "fwd": Cost(2 * x, 2 * product),
            "bwd": Cost(3 * x, 4 * product),  # read dy and x, write dx; dy again from cache
        }

    label = f"{batch}x{channels}x{height}x{width}-{hidden}-{activation}"
    return Case("squeeze_excite", label, make, ("x", *_GATE_WEIGHTS), cost, options={"activation": activation})


def cross_entropy(batch: int, classes: int, label_smoothing: float = 0.2, scale: float = 0.1) -> Case:
    def make(device, dtype):
        # as far apart as a trained network's, so that scaled they are neither all alike nor all but certain
        logits = (torch.randn(batch, classes) * 2 / scale).to(device=device, dtype=dtype)
        return {"logits": logits, "labels": torch.randint(classes, (batch,)).to(device)}

    def cost(itemsize):
        logits, labels, statistics = batch * classes * itemsize, 8 * batch, 2 * 4 * batch
        return {
            "fwd": Cost(logits + labels + statistics),  # read logits and labels, write two float32 a row
            "bwd": Cost(2 * logits + labels + statistics),  # read all of these, write dlogits
        }

    label = f"{batch}x{classes}-smooth{label_smoothing:g}-scale{scale:g}"
    options = {"label_smoothing": label_smoothing, "scale": scale}
    return Case(
        "cross_entropy", label, make, ("logits",), cost, options=options, combine=lambda loss, correct: loss
    )  # fmt: skip
