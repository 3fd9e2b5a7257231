"""Libraries that an install need not have."""

from importlib import import_module
from types import ModuleType

from blink.errors import UserError


def needed(module: str, who: str) -> ModuleType:
    """The module, of a library that `who` (a command or a flag) cannot do without. Raises UserError."""
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{who} needs {package} ({error}); pip install {package}") from error
