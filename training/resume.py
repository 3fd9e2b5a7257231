"""`--resume DIR`: what a training that was interrupted left there, and what of it can be gone on with."""

import argparse
import json
from hashlib import sha256
from pathlib import Path

from blink.command import parse
from blink.errors import UserError, brief
from blink.files import from_json
from blink.model import saved
from blink.training.job import Job
from blink.training.recipes import RECIPES
from blink.training.results import RunResult, run_from_dict

SUMMARY = "summary.json"


def network_file(options: argparse.Namespace, job: Job, seed: int) -> Path:
    return options.out / f"{job.recipe.name}-seed{seed}.safetensors"


def gallery_file(network: Path) -> Path:
    return network.with_suffix(".gallery.safetensors")


def as_it_was(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the training in --resume DIR, with what is given beside it. Raises UserError."""
    folder, given = options.resume, iter(options.arguments)
    added = []
    for word in given:
        if word == "--resume":
            next(given)
        elif not word.startswith("--resume="):
            added.append(word)
    before = summary_of(folder)["command"][2:]
    options = parse("train", "blink.training.commands.train", [*map(str, before), *added])[0]
    own = not (options.recipe in RECIPES or any(word.startswith("--recipe") for word in added))
    if own:
        # a folder may be anybody's, and this would run a file that it names
        raise UserError(
            f"{folder}: its recipe is {options.recipe}, of a Python file that would be run; name it again to go on: "
            f"--resume {folder} --recipe {options.recipe}"
        )
    options.resume = options.out = folder
    return options


def summary_of(folder: Path) -> dict:
    """What a training wrote last to its folder. Raises UserError."""
    path = folder / SUMMARY
    try:
        content = from_json(path.read_text())
        if content["command"][:2] != ["blink", "train"] or not isinstance(content["runs"], list):
            raise ValueError("other content")
        return content
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; --resume takes a folder that blink train --out wrote to") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_summary(path, error) from error


def _no_summary(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no summary of blink train ({brief(error)}); --resume takes its --out folder")


def identity(facts: dict, options: argparse.Namespace) -> dict:
    """What two parts of one training share, ready for JSON."""
    same = {key: facts[key] for key in ("recipe", "data", "budget", "dtype", "deterministic")}
    return {**same, "kernels": facts["kernels"]["name"], "keep": options.keep, "init": str(options.init)}


def digest(facts: dict, options: argparse.Namespace) -> str:
    """Of the identity: what a network's file names its training by."""
    return sha256(json.dumps(identity(facts, options), sort_keys=True).encode()).hexdigest()[:16]


def finished(options: argparse.Namespace, job: Job) -> list[RunResult]:
    """The runs in --resume DIR that ended, in the order of their seeds. Raises UserError for those of another job.

    A run has ended when its network is there: what the summary does not know of it yet, the network's file does.
    """
    before, runs = summary_of(options.resume), []
    mine = json.loads(json.dumps(identity(job.facts, options)))
    try:
        differing = [key for key, value in identity(before, options).items() if value != mine[key]]
        if not differing:
            job.facts["flops"] = before["flops"]
            in_summary = {content["seed"]: content for content in before["runs"]}
            for seed in range(options.seed, options.seed + options.runs):
                path = network_file(options, job, seed)
                content = (in_summary.get(seed) or _of_network(path, job, options)) if path.is_file() else None
                if content is not None:
                    runs.append(run_from_dict(content, job.budget.total_steps))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _no_summary(options.resume / SUMMARY, error) from error
    if differing:
        raise UserError(f"{options.resume} holds a training with other {', '.join(differing)}; continue it as it was")
    return runs


def _of_network(path: Path, job: Job, options: argparse.Namespace) -> dict | None:
    facts, _ = saved.read(path, weights=False)
    return facts["run"] if facts.get("training") == digest(job.facts, options) else None
