"""Race this project against others' unmodified scripts: the same machine, images and clock. Blocks of runs alternate,
each in a process of its own, whose warm-up does not count. What each block gave is written when it ends.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from blink.command import natural, positive
from blink.experiments.race.peers import PEERS
from blink.training.arguments import add_data_arguments, add_setting_arguments, check_data
from blink.training.recipes import RECIPES

EXAMPLES = (
    "blink race airbench94_muon=../cifar10-airbench",
    "blink race hiverge=../speedrun --runs 5 --blocks 6 --json race.jsonl",
)


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("who races, and on what").add_argument
    add("peers", nargs="+", metavar="PEER=PATH", help=f"a checkout of {', '.join(PEERS)}")
    add("--recipe", choices=RECIPES, default="blink", help="what this project trains (default: %(default)s)")
    add_data_arguments(add)
    add("--seed", type=natural, default=0, metavar="S", help="the first seed of this project's runs")
    add = parser.add_argument_group("budget").add_argument
    add("--runs", type=positive(int), default=10, metavar="N", help="counted runs a block (default: %(default)s)")
    add("--blocks", type=positive(int), default=3, metavar="N", help="blocks a contestant (default: %(default)s)")
    add("--no-cold", dest="cold", action="store_false", help="do not time whole processes with empty caches first")
    add_setting_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--scratch", type=Path, default=Path("runs/race"), metavar="DIR", help="data files and caches of the peers")
    add("--json", type=Path, metavar="FILE", help="JSON lines to append to (default: race.jsonl in --scratch)")


def run(options: Namespace) -> int:
    check_data(options.data)
    # only now: help and mistakes need no PyTorch
    from blink.experiments.race import command

    return command.run(options)
