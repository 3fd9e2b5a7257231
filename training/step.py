"""One training step: batch -> forward -> loss -> gradients -> update, everything it reads and writes on the device."""

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blink.kernels.gather import Gather
from blink.model.backend import Backend
from blink.model.network import Network
from blink.training.batches import Batches
from blink.training.graph import Replay, restored
from blink.training.optimizer import Optimizer
from blink.training.precision import Precision
from blink.training.recipes import Recipe


@dataclass(frozen=True)
class Phase:
    """What all steps that one graph can replay have in common: the groups that are trained, the images' size."""

    active: tuple[int, ...]
    size: tuple[int, int]


def phase_of(recipe: Recipe, optimizer: Optimizer, step: int, total_steps: int, size: tuple[int, int]) -> Phase:
    """The phase that step 0, 1, ... of total_steps belongs to, on images whose own size is `size`."""
    return Phase(optimizer.active(step), recipe.image_size(step, total_steps, size))


class TrainingStep:
    """Called, does the next step of the epoch that `batches` holds.

    losses [total steps] float32: mean loss of each step's batch; correct [] int64: right answers since it was last
    zeroed. Each phase has a graph of its own.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        batches: Batches,
        backend: Backend,
        precision: Precision,
        recipe: Recipe,
        total_steps: int,
        graph: bool,
    ):
        self.network, self.optimizer, self.batches = network, optimizer, batches
        device = batches.labels.device
        self.losses = torch.full((total_steps,), float("nan"), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._precision, self._graph, self._recipe = precision, graph, recipe
        self._forward = self._make_forward(backend, recipe.label_smoothing)
        self._replays: dict[Phase, Replay] = {}
        # one phase's activations lie where another's lay
        self._pool = torch.cuda.graph_pool_handle() if graph else None

    def _make_forward(self, backend: Backend, label_smoothing: float) -> Callable:
        network, cross_entropy, scale = self.network, backend.cross_entropy, self.network.config.logit_scale

        def forward(images: Tensor, labels: Tensor, *fields: Tensor | int | None):
            logits = network.raw_logits(images, Gather(*fields))
            return logits, *cross_entropy(logits, labels, label_smoothing=label_smoothing, scale=scale)

        return torch.compile(forward, dynamic=False) if backend.compile else forward

    def start_run(self) -> None:
        """Back to step 0, with the optimizer's state cleared and nothing frozen."""
        self.optimizer.reset()
        self.optimizer.freeze_all_but(tuple(range(len(self.optimizer.groups))))
        self._step.zero_()
        self.losses.fill_(float("nan"))

    def start_epoch(self) -> None:
        """Back to the first batch of `batches`, which holds a new epoch."""
        self._at.zero_()
        self.correct.zero_()

    def __call__(self, step: int) -> None:
        """Step 0, 1, ... of the run: the host's count only chooses the phase."""
        self.replay(phase_of(self._recipe, self.optimizer, step, len(self.losses), self.batches.size))

    def phases(self) -> list[Phase]:
        """All phases of a run, in order."""
        total, size = len(self.losses), self.batches.size
        return list(dict.fromkeys(phase_of(self._recipe, self.optimizer, s, total, size) for s in range(total)))

    def rehearse(self, phase: Phase) -> None:
        """A step in this phase, not captured, of which nothing stays."""
        with restored(self._state()):
            self._run(phase)

    def replay(self, phase: Phase) -> None:
        """The next step of the epoch, in this phase."""
        if phase not in self._replays:
            # a graph's memory is freed with its step, which it therefore must not keep
            this = weakref.proxy(self)
            self._replays[phase] = Replay(lambda: this._run(phase), self._state(), self._graph, self._pool)
        self._replays[phase]()

    def _state(self) -> list[Tensor]:
        own = [self.losses, self.correct, self._step, self._at]
        if self.batches.hardness is not None:
            own.append(self.batches.hardness)
        momenta = [b for buffers in self.optimizer.buffers for b in buffers]
        return [*self.network.state_dict().values(), *momenta, *own]

    def _run(self, phase: Phase) -> None:
        active = phase.active
        self.optimizer.freeze_all_but(active)
        gather, labels = self.batches.take(self._at, phase.size)
        with self._precision.autocast(labels.device):
            fields = (getattr(gather, field.name) for field in dataclasses.fields(gather))
            logits, loss, correct = self._forward(self.batches.images(phase.size), labels, *fields)
        grads = torch.autograd.grad(loss, self.optimizer.parameters(active))
        self.optimizer.update(list(grads), active, self._step)
        with torch.no_grad():
            self.losses.index_copy_(0, self._step, loss.detach()[None] / len(labels))
            self.correct += correct
            if self.batches.hardness is not None:
                scaled = logits.detach().float() * self.network.config.logit_scale
                losses = F.cross_entropy(scaled, labels, reduction="none")
                self.batches.hardness.index_copy_(0, gather.index, losses)
            self._step += 1
            self._at += 1
