"""List the recipes, or every setting of one."""

import argparse
import textwrap
from dataclasses import asdict

from blink.training.own import named
from blink.training.recipes import RECIPES, Recipe

EXAMPLES = ("blink recipes", "blink recipes hlb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="show this one's settings; or FILE.py:NAME")


def run(options: argparse.Namespace) -> int:
    if options.recipe is None:
        width = max(map(len, RECIPES))
        for recipe in RECIPES.values():
            name = f"{recipe.name:<{width}}  "
            print(textwrap.fill(recipe.summary, 80, initial_indent=name, subsequent_indent=" " * len(name)))
        return 0
    recipe = named(options.recipe, RECIPES, Recipe)
    print(textwrap.fill(f"{recipe.name}: {recipe.summary}", 80))
    for name, value in settings(asdict(recipe)).items():
        if name not in ("name", "summary"):
            print(f"  {name} = {value!r}")
    return 0


def settings(value, name: str = "") -> dict[str, object]:
    """Every setting of a recipe, as nested dictionaries, by its dotted name; lists of parts are numbered."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, tuple | list) and value and isinstance(value[0], dict):
        parts = enumerate(value)
    else:
        return {name: value}
    prefix = name and f"{name}."
    return {key: inner for at, part in parts for key, inner in settings(part, f"{prefix}{at}").items()}
