"""Everything that a training needs, in memory that stays where captured graphs know it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from blink.errors import UserError
from blink.model.backend import Backend
from blink.model.layers import NormAct
from blink.model.network import Network
from blink.model.whitening import initialize_stem
from blink.training.batches import Batches
from blink.training.budget import Budget, check_batch
from blink.training.data.dataset import Dataset
from blink.training.distributed import ALONE, Ranks
from blink.training.evaluation import images_at_once, logits_of
from blink.training.graph import captured, restored
from blink.training.optimizer import Optimizer, WeightAverage
from blink.training.precision import Precision
from blink.training.recipes import Recipe
from blink.training.step import Phase, Progress, loss_function, phase_of, phases_of, training_step


def build_network(recipe: Recipe, dataset: Dataset, backend: Backend, precision: Precision, seed: int) -> Network:
    """A randomly initialized network on the data set's device; the same seed gives the same weights on any backend.

    Raises UserError for images that the network cannot take.
    """
    torch.manual_seed(seed)
    try:
        network = Network(recipe.network, len(dataset.classes), dataset.image_shape, backend)
    except ValueError as error:
        raise UserError(str(error)) from error
    return network.to(dataset.device).to_compute_dtype(precision.weights)


class Trainer:
    """One object trains any number of runs, one seed after another: `loop.train(trainer, seed)`.

    `dataset` is on its device; graph: whether each phase's step is a captured CUDA graph; initial: weights by name that
    every run begins with in place of random ones, the stem's filters and pixel statistics among them; ranks: who trains
    the same network together, each calling the same methods in the same order. Raises UserError for a data set that the
    network cannot be trained on.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, budget: Budget, backend: Backend, precision: Precision, graph: bool,
        initial: dict[str, Tensor] | None = None, ranks: Ranks = ALONE,
    ):  # fmt: skip
        check_batch(recipe, dataset, budget, ranks.size)
        self.recipe, self.dataset, self.budget, self.initial = recipe, dataset, budget, initial
        self.backend, self.precision, self.graph, self.ranks = backend, precision, graph, ranks
        self.device, self.image_shape = dataset.device, dataset.image_shape
        self.network = build_network(recipe, dataset, backend, precision, seed=0)
        self.batches = Batches(
            dataset.train_images, dataset.train_labels, budget.batch_size, recipe.translation, recipe.flip,
            recipe.cutout, recipe.jitter, recipe.image_sizes(dataset.image_shape[1:]), recipe.keep,
        )  # fmt: skip
        # the running statistics follow a batch as far as they would if it came whole
        for module in self.network.modules() if budget.at_a_time < budget.batch_size else ():
            if isinstance(module, NormAct):
                module.momentum = 1 - (1 - module.momentum) ** (budget.at_a_time / budget.batch_size)
        try:
            self.optimizer = Optimizer(self.network, recipe, budget, backend, ranks)
        except ValueError as error:
            raise UserError(f"recipe {recipe.name}: {error}") from error
        self.progress = Progress(min(budget.steps_per_epoch, budget.total_steps), self.device)
        self.average = WeightAverage(self.network, recipe.ema_decay**recipe.ema_every) if recipe.ema_fraction else None
        self._loss_of = loss_function(self.network, backend, recipe.label_smoothing)
        self._at_once = images_at_once(self.network, self.image_shape, precision.compute, self.device)
        self._captured: dict[Phase, Callable[[], None]] = {}
        # one phase's activations lie where another's lay
        self._pool = torch.cuda.graph_pool_handle() if graph else None

    def restart(self, seed: int, labels: Tensor | None = None) -> None:
        """The seed's random weights, or `initial`, and everything else as before the first step of a run.

        labels: in place of the data set's.
        """
        fresh = build_network(self.recipe, self.dataset, self.backend, self.precision, seed)
        self.network.load_state_dict({**fresh.state_dict(), **(self.initial or {})})
        self.batches.labels.copy_(self.dataset.train_labels if labels is None else labels)
        self.rewind()
        if self.average is not None:
            self.average.reset()

    def rewind(self) -> None:
        """Back to the start with the weights as they are: no momentum, nothing frozen."""
        self.optimizer.reset()
        self.optimizer.freeze_all_but(tuple(range(len(self.optimizer.param_groups))))

    def whiten(self) -> None:
        """Give the stem the filters that whiten the training images' patches, unless it began with some; make the
        smaller images of a recipe.
        """
        if self.initial is None:
            images, network = self.dataset.train_images[: self.recipe.whiten_images], self.recipe.network
            varying = initialize_stem(
                self.network.stem, images, self.dataset.mean, self.dataset.std, network.whiten_eps,
                self.recipe.centered_whitening,
            )  # fmt: skip
            self.network.copy_only(varying)
        # whatever machines differ in, they begin alike
        state = list(self.network.state_dict().values())
        self.ranks.exchange(state, [0] * len(state))
        self.batches.resize()
        self.network.train()

    def prepare(self, seed: int, labels: Tensor | None = None) -> None:
        """Ready for the first step of a run that somebody else drives. labels: in place of the data set's."""
        self.restart(seed, labels)
        self.whiten()

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw epoch 0, 1, ... and begin it."""
        self.batches.draw(generator, epoch)
        self.optimizer.start_epoch(self.budget.steps_of(epoch))
        self.progress.start_epoch()

    def end_epoch(self, epoch: int) -> None:
        """What ranks have counted of their shares in epoch 0, 1, ... becomes that of the whole batches."""
        if self.ranks.size == 1:
            return
        steps, share = self.budget.steps_of(epoch), self.ranks.share(self.budget.batch_size)
        losses = self.progress.losses[: len(steps)]
        losses *= (share.stop - share.start) / self.budget.batch_size
        self.ranks.sum_(losses, self.progress.correct)
        if self.batches.hardness is not None:
            # whose image it is not has it sit out, which is above any loss
            self.ranks.least_(self.batches.hardness)

    def phase_at(self, step: int) -> Phase:
        """The phase of step 0, 1, ... of the run."""
        return phase_of(self.recipe, self.optimizer, step, self.budget.total_steps, self.batches.size)

    def phases(self) -> list[Phase]:
        """All phases of a run, in order."""
        return list(phases_of(self.recipe, self.optimizer, self.budget.total_steps, self.batches.size))

    def do_step(self, phase: Phase) -> None:
        """The next step of the epoch, in this phase: `training_step`, or its graph, which the first use captures."""
        if not self.graph:
            self._step(phase)()
            return
        if phase not in self._captured:
            self._captured[phase] = captured(self._step(phase), self._changed(), self._pool)
        self._captured[phase]()

    def rehearse(self, phase: Phase) -> None:
        """A step in this phase, not captured, of which nothing stays."""
        with restored(self._changed()):
            self._step(phase)()

    def _step(self, phase: Phase) -> Callable[[], None]:
        # of the parts and not of this object, which could not be freed while a graph of its own kept it
        return partial(
            training_step, self.network, self.optimizer, self.batches, self.progress, self._loss_of, self.precision,
            phase, self.budget.at_a_time, self.ranks,
        )  # fmt: skip

    def _changed(self) -> list[Tensor]:
        """What a step changes."""
        hardness = [] if self.batches.hardness is None else [self.batches.hardness]
        momenta = [buffer for buffers in self.optimizer.buffers for buffer in buffers]
        return [*self.network.state_dict().values(), *momenta, *self.progress.tensors, *hardness]

    def state(self) -> dict[str, Tensor]:
        """What a run carries from one epoch to the next, by name, in the memory that it lives in."""
        self.optimizer.collect_momenta()
        momenta = {f"{i}.{j}": b for i, buffers in enumerate(self.optimizer.buffers) for j, b in enumerate(buffers)}
        average = self.average.tensors() if self.average is not None else []
        parts = {
            "network": self.network.state_dict(),
            "momentum": momenta,
            "batches": self.batches.carried(),
            "average": {str(i): tensor for i, tensor in enumerate(average)},
        }
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave, of a run of the same recipe, data and budget."""
        if self.average is not None:
            count = sum(name.startswith("average.") for name in state)
            self.average.load([state[f"average.{i}"].to(self.device) for i in range(count)])
        for name, value in self.state().items():
            value.copy_(state[name])

    def update_average(self, done: int) -> None:
        """Take the weights after `done` steps into their average, where and when the recipe keeps one."""
        recipe, total = self.recipe, self.budget.total_steps
        if self.average is None:
            return
        begin = total - round(recipe.ema_fraction * total)
        if (done > begin and done % recipe.ema_every == 0) or (done == total and not self.average.started):
            self.average.update()

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Inside, the network is what a run ends with: the weight average where the recipe keeps one."""
        averaged = nullcontext() if self.average is None else self.average.applied()
        with averaged, self.precision.autocast(self.device):
            yield

    def logits(self, images: Tensor) -> Tensor:
        """Of images as they are."""
        return logits_of(self.network, images, None, at_once=self._at_once, ranks=self.ranks)

    def final_logits(self) -> Tensor:
        """Of the test images, test-time augmented."""
        recipe = self.recipe
        tta = (recipe.tta, recipe.tta_fraction)
        return logits_of(self.network, self.dataset.test_images, *tta, self._at_once, self.ranks)

    @property
    def compiles(self) -> bool:
        """Whether first uses take longer than later ones, which a warm-up is for."""
        return self.device.type == "cuda" or self.backend.compile

    @property
    def compiles_ahead(self) -> bool:
        """Whether there are kernels that `compile_ahead` compiles."""
        return self.device.type == "cuda" and self.backend.name == "fused"

    def warm_up(self, seed: int) -> dict[str, float]:
        """Each part of a run once, on random labels, and nobody counts it: what compiles, captures or picks algorithms
        does so here. A later run is not changed by it.

        Returns seconds: "kernels", compiling Triton's ahead where there are any; "warm-up", the rest.
        """
        labels, classes = self.dataset.train_labels, len(self.dataset.classes)
        generator = torch.Generator(self.device).manual_seed(0)
        seconds, began = {}, time.perf_counter()
        if self.compiles_ahead:
            self.compile_ahead(seed)
            # what compiling takes is not what training takes
            torch.cuda.reset_peak_memory_stats(self.device)
            seconds["kernels"], began = time.perf_counter() - began, time.perf_counter()
        self.prepare(seed, torch.randint(classes, labels.shape, generator=generator, device=self.device))
        # all later epochs are drawn as the second is
        for epoch in range(min(2, self.budget.epochs)):
            self.batches.draw(generator, epoch)
        for phase in self.phases():
            self.progress.start_epoch()
            self.do_step(phase)
        if self.average is not None:
            self.average.update()
        with self.final_weights():
            self.final_logits()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {**seconds, "warm-up": time.perf_counter() - began}

    def compile_ahead(self, seed: int) -> None:
        """Compile every kernel that a run launches, in parallel, where a run would compile them one after another."""
        from blink.kernels.compile_ahead import compiled_ahead

        self.prepare(seed)
        self.batches.draw(torch.Generator(self.device).manual_seed(seed), 0)
        with compiled_ahead():
            for phase in self.phases():
                self.rehearse(phase)
            # an average's kernels are those of the live weights
            with self.precision.autocast(self.device):
                self.final_logits()
