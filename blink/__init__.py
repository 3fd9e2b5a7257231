"""Blink: a trainer for small-image classifiers on hand-written Triton kernels, and the kernels by themselves.

blink.kernels       the ops, each with a plain PyTorch reference
blink.model         the network
blink.training      one training, from a data set to an accuracy
blink.experiments   what measures and compares trainings
blink.train(...)    the same as the command `blink train`, as a function
"""

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels").is_dir():
    # a checkout keeps the packages beside this folder, which works uninstalled too
    __path__.append(str(_ROOT))
