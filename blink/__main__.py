"""`blink COMMAND ...`: each command lives in the package that does its work and is imported only when it is called."""

import sys

from blink import command
from blink.errors import UserError

GROUPS = {
    "train": {
        "train": ("blink.training.commands.train", "train a network from random weights"),
        "recipes": ("blink.training.show_recipes", "what can be trained, and with which settings"),
        "until": ("blink.experiments.commands.until", "find the smallest budget that reaches an accuracy"),
    },
    "use": {
        "predict": ("blink.inference.commands.predict", "what images show, by a network that a run kept"),
        "evaluate": ("blink.inference.commands.evaluate", "what such a network gets right, by class, and what wrong"),
        "export": ("blink.inference.commands.export", "such a network as ONNX or a torch.export program"),
    },
    "look": {
        "report": ("blink.reporting.command", "a page of trainings that have ended: curves, confusion, pictures"),
        "plot": ("blink.reporting.plot", "their curves as a picture"),
    },
    "compare": {
        "ablate": ("blink.experiments.commands.ablate", "the variants of a plan, with the same seeds"),
        "merge": ("blink.experiments.merge", "files of such runs into one"),
        "race": ("blink.experiments.commands.race", "this project and others' training scripts"),
        "tabulate": ("blink.experiments.tabulate", "the tables of results, from the files in results/"),
    },
    "measure": {
        "profile": ("blink.experiments.commands.profile", "where a training step spends its time"),
        "bench": ("blink.experiments.commands.bench", "the ops and eager PyTorch, torch.compile, the hardware"),
        "inspect": ("blink.experiments.commands.inspect", "what the compiler made of every kernel"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


def _help() -> str:
    lines = ["usage: blink COMMAND ...", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<10}{summary}" for name, (_, summary) in commands.items()), ""]
    return "\n".join([*lines, "blink COMMAND --help says more; blink --version names this version."])


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 2 for a mistake, after one line on stderr."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from blink import __version__

        print(f"blink {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"blink: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return command.call(name, COMMANDS[name][0], rest)


def parse(name: str, arguments: list[str]):
    """The options of a command. Raises UserError for a mistake."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    return command.parse(name, COMMANDS[name][0], arguments)[0]


if __name__ == "__main__":
    sys.exit(main())
