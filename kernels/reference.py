"""Every op of this package in plain PyTorch: same names, same signatures, no triton import.

These are the definitions that the fused kernels are tested against (in float64), the backend that runs where there is
no GPU, and what `--kernels reference` trains with. Tensors are [B, C, H, W]; channels_last memory is fastest but not
required here. Sources: whitening stem and squeeze-and-excite placement, hlb-CIFAR10; squeeze-and-excite, Hu et al.
2018; batch normalization, Ioffe and Szegedy 2015; GELU (erf form), Hendrycks and Gimpel 2016; label smoothing, Szegedy
et al. 2016.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from pkgutil import iter_modules

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _options, _synchronized
from .gather import Gather, gathered

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


def _activation(name: str | None):
    if name not in ACTIVATIONS:
        known = ", ".join(str(key) for key in ACTIVATIONS)
        raise ValueError(f"unknown activation {name!r}; expected one of {known}")
    return ACTIVATIONS[name]


def _gate_activation(name: str):
    if name not in GATES:
        raise ValueError(f"unknown gate_activation {name!r}; expected one of {', '.join(GATES)}")
    return GATES[name]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _wide(dtype: torch.dtype) -> torch.dtype:
    # torch.promote_types would be a node in what torch.export records
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, gather: Gather | None = None) -> Tensor:
    """(images / 255 - mean) / std, of the batch that `gather`, if given, makes of the images.

    images [B, C, H, W] uint8; mean, std [C] in units of 0..1; the arithmetic runs in float32 (float64 when `dtype` is
    float64) and the result is rounded once, to `dtype`.
    """
    work = _wide(dtype)
    shape = (1, -1, 1, 1)
    x = (images if gather is None else gathered(images, gather, mean)).to(work) / 255
    if gather is not None and gather.jitter is not None:
        contrast, brightness = gather.jitter.to(work)[:, :, None, None, None].unbind(1)
        x = contrast * x + brightness
    return ((x - mean.to(work).view(shape)) / std.to(work).view(shape)).to(dtype)


def whiten(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    gather: Gather | None = None,
) -> Tensor:
    """act(conv2d(normalize(images), weight) + bias), unpadded: see `kernels.whiten`."""
    _options.pixel_statistics("whiten", not images.is_floating_point(), mean, std)
    dtype = dtype or (images.dtype if images.is_floating_point() else weight.dtype)
    if images.is_floating_point() and gather is None:
        x = images.to(dtype)
    else:
        x = normalize(images, mean, std, dtype, gather)
    y = F.conv2d(x, weight.detach().to(dtype), None if bias is None else bias.to(dtype))
    return _activation(activation)(y)


def whiten_project_norm_act(
    images: Tensor,
    whiten_weight: Tensor,
    project_weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    mean: Tensor,
    std: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    dtype: torch.dtype | None = None,
    gather: Gather | None = None,
) -> Tensor:
    """act(batch_norm(project(whiten(images)))): see `kernels.whiten_project_norm_act`."""
    _options.batch_norm("whiten_project_norm_act", momentum, eps)
    dtype = dtype or project_weight.dtype
    z = whiten(images, whiten_weight, mean=mean, std=std, dtype=dtype, gather=gather)
    z = F.conv2d(z, project_weight.flatten(1)[:, :, None, None].to(dtype))
    return norm_act(
        z, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, activation=activation
    )


def norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
) -> Tensor:
    """act(batch_norm(x)), without a weight with a scale fixed at 1: see `kernels.norm_act`."""
    _options.batch_norm("norm_act", momentum, eps)
    # without a scale, CUDA's backward has no gradient for the bias
    scale = torch.ones_like(bias) if weight is None else weight
    shared = _synchronized.sharing() if training else None
    if shared is None:
        y = F.batch_norm(x, running_mean, running_var, scale, bias, training, momentum, eps)
    else:
        y = _synchronized.batch_norm(x, running_mean, running_var, scale, bias, momentum, eps, shared)
    return _activation(activation)(y)


def pool_norm_act(
    x: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    squeeze: bool = True,
    fork: bool = False,
) -> tuple[Tensor | None, ...]:
    """(y, mean of y over H and W) with y = act(batch_norm(max_pool2d(x, 2))): see `kernels.pool_norm_act`."""
    _options.batch_norm("pool_norm_act", momentum, eps)
    y = norm_act(
        F.max_pool2d(x, 2), bias, running_mean, running_var,
        weight=weight, training=training, momentum=momentum, eps=eps, activation=activation,
    )  # fmt: skip
    mean = y.mean((2, 3), dtype=_wide(y.dtype)) if squeeze else None
    return (y, y, mean) if fork else (y, mean)


def se_gate(
    squeeze: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: str | None = "gelu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """sigmoid(act(squeeze W1^T + b1) W2^T + b2), in float32 (float64 for float64 input): see `kernels.se_gate`."""
    act, gate = _activation(activation), _gate_activation(gate_activation)
    device = squeeze.device.type
    # where it is off anyway, torch.export would record that as an operator of its own
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        squeeze = _at_least_fp32(squeeze)
        w1, b1, w2, b2 = (p.to(squeeze.dtype) for p in (weight1.flatten(1), bias1, weight2.flatten(1), bias2))
        return gate(F.linear(act(F.linear(squeeze, w1, b1)), w2, b2))


def excite_norm_act_add(
    x: Tensor,
    gate: Tensor | None,
    bias: Tensor,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "gelu",
) -> Tensor:
    """act(batch_norm(x * gate)) + residual: see `kernels.excite_norm_act_add`."""
    _options.batch_norm("excite_norm_act_add", momentum, eps)
    if gate is not None:
        x = x * gate[:, :, None, None].to(x.dtype)
    y = norm_act(
        x,
        bias,
        running_mean,
        running_var,
        weight=weight,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    return y if residual is None else y + residual


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    activation: str | None = "relu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """x * se_gate(mean of x over H and W): see `kernels.squeeze_excite`."""
    squeeze = x.mean((2, 3), dtype=_wide(x.dtype))
    gates = {"activation": activation, "gate_activation": gate_activation}
    gate = se_gate(squeeze, weight1, bias1, weight2, bias2, **gates)
    return x * gate[:, :, None, None].to(x.dtype)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(summed cross entropy of scale * logits, rows classified correctly): see `kernels.cross_entropy`."""
    _options.fraction("cross_entropy", "label_smoothing", label_smoothing)
    _options.positive("cross_entropy", "scale", scale)
    scaled = scale * _at_least_fp32(logits)
    # no label may be ignored: whatever is no class is an error
    nothing = torch.iinfo(torch.int64).min
    loss = F.cross_entropy(scaled, labels, label_smoothing=label_smoothing, reduction="sum", ignore_index=nothing)
    # argmax takes a NaN for the largest
    correct = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return loss, correct.sum()


