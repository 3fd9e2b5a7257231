"""Compile every kernel for GPUs that need not be here, and report what the compiler made of it. Exit code 1 where a
kernel spills registers on an NVIDIA target, needs more shared memory than a block may use, makes no 16-byte global
access although its layout allows it, leaves copies of a sum that differ, or does not compile.
"""

import argparse

from blink.command import add_json_argument, listed
from blink.experiments.commands.known import GPUS, TARGETS
from blink.training.recipes import RECIPES

DTYPES = ("float16", "bfloat16", "float32")
EXAMPLES = (
    "blink inspect norm_act --target sm_90",
    "blink inspect --dtype float16,bfloat16 --json kernels.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is compiled").add_argument
    add("ops", nargs="*", metavar="OP", help="which ops (default: all)")
    add("--target", type=listed(TARGETS), metavar="T,...", help=f"of {', '.join(TARGETS)} (default: all)")
    add("--dtype", type=listed(DTYPES), default=["float16"], metavar="D,...",
        help=f"of {', '.join(DTYPES)} (default: float16)")  # fmt: skip
    add("--recipe", choices=RECIPES, help="at the shapes of this recipe (default: blink's, hlb's and further ones)")
    add("--tiles", action="store_true", help="of what differs only in sizes that tiles do not depend on, one")
    add("--quick", action="store_true", help="each op's first shape, sm_90 unless --target is given")
    add("--bounds", type=listed(GPUS), metavar="GPU,...", help="what bounds each kernel of a step, by count: on any "
        f"of {', '.join(GPUS)}")  # fmt: skip
    add = parser.add_argument_group("what is written").add_argument
    add("--sass", action="store_true", help="print the machine code too")
    add_json_argument(add, "write every number")


def run(options: argparse.Namespace) -> int:
    # only now: help and mistakes need no PyTorch
    from blink.kernels.examine import compile_report

    return compile_report.run(options)
