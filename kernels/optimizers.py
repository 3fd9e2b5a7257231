"""SGD and Muon as torch.optim.Optimizers over the ops on lists, one call for each parameter group and device.

Learning rates are tensors on the parameters' device from the start, so that a captured CUDA graph of `step` follows
them: torch.optim.lr_scheduler's schedulers fill such a tensor, and a number put in its place is filled into it by the
next `step`. All else of a group (momentum, weight decay, options) is fixed in a captured graph.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import _options, dispatch

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

_BUFFER = "momentum_buffer"
# the last name of modules that look rows up, in the usual models; one of a patch embedding's is a convolution's
_LOOKUP = re.compile(r"(^|[._])(emb|embed|embeds|embedding|embeddings|embed_tokens|wte|wpe)\.weight$")


def _shape(p: Tensor) -> str:
    return f"[{', '.join(map(str, p.shape))}]"


class _ListOptimizer(Optimizer):
    """What SGD and Muon share: groups, rates and momenta. A subclass has `_update`, one call of its op."""

    def __init__(self, params: Params, defaults: dict[str, Any]):
        self._rates: dict[int, Tensor] = {}
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: Tensor, group: dict):
        raise NotImplementedError

    def _check(self, group: dict) -> None:
        """Raises for parameters or options that `_update` cannot take."""
        name = type(self).__name__
        _options.update(name, group["momentum"], group["weight_decay"])
        for i, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise TypeError(f"{name}: params[{i}] must be floating, found {str(p.dtype).removeprefix('torch.')}")
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            _options.not_negative(name, "lr", lr)
        elif lr.numel() != 1 or lr.dtype != self._rate_dtype(group) or lr.device != group["params"][0].device:
            raise ValueError(
                f"{name}: lr must be a number or a {self._rate_dtype(group)} tensor of one element on the parameters' "
                f"device, {group['params'][0].device}, found {lr.dtype}, {_shape(lr)} on {lr.device}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's. Raises ValueError for a parameter given before, and what the constructor raises."""
        params = param_group["params"] if isinstance(param_group, dict) else ()
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
            params = param_group["params"] = list(params)
            seen: dict[int, int] = {}
            for i, entry in enumerate(params):
                first = seen.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), i)
                if first != i:
                    raise ValueError(f"{type(self).__name__}: params[{first}] and params[{i}] are the same parameter")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["params"]:
                self._check(group)
                self._rate(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the others, and their momenta, stay as they are.

        closure: evaluates the model again and returns the loss, which this then returns.
        May be captured in a CUDA graph after one call outside of it.

        Raises RuntimeError for a sparse gradient, and in a graph's capture for a momentum or a learning rate that has
        no memory yet; what the op raises for memory that it cannot take.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            places: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel() > 0:
                    if p.grad.layout != torch.strided:
                        raise RuntimeError(f"{type(self).__name__}: a gradient is sparse; it must be dense")
                    places.setdefault((p.device, p.dtype == torch.float64), []).append(p)
            for (device, _), params in places.items():
                # of parameters on several devices, those away from the rate get a copy
                lr = self._rate(index).to(device, non_blocking=True)
                buffers = [self._buffer(p) for p in params]
                self._update(params, [p.grad for p in params], buffers, lr, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, learning rates as numbers: it loads on any device."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, here or on another device, or the same of torch.optim's optimizer.

        Momenta and learning rates are copied into the memory that they have here already, in the parameters' layout:
        a captured graph goes on from the loaded state.

        Raises ValueError for other groups, momenta of other shapes or options that there are none of here.
        """
        groups = [self._translated(group) for group in state_dict["param_groups"]]
        ids = [i for group in groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        loaded = {p: state_dict["state"].get(i, {}).get(_BUFFER) for i, p in zip(ids, params)}
        for i, (p, momentum) in enumerate(loaded.items()):
            if momentum is not None and momentum.shape != p.shape:
                raise ValueError(
                    f"{type(self).__name__}: the loaded momentum of parameter {i} is {_shape(momentum)}, "
                    f"expected {_shape(p)}"
                )
        held = {p: state[_BUFFER] for p, state in self.state.items() if _BUFFER in state}
        super().load_state_dict({**state_dict, "param_groups": groups})
        for p, momentum in loaded.items():
            if momentum is not None:
                buffer = held[p] if p in held else torch.zeros_like(p)
                self.state[p][_BUFFER] = buffer.copy_(momentum)
            elif p in held:
                self.state[p] = {_BUFFER: held[p].zero_()}
            else:
                self.state.pop(p, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_rates", {})
        super().__setstate__(state)
        for index, group in enumerate(self.param_groups):
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if group["params"]:
                self._rate(index)

    def _translated(self, group: dict) -> dict:
        """A group of a state_dict, in this class's terms; its rate a number, wherever it was."""
        return {**group, "lr": float(group["lr"])}

    @staticmethod
    def _rate_dtype(group: dict) -> torch.dtype:
        return torch.float64 if all(p.dtype == torch.float64 for p in group["params"]) else torch.float32

    def _rate(self, index: int) -> Tensor:
        """The group's learning rate on its first parameter's device; a number is put into the tensor that it had."""
        group, held = self.param_groups[index], self._rates.get(index)
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            self._refuse_in_capture("a learning rate was set to a number; fill the group's lr tensor instead")
            own = held is not None and all(g["lr"] is not held for g in self.param_groups)
            if not own:
                held = torch.empty((), dtype=self._rate_dtype(group), device=group["params"][0].device)
            group["lr"] = lr = held.fill_(lr)
        self._rates[index] = lr
        return lr

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if state.get(_BUFFER) is None:
            self._refuse_in_capture("a parameter has no momentum yet; call step() once before")
            state[_BUFFER] = torch.zeros_like(p, requires_grad=False)
        return state[_BUFFER]

    def _refuse_in_capture(self, reason: str) -> None:
        # every replay would do it again
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{type(self).__name__}: while a CUDA graph is captured {reason}")


class SGD(_ListOptimizer):
    """torch.optim.SGD with momentum, by the fused `sgd_nesterov`: the same arguments, state_dict and results.

        g = grad + weight_decay * p     buf = momentum * buf + g     p -= lr * (g + momentum * buf if nesterov else buf)

    params: tensors, (name, tensor) pairs or groups as torch.optim takes them; float32, float16 and bfloat16, and on the
    reference float64. Momenta are of the parameters' dtypes and layouts, and are kept for momentum=0 too.
    lr: 0 or more; or a float32 tensor of one element on the parameters' device, which is then read at every step.
    Without a GPU the reference computes the same. There is no dampening and no maximize.
    Raises ValueError for impossible options or a parameter given twice; TypeError for parameters that are not floating.
    Source: Sutskever et al. 2013.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    def _update(self, params, grads, buffers, lr, group):
        options = {name: group[name] for name in ("momentum", "weight_decay", "nesterov")}
        dispatch.sgd_nesterov(params, grads, buffers, lr, **options)

    def _translated(self, group: dict) -> dict:
        for name in ("dampening", "maximize"):
            if group.get(name):
                raise ValueError(f"SGD: the loaded state has {name}={group[name]}, which this optimizer does not have")
        return super()._translated(group)


class Muon(_ListOptimizer):
    """Muon by the fused `muon`: torch.optim.Muon by default, and on convolutions' filters too; airbench94_muon's with
    lr=0.24, momentum=0.6, weight_decay=0, ns_steps=3, shape_factor=None, renormalize=True, averaged=False.

        buf = momentum * buf + (1 - momentum) * grad      g = (1 - momentum) * grad + momentum * buf
        U = newton_schulz(g as [O, everything else])      p = p * (1 - lr * weight_decay) - lr * factor(shape) * U

    params: tensors, (name, tensor) pairs or groups as torch.optim takes them, [O, ...] of two dimensions or more;
        float32, float16 and bfloat16, and on the reference float64. Each is one matrix [O, everything else].
    lr: 0 or more; or a float32 tensor of one element on the parameters' device, which is then read at every step.
    weight_decay: decoupled. nesterov: False: g = buf.
    ns_coefficients, ns_steps, eps: of the iteration, see `newton_schulz`. ns_dtype: in which it multiplies; None:
        float16 on a GPU, float32 elsewhere, float64 for such parameters (torch.optim.Muon: bfloat16).
    shape_factor: "original", sqrt(max(1, O / K)) for a matrix [O, K]; "match_rms_adamw", 0.2 sqrt(max(O, K));
        "spectral_unclamped", sqrt(O / K); None, 1. torch.optim.Muon calls it adjust_lr_fn.
    renormalize: first bring each weight to the Frobenius norm sqrt(O).
    averaged: False: buf = momentum * buf + grad, g = grad + momentum * buf, a sum in the place of the average.

    A state_dict of torch.optim.Muon loads. Without a GPU the reference computes the same.
    Raises ValueError for vectors and, where parameters have names, for embeddings, which are for another optimizer (see
    `split_parameters`), for impossible options or a parameter given twice; TypeError for parameters that are not
    floating. Sources: Jordan et al. 2024; Liu et al. 2025 (decay, "match_rms_adamw"); Bernstein 2025.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        shape_factor: str | None = "original",
        renormalize: bool = False,
        averaged: bool = True,
        ns_dtype: torch.dtype | None = None,
    ):
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=tuple(ns_coefficients), eps=eps, ns_steps=ns_steps, shape_factor=shape_factor,
            renormalize=renormalize, averaged=averaged, ns_dtype=ns_dtype,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict) -> None:
        super()._check(group)
        _options.iteration("Muon", group["ns_steps"], group["ns_coefficients"], group["eps"])
        _options.shape_factor("Muon", group["shape_factor"])
        names = group.get("param_names", [f"params[{i}]" for i in range(len(group["params"]))])
        for name, p in zip(names, group["params"]):
            what = "a vector" if p.dim() < 2 else "an embedding by its name" if _LOOKUP.search(name) else None
            if what:
                raise ValueError(
                    f"Muon: {name} {_shape(p)} is {what}, not a matrix that multiplies; give it to another optimizer, "
                    "such as AdamW: split_parameters(model) tells them apart"
                )

    def _update(self, params, grads, buffers, lr, group):
        options = {
            name: group[name]
            for name in ("momentum", "weight_decay", "nesterov", "averaged", "renormalize", "shape_factor", "eps")
        }
        exact = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        on_gpu = lr.device.type == "cuda" and exact == torch.float32
        dtype = group["ns_dtype"] or (torch.float16 if on_gpu else exact)
        iteration = dict(steps=group["ns_steps"], coefficients=group["ns_coefficients"], dtype=dtype)
        dispatch.muon(params, grads, buffers, lr, **options, **iteration)

    def _translated(self, group: dict) -> dict:
        group = super()._translated(group)
        if "adjust_lr_fn" in group and "shape_factor" not in group:
            factor = group.pop("adjust_lr_fn") or "original"
            group |= dict(shape_factor=factor, averaged=True, renormalize=False)
        return group


def split_parameters(model: nn.Module, exclude: Collection[str] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(what Muon is for, all else) of the model's trained parameters, each once: matrices that multiply, filters too;
    and vectors, embeddings, scales of norm layers and matrices of one row or column.

    exclude: names of submodules or parameters that are to be among all else; usually the classifier, "head" or "fc".

    Raises ValueError for a name that the model does not have.

        matrices, rest = split_parameters(model, exclude=["fc"])
        optimizers = Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-4)
    """
    norms = tuple(kind for name, kind in vars(nn).items() if isinstance(kind, type) and name.endswith("Norm"))
    apart = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *norms))
        for p in module.parameters(recurse=False)
    }
    named = list(model.named_parameters(remove_duplicate=False))
    for name in exclude:
        members = [id(p) for full, p in named if full == name or full.startswith(f"{name}.")]
        if not members:
            raise ValueError(f"split_parameters: the model has no module or parameter {name!r} with parameters")
        apart.update(members)
    matrices, rest = [], []
    for p in model.parameters():
        if p.requires_grad:
            single = p.dim() < 2 or min(p.shape[0], p.numel() // max(1, p.shape[0])) <= 1
            (rest if single or id(p) in apart else matrices).append(p)
    return matrices, rest
