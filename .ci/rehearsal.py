"""Makes this checkout's modules importable by their former names too: `kernels.x` for `blink.kernels.x`, and so on."""

import importlib
import sys
from importlib.machinery import ModuleSpec

MOVED = {
    "kernels._cases": "blink.kernels.examine.cases",
    "kernels._launch": "blink.kernels.launching",
    "kernels._ahead_of_time": "blink.kernels.examine.ahead_of_time",
    "kernels._machine_code": "blink.kernels.examine.machine_code",
    "kernels.bench": "blink.kernels.examine.bench",
    "kernels.bench.__main__": "blink.kernels.examine.bench.command",
    "training.plans": "blink.experiments.plans",
    "training.errors": "blink.errors",
}
FOLDERS = ("kernels", "model", "training")


class _FormerNames:
    """Finds a module by its former name and puts the one that there is in its place."""

    def find_spec(self, name, path=None, target=None):
        former = name.removeprefix("blink.")
        # `from kernels import _cases` asks for blink.kernels._cases, by the name that the module says it has
        known = name.partition(".")[0] in FOLDERS or any(f"{former}.".startswith(f"{old}.") for old in MOVED)
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        own = module.__spec__.name
        former = own.removeprefix("blink.")
        longest = max((old for old in MOVED if f"{former}.".startswith(f"{old}.")), key=len, default=None)
        name = MOVED[longest] + former[len(longest) :] if longest else f"blink.{former}"
        sys.modules[own] = importlib.import_module(name)
        if name == "blink.training.loop":
            # not before: what runs kernels in its own way must be there before they are imported
            _give_back_former_trainer()


def _accept_groups(kind, field):
    """`groups`, which once was the name of this field, is read and may be replaced."""
    init = kind.__init__

    def __init__(self, *arguments, groups=None, **named):
        init(self, *arguments, **(named if groups is None else named | {field: groups}))

    kind.__init__, kind.groups = __init__, property(lambda self: getattr(self, field))


def _give_back_former_trainer():
    """`training.loop.Trainer`, which once ran by itself and had a step that was an object of its own."""
    from blink.model import network
    from blink.training import budget, loop, recipes, trainer

    class _FormerTrainer(trainer.Trainer):
        step = property(lambda self: self)
        _batches = property(lambda self: self.batches)
        losses = property(lambda self: self.progress.losses)

        def run(self, seed, listener=None, validate=None):
            return loop.train(self, seed, listener or loop.SILENT, validate)

        def replay(self, phase):
            super().do_step(phase)

        def do_step(self, phase):
            self.replay(phase)

        def _whiten(self):
            super().whiten()

        def whiten(self):
            self._whiten()

        def _final_logits(self):
            return super().final_logits()

        def final_logits(self):
            return self._final_logits()

        def train_epoch(self, *arguments):
            return _train_epoch(self, *arguments)

        def _validate(self, limit):
            return _validated(self, limit)

    for kind, field in ((recipes.Recipe, "param_groups"), (network.NetworkConfig, "conv_groups")):
        _accept_groups(kind, field)
    _train_epoch, _validated = loop.train_epoch, loop.validated
    loop.train_epoch = lambda trainer, *arguments: trainer.train_epoch(*arguments)
    loop.validated = lambda trainer, limit: trainer._validate(limit)
    loop.Trainer, loop.plan_budget, loop.build_network = _FormerTrainer, budget.plan_budget, trainer.build_network


sys.meta_path.insert(0, _FormerNames())
