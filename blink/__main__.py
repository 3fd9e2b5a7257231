"""`blink COMMAND ...`: the commands of the packages, each imported only when it is called."""

import sys
from importlib import import_module

COMMANDS = {
    "bench": ("blink.kernels.examine.bench.__main__", "the ops against eager PyTorch, torch.compile and the hardware"),
    "inspect": ("blink.kernels.examine.compile_report", "what the compiler made of every kernel"),
    "ablate": ("blink.experiments.ablate", "the variants of a plan against each other"),
    "race": ("blink.experiments.race.__main__", "this project against others' training scripts"),
    "tabulate": ("blink.experiments.tabulate", "the tables of results, made from the files in results/"),
}


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 2 for an unknown command, after one line on stderr."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: blink COMMAND ...\n")
        print("\n".join(f"  {command:<10}{summary}" for command, (_, summary) in COMMANDS.items()))
        print("\nblink COMMAND --help says more; python train.py, in a checkout, trains.")
        return 0
    if name not in COMMANDS:
        print(f"blink: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
