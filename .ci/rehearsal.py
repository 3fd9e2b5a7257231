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


sys.meta_path.insert(0, _FormerNames())
