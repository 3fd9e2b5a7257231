"""Parameter groups, their update rules and learning rates, all on the device; and the weight average (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from blink.model.backend import Backend
from blink.model.convolution import Conv3x3
from blink.training.budget import Budget
from blink.training.distributed import ALONE, Ranks
from blink.training.recipes import ParamGroup, Recipe


def group_parameters(network: nn.Module, groups: tuple[ParamGroup, ...]) -> list[list[nn.Parameter]]:
    """The trained parameters of each group; a parameter belongs to the first group that names it, a vector to none of
    Muon's, which orthogonalizes matrices.

    Raises ValueError when a trained parameter belongs to none. A group may be empty: a network without what it names.
    """
    filters = {id(module.weight) for module in network.modules() if isinstance(module, Conv3x3)}
    belongs = {
        "filters": lambda name, p: id(p) in filters,
        "gates": lambda name, p: ".se." in name,
        "head": lambda name, p: name == "head.weight",
        "stem.bias": lambda name, p: name == "stem.bias",
        "biases": lambda name, p: name.endswith("bias"),
        "weights": lambda name, p: not name.endswith("bias"),
    }
    members: list[list[nn.Parameter]] = [[] for _ in groups]
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        layer = int(name.split(".")[1]) if name.startswith("groups.") else None
        for group, its in zip(groups, members):
            in_layers = group.layers is None or layer in group.layers
            if belongs[group.params](name, p) and in_layers and (group.rule != "muon" or p.dim() > 1):
                its.append(p)
                break
        else:
            raise ValueError(f"no parameter group of the recipe trains {name}")
    return members


@dataclass(frozen=True)
class _Call:
    """Groups that one call of a rule updates, because they differ in their learning rates only.

    members: indices of the groups, sorted by how long they are trained, longest first, so that groups that stop are
    dropped from the end. first: the column of the table of rates that belongs to the first parameter of the first
    member; the columns of all others follow. owners: of several ranks the one that updates each parameter, all ranks
    if empty.
    """

    rule: str
    momentum: float
    decay: float
    members: tuple[int, ...]
    first: int
    owners: tuple[int, ...]


class Optimizer:
    """Updates every parameter by its group's rule, with learning rates read from a table of the epoch's on the device.

    Nothing depends on the host between steps, so that a step can be captured as a CUDA graph. `param_groups` are those
    of the recipe that train anything in this network.

    Of several ranks each orthogonalizes its share of Muon's matrices and gives the others their new weights; their
    momenta stay where they are.
    """

    def __init__(
        self, network: nn.Module, recipe: Recipe, budget: Budget, backend: Backend, ranks: Ranks = ALONE
    ):  # fmt: skip
        self._ranks = ranks
        pairs = [(g, ps) for g, ps in zip(recipe.param_groups, group_parameters(network, recipe.param_groups)) if ps]
        self.param_groups = [g for g, _ in pairs]
        self.params = [ps for _, ps in pairs]
        self.buffers = [[torch.zeros_like(p, requires_grad=False) for p in ps] for ps in self.params]
        self._batch_size, total_steps = budget.batch_size, budget.total_steps
        device = self.params[0][0].device
        # Newton-Schulz in fp16 where tensor cores are, which a CPU is slow in
        dtype = torch.float16 if device.type == "cuda" else backend.cpu_iteration
        self._rules = {"sgd": backend.sgd_nesterov, "muon": partial(backend.muon, dtype=dtype)}
        # what a schedule is compressed to is in proportion to the recipe's own epochs
        self.steps = [
            total_steps if g.epochs is None else min(total_steps, max(1, round(g.epochs / recipe.epochs * total_steps)))
            for g in self.param_groups
        ]
        self._peaks = [g.lr / (self._batch_size if g.mean_lr else 1) for g in self.param_groups]
        self._schedule = recipe.schedule
        # groups that one call updates, and of which group each parameter is in the calls' order
        alike: dict[tuple, list[int]] = {}
        for i, group in enumerate(self.param_groups):
            alike.setdefault((group.rule, group.momentum, group.decay), []).append(i)
        self._calls: list[_Call] = []
        self._columns: list[int] = []
        for key, members in alike.items():
            members.sort(key=lambda i: -self.steps[i])
            params = [p for i in members for p in self.params[i]]
            owners = ranks.owners([_muon_cost(p) for p in params]) if key[0] == "muon" and ranks.size > 1 else ()
            self._calls.append(_Call(*key, tuple(members), len(self._columns), tuple(owners)))
            self._columns += [i for i in members for _ in self.params[i]]
        # [steps an epoch, parameters], those of a call side by side
        self._rates = torch.zeros(min(budget.steps_per_epoch, total_steps), len(self._columns), device=device)
        self.start_epoch(budget.steps_of(0))

    def rates(self, steps: range) -> Tensor:
        """[steps, groups] float32, on the CPU."""
        return torch.tensor(
            [
                [peak * self._schedule.factor(step, own) if step < own else 0.0 for step in steps]
                for peak, own in zip(self._peaks, self.steps)
            ]
        ).t()

    def start_epoch(self, steps: range) -> None:
        """The table becomes that of these steps of the run."""
        rates = self.rates(steps)[:, self._columns].contiguous()
        # from pinned memory nobody waits for the copy
        self._rates[: len(steps)].copy_(rates.pin_memory() if self._rates.is_cuda else rates, non_blocking=True)

    def active(self, step: int) -> tuple[int, ...]:
        """The groups that are trained at `step`: the phase it belongs to."""
        return tuple(i for i, own in enumerate(self.steps) if step < own)

    def parameters(self, active: tuple[int, ...]) -> list[nn.Parameter]:
        return [p for i in active for p in self.params[i]]

    def freeze_all_but(self, active: tuple[int, ...]) -> None:
        """Only the active groups require gradients, so that nothing is computed for the others."""
        for i, params in enumerate(self.params):
            for p in params:
                p.requires_grad_(i in active)

    @torch.no_grad()
    def update(self, grads: list[Tensor], active: tuple[int, ...], batch: Tensor) -> None:
        """One step with gradients in the order of `parameters(active)`; batch [1] int64 on the device: which step of
        the epoch it is.
        """
        rates = self._rates.index_select(0, batch)[0]
        remaining = iter(grads)
        grads_of = {i: list(islice(remaining, len(self.params[i]))) for i in active}
        for call in self._calls:
            members = [i for i in call.members if i in grads_of]
            params = [p for i in members for p in self.params[i]]
            lists = [params, [g for i in members for g in grads_of[i]], [b for i in members for b in self.buffers[i]]]
            lr = rates[call.first : call.first + len(params)]
            if call.owners:
                mine = [i for i in range(len(params)) if call.owners[i] == self._ranks.rank]
                lists = [[values[i] for i in mine] for values in lists]
                lr = torch.stack([lr[i] for i in mine]) if mine else lr
            if lists[0]:
                decay = call.decay * self._batch_size
                self._rules[call.rule](*lists, lr, momentum=call.momentum, weight_decay=decay)
            if call.owners:
                self._ranks.exchange(params, call.owners[: len(params)])

    def collect_momenta(self) -> None:
        """Of several ranks: every rank has all of them."""
        for call in self._calls:
            if call.owners:
                self._ranks.exchange([b for i in call.members for b in self.buffers[i]], call.owners)

    def reset(self) -> None:
        """As before the first step."""
        for buffers in self.buffers:
            torch._foreach_zero_(buffers)


def _muon_cost(param: Tensor) -> int:
    """In proportion to what its orthogonalization multiplies."""
    rows, columns = len(param), param.numel() // len(param)
    return rows * columns * min(rows, columns)


class WeightAverage:
    """Exponential moving average of a network's floating-point parameters and buffers, kept in float32.

    It starts as a copy of the network at its first update. Source: hlb-CIFAR10.
    """

    def __init__(self, network: nn.Module, decay: float):
        # a state_dict's tensors are detached
        self._live = [t for t in network.state_dict().values() if t.is_floating_point()]
        self._decay = decay
        self._average: list[Tensor] = []
        self.started = False

    def reset(self) -> None:
        """As before the first update; the memory stays, where a run would split what later parts of it need whole."""
        self.started = False

    def update(self) -> None:
        live = [t.float() for t in self._live]
        if not self._average:
            self._average = [t.clone() for t in live]
        elif not self.started:
            torch._foreach_copy_(self._average, live)
        self.started = True
        torch._foreach_lerp_(self._average, live, 1 - self._decay)

    def tensors(self) -> list[Tensor]:
        """Of the average, none before its first update."""
        return self._average if self.started else []

    def load(self, tensors: list[Tensor]) -> None:
        """Go on from what `tensors` gave; from none: as before the first update."""
        self.started = bool(tensors)
        if not self._average:
            self._average = [torch.empty_like(live, dtype=torch.float32) for live in self._live if tensors]
        if tensors:
            torch._foreach_copy_(self._average, tensors)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the average; outside, its own values again."""
        if not self.started:
            raise RuntimeError("the weight average was never updated")
        kept = [t.clone() for t in self._live]
        try:
            torch._foreach_copy_(self._live, self._average)
            yield
        finally:
            torch._foreach_copy_(self._live, kept)
