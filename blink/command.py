"""What every command shares: its parser, what arguments mean, and how a mistake or an interruption ends it.

A command is a module with `EXAMPLES` (lines), `add_arguments(parser)` and `run(options) -> exit code`; its docstring's
first paragraph describes it. It raises UserError for what the user must change.
"""

import argparse
import os
import sys
import textwrap
import time
from importlib import import_module

from blink.errors import UserError

# the first of the process: what it takes to import the rest counts as start-up
STARTED = time.perf_counter()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """80 columns, whatever the terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=80)


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, and exit code 2."""

    def __init__(self, prog: str, description: str, examples: tuple[str, ...]):
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 80),
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def parse(name: str, module: str, arguments: list[str]) -> tuple[argparse.Namespace, object]:
    """(its options, the module) of the command `blink NAME`; options.arguments are the words themselves.

    Raises UserError, and SystemExit(0) after --help.
    """
    command = import_module(module)
    parser = Parser(f"blink {name}", command.__doc__.split("\n\n")[0], command.EXAMPLES)
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.arguments = arguments
    return options, command


def call(name: str, module: str, arguments: list[str]) -> int:
    """Run the command `blink NAME`: its exit code, 2 for a user's mistake, 130 when interrupted."""
    try:
        options, command = parse(name, module, arguments)
        code = command.run(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"blink: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blink: interrupted; what is finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def positive(kind: type):
    """Of an argument: a finite number above 0."""

    def parse_positive(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {what} above 0, not {text!r}")
        return value

    return parse_positive


def natural(text: str) -> int:
    """Of an argument: 0, 1, 2 and so on."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ... below 2**63, not {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """Of an argument: above 0, at most 1."""
    value = positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a fraction as 0.94, not {text!r}")
    return value


def listed(known):
    """Of an argument: one or more of the names in `known`, separated by commas."""

    def parse_list(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; expected one or more of {', '.join(known)}")
        return names

    return parse_list