def _trained(
    op: str, params: list[Tensor], grads: list[Tensor | None], momentum_buffers: list[Tensor], lr: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients, buffers and learning rates where there is a gradient."""
    if not params:
        raise ValueError(f"{op}: params is empty; expected at least one tensor")
    rates = lr.reshape(-1).expand(len(params)).unbind()
    entries = [entry for entry in zip(params, grads, momentum_buffers, rates) if entry[1] is not None]
    return tuple(map(list, zip(*entries))) or ([], [], [], [])


def sgd_nesterov(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    nesterov: bool = True,
) -> None:
    """One step of torch.optim.SGD(nesterov=True), computed in float32 at least: see `kernels.sgd_nesterov`."""
    _options.update("sgd_nesterov", momentum, weight_decay)
    with torch.no_grad():
        params, grads, momentum_buffers, rates = _trained("sgd_nesterov", params, grads, momentum_buffers, lr)
        if not params:
            return
        # a float32 tensor is its own copy, and updated in place
        p, velocity = ([_at_least_fp32(t.detach()) for t in values] for values in (params, momentum_buffers))
        g = torch._foreach_add([t.to(x.dtype) for t, x in zip(grads, p)], p, alpha=weight_decay)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, g)
        if nesterov:
            torch._foreach_add_(g, velocity, alpha=momentum)
        else:
            torch._foreach_copy_(g, velocity)
        if lr.numel() == 1:
            torch._foreach_mul_(g, lr.reshape(()))
        else:
            torch._foreach_mul_(g, rates)
        torch._foreach_sub_(p, g)
        torch._foreach_copy_(params, p)
        torch._foreach_copy_(momentum_buffers, velocity)


def newton_schulz(
    matrices: list[Tensor],
    *,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
) -> list[Tensor]:
    """The standard iteration, every product in `dtype`: see `kernels.newton_schulz`."""
    _options.iteration("newton_schulz", steps, coefficients, eps)
    a, b, c = coefficients
    results = []
    for matrix in matrices:
        x = _at_least_fp32(matrix.detach())
        x = (x / (x.norm() + eps)).to(dtype)
        tall = matrix.shape[0] > matrix.shape[1]
        x = x.T if tall else x
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        results.append((x.T if tall else x).to(matrix.dtype).contiguous())
    return results


def _shape_factor(rows: int, cols: int, name: str | None) -> float:
    """What Muon multiplies the rate of a matrix [rows, cols] by: see `kernels.muon`."""
    factors = {
        "original": max(1.0, rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
        "spectral_unclamped": (rows / cols) ** 0.5,
        None: 1.0,
    }
    return factors[name]


def muon(
    params: list[Tensor],
    grads: list[Tensor | None],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    *,
    momentum: float,
    weight_decay: float = 0.0,
    renormalize: bool = True,
    steps: int = 3,
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float16,
    nesterov: bool = True,
    averaged: bool = False,
    shape_factor: str | None = None,
) -> None:
    """One Muon step, computed in float32 at least but for the iteration: see `kernels.muon`."""
    _options.update("muon", momentum, weight_decay)
    _options.iteration("muon", steps, coefficients, eps)
    _options.shape_factor("muon", shape_factor)
    with torch.no_grad():
        for param, grad, buffer, rate in zip(*_trained("muon", params, grads, momentum_buffers, lr)):
            p, g = _at_least_fp32(param), _at_least_fp32(grad)
            if averaged:
                g = (1 - momentum) * g
            velocity = momentum * buffer + g
            g = (g + momentum * velocity if nesterov else velocity).flatten(1)
            (update,) = newton_schulz([g], steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)
            if renormalize:
                norm = p.norm()
                p = p * (p.shape[0] ** 0.5 / torch.where(norm == 0, 1, norm))
            adjusted = rate * _shape_factor(*g.shape, shape_factor)
            param.copy_(p * (1 - rate * weight_decay) - adjusted * update.view(p.shape))
            buffer.copy_(velocity)


# an op is a public function in a file of its name, with its reference here
OPS = tuple(file.name for file in iter_modules([str(Path(__file__).parent)]) if callable(globals().get(file.name)))
