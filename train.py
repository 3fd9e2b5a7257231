"""Train a CIFAR-10 classifier from random weights: `python train.py`. See `python train.py --help`."""

import time

_STARTED = time.perf_counter()

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

# cuBLAS needs this before it starts to be repeatable under --deterministic, and it costs nothing measurable
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from rich.console import Console

from blink.errors import UserError
from blink.model import backend as backends
from blink.training.command import (
    Parser,
    Setting,
    add_setting_arguments,
    check_output,
    choose_setting,
    count_flops,
    describe,
    load_data,
    make_folder,
    natural,
    positive,
)
from blink.training.data.dataset import Dataset
from blink.training.loop import Listener, Trainer, plan_budget
from blink.training.recipes import RECIPES, Recipe
from blink.training.report import Report, save_weights, spread, write_json

_IMPORTED = time.perf_counter()

# a CPU validates each epoch on part of the test set, or it would spend a fifth of the run on it
CPU_VALIDATION_IMAGES = 2000
STEMS = {"2x2": (2, 0), "3x3": (3, 0), "2x2-same": (2, "same"), "3x3-same": (3, "same"), "none": (None, "same")}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=False)
    if options.list_recipes:
        for recipe in RECIPES.values():
            console.print(f"{recipe.name}: {recipe.summary}", highlight=False)
        return 0
    try:
        return run(options, console)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted before a run began", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, console: Console) -> int:
    recipe = customize(RECIPES[options.recipe], options)
    for folder in filter(None, (options.out, options.profile)):
        make_folder(folder)
    if options.json is not None:
        check_output(options.json)
    setting = choose_setting(options)
    device = setting.device

    notes: list[str] = []
    dataset = load_data(options.data, console, notes).limited(options.limit).to(device)
    budget = plan_budget(recipe, len(dataset.train_images), options.batch_size, options.epochs, options.steps)
    if not recipe.network.fused_stem:
        notes.append("this stem runs the plain convolution, whatever the kernels")
    validate = options.validate
    if validate is None and device.type == "cpu" and len(dataset.test_images) > CPU_VALIDATION_IMAGES:
        validate = CPU_VALIDATION_IMAGES
        notes.append(f"each epoch's accuracy is of the first {validate:,} test images, the final one of all")

    facts = {
        "command": ["train.py", *sys.argv[1:]],
        **describe(setting, recipe, dataset, budget),
        "steps_given": options.steps is not None,
        "start_up": {"imports": _IMPORTED - _STARTED, "data": time.perf_counter() - _IMPORTED},
        "peak_bytes": None,
        "flops": None,
    }
    report = Report(console, facts)
    report.header(recipe, dataset, budget, notes)
    if options.profile is not None:
        return profile(
            options, console, facts, setting, lambda on, g: Trainer(recipe, dataset, budget, on, setting.compute, g)
        )
    if options.until is not None:
        return train_until(options, console, facts, setting, recipe, dataset)
    listener = Listener(report.on_step, report.on_epoch)

    def save(last: bool) -> None:
        """After each run, so that nothing that ends this process takes a finished one with it."""
        # what is no file cannot be replaced: it gets all once
        whole = options.json is not None and (last or options.json.is_file() or not options.json.exists())
        for path in filter(None, (options.out and options.out / "summary.json", options.json if whole else None)):
            write_json(path, report.as_dict())

    exit_code = 0
    try:
        began = time.perf_counter()
        trainer = Trainer(recipe, dataset, budget, setting.backend, setting.compute, setting.graph)
        facts["start_up"]["network"] = time.perf_counter() - began
        if trainer.compiles:
            facts["start_up"] |= trainer.warm_up(options.seed)
        for number in range(options.runs):
            seed = options.seed + number
            report.start_run(number + 1, options.runs, seed, budget)
            result = None
            try:
                result = trainer.run(seed, listener, validate)
            finally:
                report.end_run(result)
            if facts["flops"] is None:
                # after a run, which need not wait for what only describes it
                facts["flops"] = count_flops(recipe, budget, dataset)
            if device.type == "cuda":
                facts["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            if options.out is not None:
                name = f"{recipe.name}-seed{seed}.safetensors"
                save_weights(options.out / name, result.state, {"recipe": recipe.name, "data": dataset.name})
            save(last=False)
    except KeyboardInterrupt:
        console.print("interrupted", style="yellow")
        exit_code = 130
    finally:
        try:
            if report.runs:
                save(last=True)
        finally:
            if report.runs or exit_code:
                report.summary()
    return exit_code


def train_until(
    options: argparse.Namespace, console: Console, facts: dict, setting: Setting, recipe: Recipe, dataset: Dataset
) -> int:
    """Find the smallest budget that reaches --until; what was found is written after each budget."""
    from blink.experiments import until

    tried: list[until.Trial] = []

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def train(epochs: float) -> until.Trial:
        budget = plan_budget(recipe, len(dataset.train_images), options.batch_size, epochs)
        trainer = Trainer(recipe, dataset, budget, setting.backend, setting.compute, setting.graph)
        if trainer.compiles:
            trainer.warm_up(options.seed)
        results = [trainer.run(options.seed + number, validate=0) for number in range(options.runs)]
        accuracy, seconds = (spread([getattr(r, k) for r in results]) for k in ("accuracy", "seconds"))
        pflop = count_flops(recipe, budget, dataset)["total"] / 1e15
        tried.append(until.Trial(epochs, budget.total_steps, accuracy, seconds, pflop))
        write(None)
        return tried[-1]

    def write(smallest: until.Trial | None) -> None:
        if options.json is not None:
            found = {"target": options.until, "trials": [asdict(trial) for trial in tried]}
            found["smallest"] = None if smallest is None else asdict(smallest)
            write_json(options.json, {**facts, "until": found})

    say(f"the smallest budget whose mean of {options.runs} run(s) reaches {options.until:.4f}")
    try:
        smallest = until.search(options.until, options.epochs or recipe.epochs, train, say)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    write(smallest)
    if smallest is None:
        most = max(trial.epochs for trial in tried)
        raise UserError(
            f"no budget up to {most:g} epochs reached {options.until:g}; lower --until, or begin at more --epochs"
        )
    say(f"smallest: {smallest.epochs:g} epochs, {smallest.seconds['mean']:.2f} s, {smallest.pflop:.4f} PFLOP")
    return 0


def profile(
    options: argparse.Namespace,
    console: Console,
    facts: dict,
    setting: Setting,
    make: Callable[[backends.Backend, bool], Trainer],
) -> int:
    """Profile the training step; make(backend, graph) makes a trainer of this configuration."""
    from blink.experiments.profile import measure, report

    backend, folder = setting.backend, options.profile

    def make_trainer(instrumented: bool, allow_graph: bool) -> Trainer:
        return make(measure.instrumented(backend) if instrumented else backend, setting.graph and allow_graph)

    def make_eager(instrumented: bool) -> Trainer:
        plain = backends.eager()
        return make(measure.instrumented(plain) if instrumented else plain, False)

    measured = measure.measure(make_trainer, not backend.compile, options.seed, folder)
    for lines in filter(None, (report.table(measured), report.convolution_table(measured))):
        print(*lines, "", sep="\n")
    race = measure.race(lambda: make_trainer(False, True), make_eager, options.seed, folder)
    for line in report.race_lines(race):
        console.print(line, highlight=False)
    console.print(f"chrome traces: {folder}", highlight=False)
    if options.json is not None:
        write_json(options.json, {**facts, "profile": report.as_dict(measured, race)})
    return 0


def customize(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes in its network."""
    network = recipe.network
    if options.stem is not None:
        kernel, padding = STEMS[options.stem]
        network = replace(network, whiten_kernel=kernel, whiten_padding=padding)
    if options.se is not None:
        network = replace(network, se_reduction=None if options.se == "off" else options.se)
    return replace(recipe, network=network)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description="Train a CIFAR-10 classifier from random weights.", allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="blink", help="what to train (default: %(default)s)")
    add("--list-recipes", action="store_true", help="print the recipes and stop")
    add("--data", metavar="PATH", help="an image or CIFAR folder, or cifar10, cifar100, synthetic")
    add("--stem", choices=STEMS, help="whitening convolution: kernel and padding, or none (default: the recipe's)")
    add("--se", type=se_reduction, metavar="R|off", help="squeeze-and-excite reduction (default: the recipe's)")
    add("--runs", type=positive(int), default=1, metavar="N", help="train N times, with seeds from --seed on")
    add("--until", type=fraction, metavar="A", help="find the smallest budget whose mean accuracy reaches A, as 0.94")
    add("--epochs", type=positive(float), metavar="E", help="passes over the data (default: the recipe's)")
    add("--steps", type=positive(int), metavar="N", help="compress the whole schedule to N steps")
    add("--batch-size", type=positive(int), metavar="B", help="default: the recipe's, smaller for small data sets")
    add("--limit", type=positive(int), metavar="N", help="use the first N training and first N test images")
    add("--validate", type=natural, metavar="N", help="test images for each epoch's accuracy (0: none)")
    add("--seed", type=natural, default=0, metavar="S")
    add_setting_arguments(parser)
    add("--out", type=Path, metavar="DIR", help="save each run's weights and the summary here")
    add("--profile", type=Path, nargs="?", const=Path("runs/profile"), metavar="DIR",
        help="time one step by part instead of training; traces go to DIR (default: %(const)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the summary and all runs as JSON")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.epochs is not None:
        parser.error("--steps and --epochs both set the budget; give one of them")
    for other in ("steps", "out", "profile", "validate"):
        if options.until is not None and getattr(options, other) is not None:
            parser.error(f"--until tries many budgets and cannot go with --{other}; leave one out")
    if options.profile is not None and (options.out is not None or options.runs > 1):
        parser.error("--profile trains nothing and cannot go with --out or --runs; leave one out")
    return options


def fraction(text: str) -> float:
    value = positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a fraction as 0.94, not {text!r}")
    return value


def se_reduction(text: str) -> int | str:
    return text if text == "off" else positive(int)(text)


if __name__ == "__main__":
    sys.exit(main())
