"""One list of calls for every op: the shapes that the hlb network really uses, and any other.

The tests, the ahead-of-time compile report and the benchmarks all work from it, so a new op is registered once, here,
with its arguments and what its mathematics costs. Bytes are what an ideal fused op must move to and from memory: each
large tensor once for every pass that a dependency forces; vectors of a value per channel are left out.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .gather import Gather

Tensors = dict[str, Tensor | list[Tensor] | None]

Shapes = list[tuple[int, ...]]


def mapped(function: Callable[[Tensor], Tensor], value: Tensor | list[Tensor] | None):
    """function of a tensor, or of every tensor of a list; None stays None."""
    if value is None:
        return None
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def named(name: str, value: Tensor | list[Tensor] | None) -> dict[str, Tensor]:
    """A tensor under its name, the tensors of a list as name[0], name[1] and so on."""
    if value is None:
        return {}
    return {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}


_GATHER = "gather."
GATHER_PARTS = ("shift", "flip", "jitter", "cutout")


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations (a multiply-add is two), of the matrix products only."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One call of one op.

    make(device, dtype): fresh random arguments by name, activations and weights in `dtype`. Names "gather.*", here and
        in the options, are fields of the op's `gather`: what copies or converts arguments handles tensors only.
    differentiable: the arguments that get a gradient, none if the op is not differentiable; buffers: those that the op
    updates in place.
    cost(itemsize): of the forward pass, and of the backward pass if there is one, for activations of that many bytes.
    options: keyword arguments; takes_dtype: whether the op has a `dtype` option for its result.
    combine: of an op that returns a tuple: one tensor that depends on every output that has a gradient.
    """

    op: str
    label: str
    make: Callable[[torch.device, torch.dtype], Tensors]
    differentiable: tuple[str, ...]
    cost: Callable[[int], dict[str, Cost]]
    buffers: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    takes_dtype: bool = False
    combine: Callable[..., Tensor] | None = None

    def combined(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """One tensor that depends on every output: what is called and compared where one tensor is wanted."""
        y = self.call(ops, tensors, dtype)
        if y is None or isinstance(y, list):
            # an op that only updates its buffers, or one of many results
            values = y or [v for name in self.buffers for v in named(name, tensors[name]).values()]
            return torch.cat([v.detach().flatten() for v in values])
        return self.combine(*y) if isinstance(y, tuple) else y

    def call(self, ops, tensors: Tensors, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        """Call the op of the package or of its `reference`; dtype is the result's where the op lets one choose."""
        options = {**self.options, "dtype": dtype} if self.takes_dtype else self.options
        arguments = {**tensors, **options}
        fields = {name: arguments.pop(name) for name in list(arguments) if name.startswith(_GATHER)}
        if fields:
            arguments["gather"] = Gather(**{name.removeprefix(_GATHER): value for name, value in fields.items()})
        return getattr(ops, self.op)(**arguments)


def images(device, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Random uint8 images, smooth enough that neighbouring pixels correlate as in photographs."""
    coarse = torch.rand(batch, channels, max(1, height // 4), max(1, width // 4))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = (smooth * 200 + torch.rand(batch, channels, height, width) * 55).to(torch.uint8)
    return noisy.to(device).contiguous(memory_format=torch.channels_last)


def activations(device, dtype, *shape: int) -> Tensor:
    x = torch.randn(shape).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _pixel_statistics(device, channels: int) -> Tensors:
    return {
        "mean": torch.linspace(0.45, 0.49, channels, device=device),
        "std": torch.linspace(0.24, 0.26, channels, device=device),
    }


def gather_fields(
    device, data: int, batch: int, height: int, width: int, parts: tuple[str, ...], cutout_size: int
) -> Tensors:
    """Random fields of a `Gather` of `batch` images out of `data`, each at most once while there are enough."""

    def pairs(bottom: Callable[[int], int], top: Callable[[int], int]) -> Tensor:
        return torch.stack([torch.randint(bottom(size), top(size), (batch,)) for size in (height, width)], 1)

    index = torch.randperm(data)[:batch] if batch <= data else torch.randint(0, data, (batch,))
    made = {
        "shift": lambda: pairs(lambda size: -min(3, size - 1), lambda size: min(3, size - 1) + 1),
        "flip": lambda: torch.rand(batch) < 0.5,
        "jitter": lambda: torch.tensor([1.0, 0.0]) + torch.tensor([0.3, 0.2]) * (2 * torch.rand(batch, 2) - 1),
        "cutout": lambda: pairs(lambda size: -cutout_size, lambda size: size + 1),
    }
    return {_GATHER + "index": index.to(device)} | {_GATHER + part: made[part]().to(device) for part in parts}


@dataclass(frozen=True)
class _Batch:
    """The images of a whitening case: as they are, or taken out of twice as many by a `Gather` with these `parts`."""

    batch: int
    height: int
    width: int
    channels: int
    parts: tuple[str, ...] | None

    def make(self, device) -> Tensors:
        size = (self.height, self.width)
        if self.parts is None:
            return {"images": images(device, self.batch, *size, self.channels)}
        fields = gather_fields(device, 2 * self.batch, self.batch, *size, self.parts, self.cutout_size)
        return {"images": images(device, 2 * self.batch, *size, self.channels), **fields}

    @property
    def cutout_size(self) -> int:
        return max(2, min(self.height, self.width) // 4)

    @property
    def options(self) -> dict:
        return {_GATHER + "cutout_size": self.cutout_size} if "cutout" in (self.parts or ()) else {}

    @property
    def label(self) -> str:
        """The parts by their first letters."""
        return "" if self.parts is None else "-gather" + ("-" if self.parts else "") + "".join(p[0] for p in self.parts)


def _running(device, channels: int) -> Tensors:
    return {
        "running_mean": torch.randn(channels, device=device),
        "running_var": torch.rand(channels, device=device) + 0.5,
    }


def whiten(
    batch: int,
    height: int,
    width: int,
    filters: int,
    kernel: int = 2,
    channels: int = 3,
    bias: bool = True,
    activation: str | None = "gelu",
    gather: tuple[str, ...] | None = None,
) -> Case:
    """gather: the parts of a `Gather` besides its index."""
    source = _Batch(batch, height, width, channels, gather)

    def make(device, dtype):
        weight = torch.randn(filters, channels, kernel, kernel, device=device) / kernel
        return {
            **source.make(device),
            "weight": weight,
            "bias": torch.randn(filters, device=device) if bias else None,
            **_pixel_statistics(device, channels),
        }

    label = f"{batch}x{height}x{width}x{channels}-{filters}k{kernel}-{activation}{'' if bias else '-nobias'}"
    label += source.label

    def cost(itemsize):
        pixels = batch * height * width * channels
        positions = batch * (height - kernel + 1) * (width - kernel + 1)
        y = positions * filters * itemsize
        product = 2 * positions * filters * channels * kernel**2
        return {
            "fwd": Cost(pixels + y, product),  # read images, write y
            # read dy, and the images only where the activation needs z again
            "bwd": Cost(y + pixels, product) if activation else Cost(y),
        }

    trained = ("bias",) if bias else ()
    options = {"activation": activation, **source.options}
    return Case("whiten", label, make, trained, cost, options=options, takes_dtype=True)


def whiten_project_norm_act(
    batch: int,
    height: int,
    width: int,
    out_channels: int,
    kernel: int = 2,
    channels: int = 3,
    training: bool = True,
    activation: str | None = "gelu",
    eps: float = 1e-12,
    gather: tuple[str, ...] | None = None,
) -> Case:
    """gather: the parts of a `Gather` besides its index."""
    filters = channels * kernel**2
    source = _Batch(batch, height, width, channels, gather)

    def make(device, dtype):
        return {
            **source.make(device),
            "whiten_weight": torch.randn(filters, channels, kernel, kernel, device=device) / kernel,
            "project_weight": (torch.randn(out_channels, filters, 1, 1) * 0.3).to(device=device, dtype=dtype),
            "bias": torch.randn(out_channels, device=device),
            **_running(device, out_channels),
            **_pixel_statistics(device, channels),
        }

    def cost(itemsize):
        pixels = batch * height * width * channels
        positions = batch * (height - kernel + 1) * (width - kernel + 1)
        y = positions * out_channels * itemsize
        product = 2 * positions * out_channels * filters
        moments = 2 * positions * filters**2 if training else 0
        return {
            # training reads the images twice: y needs the batch moments; write y. A gather reads as many pixels
            "fwd": Cost(pixels * (2 if training else 1) + y, product + moments),
            "bwd": Cost(pixels + y, 2 * product),  # read images and dy once; z again and G = g^T q
        }

    label = f"{batch}x{height}x{width}x{channels}-{out_channels}k{kernel}-{activation}{'' if training else '-eval'}"
    label += source.label
    return Case(
        "whiten_project_norm_act",
        label,
        make,
        ("project_weight", "bias"),
        cost,
        ("running_mean", "running_var"),
        {"training": training, "momentum": 0.8, "eps": eps, "activation": activation, **source.options},
        takes_dtype=True,
    )


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
            **_running(device, channels),
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
            **_running(device, channels),
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


def _weights(device, dtype, shapes: Shapes, scale: float = 1.0) -> list[Tensor]:
    """Filters in channels_last memory and matrices in `dtype`, vectors in float32, as a network has them."""
    values = [torch.randn(shape) * scale for shape in shapes]
    values = [v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    return [v.to(device=device, dtype=dtype if v.dim() > 1 else torch.float32) for v in values]


def _updates(device, dtype, shapes: Shapes, buffer_dtype: torch.dtype | None) -> Tensors:
    return {
        "params": _weights(device, dtype, shapes),
        "grads": _weights(device, dtype, shapes, 0.5),
        "momentum_buffers": _weights(device, buffer_dtype or dtype, shapes),
        "lr": torch.full((1,), 0.3, device=device),
    }


def _listed(shapes: Shapes) -> str:
    """Matrix shapes, equal ones counted: 64x216+3*256x2304."""
    names = [f"{shape[0]}x{math.prod(shape[1:])}" for shape in shapes]
    return "+".join(f"{n}*{name}" if n > 1 else name for name, n in Counter(names).items())


def sgd_nesterov(shapes: Shapes, weight_decay: float = 0.1, buffer_dtype: torch.dtype | None = None) -> Case:
    def cost(itemsize):
        # read weight, gradient and momentum, write weight and momentum
        return {"fwd": Cost(sum(5 * math.prod(shape) * (itemsize if len(shape) > 1 else 4) for shape in shapes))}

    count = sum(math.prod(shape) for shape in shapes)
    label = f"{len(shapes)}-tensors-{count}" + (f"-{buffer_dtype}".replace("torch.", "") if buffer_dtype else "")
    return Case(
        "sgd_nesterov",
        label,
        lambda device, dtype: _updates(device, dtype, shapes, buffer_dtype),
        (),
        cost,
        ("params", "momentum_buffers"),
        {"momentum": 0.85, "weight_decay": weight_decay},
    )


def _iteration_flops(shapes: Shapes, steps: int) -> int:
    """Of the Gram form, whose products but the last are symmetric, half of a product each."""
    total = 0
    for shape in shapes:
        m, k = sorted((shape[0], math.prod(shape[1:])))
        # X X^T and Q X; the first step makes P, PR, PRP, each further one PQ too, the last neither PR nor PRP
        total += m * m * k + 2 * m * m * k + (4 * steps - 3) * m**3
    return total


def newton_schulz(shapes: Shapes, steps: int = 3) -> Case:
    def make(device, dtype):
        matrices = [torch.randn(shape[0], math.prod(shape[1:])) for shape in shapes]
        return {"matrices": [m.to(device=device, dtype=dtype) for m in matrices]}

    def cost(itemsize):
        count = sum(math.prod(shape) for shape in shapes)
        # read for the norm, for R = X X^T and for Q X, write Q X
        return {"fwd": Cost(4 * count * itemsize, _iteration_flops(shapes, steps))}

    label = f"{_listed(shapes)}-{steps}steps"
    return Case("newton_schulz", label, make, (), cost, options={"steps": steps}, takes_dtype=True)


def muon(
    shapes: Shapes, weight_decay: float = 0.0, renormalize: bool = True, buffer_dtype: torch.dtype | None = None
) -> Case:
    def cost(itemsize):
        count = sum(math.prod(shape) for shape in shapes)
        # read weight, gradient and momentum, write momentum and X; read X for R; read X and weight, write weight
        return {"fwd": Cost(9 * count * itemsize, _iteration_flops(shapes, 3))}

    label = _listed(shapes) + ("" if renormalize else "-asis")
    return Case(
        "muon",
        label + (f"-{buffer_dtype}".replace("torch.", "") if buffer_dtype else ""),
        lambda device, dtype: _updates(device, dtype, shapes, buffer_dtype),
        (),
        cost,
        ("params", "momentum_buffers"),
        {"momentum": 0.6, "weight_decay": weight_decay, "renormalize": renormalize},
        takes_dtype=True,
    )


def _gate_shapes(channels: int) -> Shapes:
    hidden = channels // 16
    return [(hidden, channels), (hidden,), (channels, hidden), (channels,)]


# what the hlb network trains: filters, gates, BatchNorm biases, head
HLB_SHAPES: Shapes = [
    (32, 12, 1, 1), (128, 32, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3),
    (512, 512, 3, 3), (512, 512, 3, 3), *_gate_shapes(128), *_gate_shapes(512), (32,), (128,), (128,), (128,), (256,),
    (512,), (512,), (512,), (10, 512),
]  # fmt: skip
# the filters of airbench94_muon
AIR_FILTERS: Shapes = [(64, 24, 3, 3), (64, 64, 3, 3), (256, 64, 3, 3), *[(256, 256, 3, 3)] * 3]


def _narrowed(shapes: Shapes, divisor: int) -> Shapes:
    return [(*(max(4, size // divisor) for size in shape[:2]), *shape[2:]) for shape in shapes]


def network_cases(batch: int = 512) -> list[Case]:
    """Every call of the hlb network in a training step on 32x32 images; also what airbench's has beside it,
    cross_entropy at ImageNet's class count, and the whitening ops with a gather: hlb's, and all that one can do.

    Optimizers do not depend on the batch; below 16, where the interpreter only checks results, they get fewer channels.
    """
    divisor = 8 if batch < 16 else 1
    return [
        whiten(batch, 32, 32, 24),
        whiten(batch, 32, 32, 12),
        whiten_project_norm_act(batch, 32, 32, 32),
        whiten_project_norm_act(batch, 32, 32, 32, kernel=3),
        whiten(batch, 32, 32, 24, gather=("shift", "flip")),
        whiten(batch, 32, 32, 24, gather=GATHER_PARTS),
        whiten_project_norm_act(batch, 32, 32, 32, gather=("shift", "flip")),
        whiten_project_norm_act(batch, 32, 32, 32, gather=GATHER_PARTS),
        whiten_project_norm_act(batch, 32, 32, 32, kernel=3, gather=GATHER_PARTS),
        pool_norm_act(batch, 128, 31, 31, fork=True),
        pool_norm_act(batch, 256, 15, 15, squeeze=False),
        pool_norm_act(batch, 512, 7, 7, fork=True),
        se_gate(batch, 128, 8),
        se_gate(batch, 512, 32),
        excite_norm_act_add(batch, 128, 15, 15),
        excite_norm_act_add(batch, 512, 3, 3),
        norm_act(batch, 128, 15, 15),
        norm_act(batch, 256, 7, 7),
        norm_act(batch, 512, 3, 3),
        squeeze_excite(batch, 128, 15, 15, 8, activation="gelu"),
        squeeze_excite(batch, 512, 3, 3, 32, activation="gelu"),
        cross_entropy(batch, 10),
        cross_entropy(2000, 10),
        cross_entropy(batch, 1000),
        sgd_nesterov(_narrowed(HLB_SHAPES, divisor)),
        newton_schulz(_narrowed(AIR_FILTERS, divisor)),
        muon(_narrowed(AIR_FILTERS, divisor)),
    ]


def small_cases() -> list[Case]:
    """One cheap call of every op."""
    return [
        whiten(2, 6, 7, 12),
        whiten_project_norm_act(2, 6, 7, 5),
        whiten(2, 6, 7, 12, gather=GATHER_PARTS),
        whiten_project_norm_act(2, 6, 7, 5, gather=GATHER_PARTS),
        pool_norm_act(2, 12, 5, 7),
        se_gate(3, 20, 5),
        norm_act(2, 12, 3, 5),
        excite_norm_act_add(2, 12, 3, 5),
        squeeze_excite(2, 12, 3, 5, 4),
        cross_entropy(5, 7),
        sgd_nesterov([(12, 3, 3, 3), (7, 5), (9,)]),
        newton_schulz([(12, 3, 3, 3), (7, 5)]),
        muon([(12, 3, 3, 3), (7, 5)]),
    ]


def case_at(op: str, batch: int, height: int, width: int, channels: int) -> Case:
    """The case of `op` for [batch, channels, height, width]; for the whitening ops, images of height x width; for
    cross_entropy, as many classes as channels.

    Optimizer ops take a 3x3 convolution of `channels` with its bias, whatever the batch and the images.
    """
    hidden = max(1, channels // 16)
    (filters,) = _narrowed([(channels, channels, 3, 3)], 8 if batch < 16 else 1)
    return {
        "whiten": lambda: whiten(batch, height, width, channels),
        "whiten_project_norm_act": lambda: whiten_project_norm_act(batch, height, width, channels),
        "se_gate": lambda: se_gate(batch, channels, hidden),
        "norm_act": lambda: norm_act(batch, channels, height, width),
        "excite_norm_act_add": lambda: excite_norm_act_add(batch, channels, height, width),
        "pool_norm_act": lambda: pool_norm_act(batch, channels, height, width),
        "squeeze_excite": lambda: squeeze_excite(batch, channels, height, width, hidden),
        "cross_entropy": lambda: cross_entropy(batch, channels),
        "sgd_nesterov": lambda: sgd_nesterov([filters, filters[:1]]),
        "newton_schulz": lambda: newton_schulz([filters]),
        "muon": lambda: muon([filters]),
    }[op]()


# (batch, height, width, channels): the network's resolutions and widths at batches around its own
SWEEP = [(b, s, s, c) for b in (128, 512, 2048) for s, c in ((32, 32), (15, 128), (7, 256), (3, 512))]
