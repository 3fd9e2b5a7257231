"""List the recipes, or every setting of one."""

import argparse
from dataclasses import fields

from blink.training.recipes import RECIPES

EXAMPLES = ("blink recipes", "blink recipes hlb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", choices=RECIPES, help="show this one's settings")


def run(options: argparse.Namespace) -> int:
    if options.recipe is None:
        width = max(map(len, RECIPES))
        for recipe in RECIPES.values():
            print(f"{recipe.name:<{width}}  {recipe.summary}")
        return 0
    recipe = RECIPES[options.recipe]
    print(f"{recipe.name}: {recipe.summary}")
    for name, value in settings(recipe, "").items():
        print(f"  {name} = {value!r}")
    return 0


def settings(value, prefix: str) -> dict[str, object]:
    """Every setting of a recipe by its dotted name; tuples of parts are numbered."""
    out: dict[str, object] = {}
    for field in fields(value):
        part, name = getattr(value, field.name), f"{prefix}{field.name}"
        if hasattr(part, "__dataclass_fields__"):
            out |= settings(part, f"{name}.")
        elif isinstance(part, tuple) and part and hasattr(part[0], "__dataclass_fields__"):
            for i, each in enumerate(part):
                out |= settings(each, f"{name}.{i}.")
        elif not prefix and name in ("name", "summary"):
            continue
        else:
            out[name] = part
    return out
