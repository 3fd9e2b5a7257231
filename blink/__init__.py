"""Blink: a trainer for small-image classifiers on hand-written Triton kernels, and the kernels by themselves.

blink.kernels       the ops, each with a plain PyTorch reference
blink.model         the network
blink.training      one training, from a data set to an accuracy
blink.inference     what uses a trained network
blink.reporting     what shows trainings that have ended
blink.experiments   what measures and compares trainings
blink.train(...)    the command `blink train` as a function
blink.load(path)    a network that it kept, to be called with images
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blink.api import Result
    from blink.inference.classifier import Classifier

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels").is_dir():
    # a checkout keeps the packages beside this folder, which works uninstalled too
    __path__.append(str(_ROOT))


def train(data=None, recipe="blink", **options) -> "Result":
    """Train as `blink train` does, without its output: `blink.train("photographs/", epochs=20).accuracy`.

    See `blink.api.train`. Raises blink.errors.UserError for what the command would refuse.
    """
    # PyTorch is imported only where something is trained
    from blink.api import train

    return train(data, recipe, **options)


def load(path, device=None, kernels: str = "auto") -> "Classifier":
    """The network in a file that a run kept: `blink.load(path).predict(["photograph.jpg"])` are its probabilities.

    See `blink.inference.classifier.load`. Raises blink.errors.UserError for what is no such file.
    """
    from blink.inference.classifier import load

    return load(path, device, kernels)
