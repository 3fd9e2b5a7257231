"""`--init FILE`: another run's weights to begin with."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from blink.errors import UserError
from blink.model import saved
from blink.training.data.dataset import Dataset
from blink.training.recipes import Recipe

# what a network computes does not depend on how it was initialized, nor on how fast its statistics follow
_FREE = ("whiten_eps", "norm_momentum", "dirac", "head_std", "gates_start_constant")
_HEAD = "head.weight"


def initial_weights(path: Path, recipe: Recipe, dataset: Dataset) -> tuple[dict[str, Tensor], list[str]]:
    """(weights to begin with, what a person should know of them, in lines).

    The head is the file's where the classes are the same ones, its rows in the order of this data set's classes; else
    it stays random and is not among the weights. Raises UserError for a file of another network than the recipe's.
    """
    content, state = saved.read(path)
    wanted = json.loads(json.dumps(asdict(recipe.network)))
    theirs = content.get("network")
    differing = [key for key in wanted if key not in _FREE and (theirs or {}).get(key) != wanted[key]]
    if differing or _HEAD not in state:
        name, what = content.get("recipe", {}).get("name", "unknown"), ", ".join(differing) or _HEAD
        raise UserError(
            f"--init {path}: its network differs from recipe {recipe.name} in {what}; name the recipe that it was "
            f"trained with ({name}) and its settings"
        )
    channels = content["image_shape"][0]
    if channels != dataset.image_shape[0]:
        raise UserError(f"--init {path}: it takes images of {channels} channels, these have {dataset.image_shape[0]}")
    classes = content["classes"]
    if sorted(classes) != sorted(dataset.classes):
        del state[_HEAD]
        return state, [f"begins with {path}; other classes, so the head is new"]
    state[_HEAD] = state[_HEAD][torch.tensor([classes.index(name) for name in dataset.classes])]
    return state, [f"begins with {path}, its head included"]
