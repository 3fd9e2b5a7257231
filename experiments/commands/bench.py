"""Time the fused ops beside eager PyTorch, torch.compile, the blocks and optimizers of torchvision and torch.optim, and
the hardware's roofs. Every provider's results are compared with float64 first; a wrong one gets its error in place of a
time, and the exit code is 1.
"""

import argparse
from pathlib import Path

from blink.command import add_json_argument, listed, positive
from blink.experiments.commands.known import MODELS, OPS, PROVIDERS
from blink.training.recipes import RECIPES

# of the work's, by name
DTYPES = ("float32", "float16", "bfloat16")
EXAMPLES = (
    "blink bench squeeze_excite --shapes efficientnet_b0",
    "blink bench --json bench.json --plot bench/",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is timed").add_argument
    add("ops", nargs="*", metavar="OP", type=op_name, help=f"default: all of {', '.join(OPS)}")
    add(
        "--shapes",
        default="network",
        metavar="S",
        help=f"a recipe ({', '.join(RECIPES)}), network (default: blink's, hlb's and further ones), a model of "
        f"torchvision's ({', '.join(MODELS)}), sweep or BxCxHxW,...",
    )
    add("--recipe", dest="shapes", choices=RECIPES, help="the shapes of this recipe, as --shapes takes them too")
    add("--dtype", type=listed(DTYPES), metavar="D,...", help="float32, float16, bfloat16")
    add("--providers", type=listed(PROVIDERS), default=list(PROVIDERS), metavar="P,...",
        help=f"of {', '.join(PROVIDERS)} (default: all that have the op)")  # fmt: skip
    add("--pass", dest="passes", choices=("fwd", "bwd", "both"), default="both")
    add("--quick", action="store_true", help="one shape per op, a smaller batch, shorter timings")
    add("--list", action="store_true", help="print the cases and stop")
    add = parser.add_argument_group("what is written").add_argument
    add_json_argument(add, "write everything, with GPU, power limit, versions, commit")
    add("--plot", type=Path, metavar="DIR", help="write a roofline plot and a bar chart per op")
    add = parser.add_argument_group("two results").add_argument
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print the change from A.json to B.json; exit with 1 "
        "where something got slower")  # fmt: skip
    add("--band", type=positive(float), default=5.0, metavar="PERCENT", help="noise band of --compare (default: 5)")


def op_name(text: str) -> str:
    if text not in OPS:
        raise argparse.ArgumentTypeError(f"unknown op {text!r}; expected one of {', '.join(OPS)}")
    return text


def run(options: argparse.Namespace) -> int:
    # only now: help and mistakes need no PyTorch
    from blink.kernels.examine.bench import command

    return command.run(options)
