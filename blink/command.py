"""What every command shares: its parser, what arguments mean, and how a mistake or an interruption ends it.

A command is a module with `EXAMPLES` (lines), `add_arguments(parser)` and `run(options) -> exit code`; its docstring's
first paragraph describes it. It raises UserError for what the user must change. `DISTRIBUTED` is True of one that
torchrun may start in several processes. Importing it imports neither PyTorch nor what else takes long: help and a
mistake wait for neither (tests/test_light_start.py). Where the work needs them, it is in a module that `run` imports.
"""

import argparse
import os
import textwrap
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

from blink import ending
from blink.errors import UserError, is_exhausted
from blink.files import STANDARD_OUTPUT
from blink.training import peers

# the first of the process: what it takes to import the rest counts as start-up
STARTED = time.perf_counter()


def python_path() -> str:
    """The PYTHONPATH under which another process finds this package too, installed or not."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, and exit code 2."""

    def __init__(self, prog: str, description: str, examples: tuple[str, ...]):
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 80),
            epilog=epilog,
            # 80 columns, whatever the terminal
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=80),
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
    """Run the command `blink NAME`: its exit code, 2 for a user's mistake and for output that could not be written, 130
    when interrupted, 143 and 129 when ended by SIGTERM and SIGHUP. A reader that has seen enough (head) ends nothing.
    """
    with ending.as_ctrl_c(), ending.lasting_output() as output:
        try:
            options, command = parse(name, module, arguments)
            if peers.place().size > 1 and not getattr(command, "DISTRIBUTED", False):
                raise UserError(f"blink {name} runs in one process; of the commands torchrun starts blink train only")
            with ending.only_json(output) if getattr(options, "json", None) == STANDARD_OUTPUT else nullcontext():
                code = command.run(options)
            output.flush()
        except UserError as error:
            peers.complain(error)
            return 2
        except MemoryError as error:
            peers.complain(UserError(f"out of memory ({error}); use fewer images (--limit) or smaller ones (--size)"))
            return 2
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            reason = str(error).split(". ")[0].splitlines()[0]
            peers.complain(
                UserError(f"out of memory ({reason}); use a smaller --batch-size, fewer images or smaller ones")
            )
            return 2
        except KeyboardInterrupt as stop:
            if peers.place().rank == 0:
                ending.complain(f"blink: {ending.name(stop)}; what is finished is kept")
            return ending.exit_code(stop)
    if output.error is not None and not isinstance(output.error, BrokenPipeError):
        ending.complain(f"blink: the output could not be written ({output.error}); what goes to files is kept")
        return code or 2
    return code


def add_json_argument(add, what: str, overwritten: str = "--json") -> None:
    """`--json` and `--overwrite`, for `files.check_json`."""
    add("--json", type=Path, metavar="FILE", help=f"{what}; -: to standard output, and all else to the other one")
    add("--overwrite", action="store_true", help=f"replace what an earlier call left in {overwritten}")


def positive(kind: type, most: float = float("inf")):
    """Of an argument: a finite number above 0, and not above `most`."""

    def parse_positive(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf") or value > most:
            what = "whole number" if kind is int else "number"
            limit = "" if most == float("inf") else f", at most {most:,}"
            raise argparse.ArgumentTypeError(f"expected a {what} above 0{limit}, not {text!r}")
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
