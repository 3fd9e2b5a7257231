"""Recipes and plans by name: this project's, or one of your own as FILE.py:NAME."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from blink.errors import UserError

T = TypeVar("T")


def check(text: str, known: Mapping[str, T], kind: type[T]) -> None:
    """What can be seen without running the file. Raises UserError."""
    what, (file, colon, name) = kind.__name__.lower(), text.rpartition(":")
    if text in known:
        return
    if not colon or not file.endswith(".py"):
        raise UserError(f"unknown {what} {text!r}; expected one of {', '.join(known)}, or FILE.py:NAME of your own")
    if not Path(file).is_file():
        raise UserError(f"there is no {file}; expected a Python file that defines the {what} {name}")


def named(text: str, known: Mapping[str, T], kind: type[T]) -> T:
    """One of `known`, or what NAME is in the Python file of FILE.py:NAME, which is run. Raises UserError."""
    check(text, known, kind)
    if text in known:
        return known[text]
    what, (file, _, name) = kind.__name__.lower(), text.rpartition(":")
    try:
        content = runpy.run_path(file)
    except Exception as error:  # whatever the user's own lines raise
        trace = error.__traceback__
        while trace.tb_next is not None and trace.tb_frame.f_code.co_filename != file:
            trace = trace.tb_next
        reason = " ".join(str(error).split())
        raise UserError(f"{file}, line {trace.tb_lineno}: {type(error).__name__}: {reason}") from error
    if not isinstance(content.get(name), kind):
        found = [key for key, value in content.items() if isinstance(value, kind)]
        other = f"it holds {', '.join(found)}" if found else f"it holds no {kind.__name__}"
        raise UserError(f"{file} has no {what} {name!r}; {other}")
    return content[name]
