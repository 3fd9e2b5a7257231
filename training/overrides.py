"""`--set NAME=VALUE`: any setting of a recipe, by the name that `blink recipes RECIPE` lists it under."""

import ast
import math
from dataclasses import is_dataclass, replace
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from blink.errors import UserError
from blink.training.recipes import Recipe


def with_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with each "name=value" set, in order. Raises UserError for an unknown name or an impossible value."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set {setting}: expected NAME=VALUE, as in network.se_reduction=8")
        if name in ("name", "summary"):
            raise UserError(f"--set {name}: what a recipe is called stays")
        try:
            recipe = _with(recipe, type(recipe), name.split("."), text)
        except (LookupError, ValueError, TypeError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise UserError(f"--set {setting}: {reason}; blink recipes {recipe.name} lists all settings") from error
    return recipe


def _with(value, hint, path: list[str], text: str):
    """`value`, of a field annotated `hint`, with what the path leads to inside of it replaced."""
    if not path:
        return _parsed(text, hint)
    first, *rest = path
    if is_dataclass(value):
        hints = get_type_hints(type(value))
        if first not in hints:
            raise LookupError(f"there is no {first!r} among {', '.join(hints)}")
        return replace(value, **{first: _with(getattr(value, first), hints[first], rest, text)})
    if isinstance(value, tuple):
        if not first.isdecimal() or int(first) >= len(value):
            raise LookupError(f"expected one of 0 to {len(value) - 1} in place of {first!r}")
        at = int(first)
        inner = _element(hint, at)
        return (*value[:at], _with(value[at], inner, rest, text), *value[at + 1 :])
    raise LookupError(f"nothing is inside of {value!r}, where {first!r} would be")


def _element(hint, at: int):
    """The annotation of an element of a tuple."""
    hint = next((h for h in _choices(hint) if get_origin(h) is tuple), hint)
    inner = get_args(hint)
    return inner[0] if len(inner) == 2 and inner[1] is ... else inner[at]


def _choices(hint) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _parsed(text: str, hint):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # a word needs no quotes
        value = text
    for choice in _choices(hint):
        fits, found = _as(value, choice)
        if fits:
            return found
    raise ValueError(f"expected {' or '.join(_described(choice) for choice in _choices(hint))}")


def _as(value, hint) -> tuple[bool, object]:
    """(whether the value is one of this annotation, it as one)."""
    if get_origin(hint) is Literal:
        return value in get_args(hint), value
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, tuple | list) or any(is_dataclass(h) for h in inner):
            # a single ( ) is the only tuple of dataclasses that can be written
            return value == () and inner[-1] is ..., ()
        if inner[-1] is not ... and len(value) != len(inner):
            return False, None
        found = [_as(v, _element(hint, at)) for at, v in enumerate(value)]
        return all(fits for fits, _ in found), tuple(v for _, v in found)
    if hint is float:
        fits = type(value) in (int, float) and math.isfinite(value)
        return fits, float(value) if fits else None
    return type(value) is hint, value


def _described(hint) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if is_dataclass(inner[0]):
            return "() or a setting of one of them, as in NAME.0.FIELD"
        count = "any number of" if inner[-1] is ... else str(len(inner))
        return f"({count} {_described(inner[0]).removeprefix('a ')}s)"
    if is_dataclass(hint):
        return "one of its own settings, as in NAME.FIELD"
    return {float: "a number", int: "a whole number", bool: "True or False", str: "a word", NoneType: "None"}[hint]
