"""`python -m training.tabulate FILE.json ...`: the results table, made from train.py's JSON files and nothing else."""

import json
import sys
from pathlib import Path

from training.report import with_spread

_HEADER = """# Results

Made by `python -m training.tabulate results/*.json > results/README.md`; nothing here is typed in. Accuracy: test
images, mirror-averaged, of the weight average. Seconds: whitening, training and final evaluation, without compilation.
A figure on one data set's fingerprint compares with figures on the same fingerprint only.
"""


def row(path: Path) -> list[str]:
    """One table row for a JSON file of train.py. Raises KeyError or ValueError when it is not one."""
    content = json.loads(path.read_text())
    environment, data, summary = content["environment"], content["data"], content["summary"]
    machine = environment["device"]
    if environment["device_type"] == "cpu":
        machine += f", {environment['threads']} threads"
    else:
        machine += f", {environment['power_limit']}, driver {environment['driver']}"
    return [
        f"[{path.stem}]({path.name})",
        f"{data['name']} {data['fingerprint']}",
        f"{content['recipe']['name']}; {content['kernels']['name']}; {content['kernels']['stem']}",
        f"{content['budget']['total_steps']} x {content['budget']['batch_size']}",
        str(summary["accuracy"]["n"]),
        with_spread(summary["accuracy"], 4),
        with_spread(summary["seconds"], 2),
        f"{machine}, {content['dtype']}, torch {environment['torch']}, triton {environment['triton']}",
        str(environment["commit"]),
    ]


def main(arguments: list[str]) -> int:
    if not arguments:
        print("training.tabulate: name the JSON files that train.py wrote, e.g. results/*.json", file=sys.stderr)
        return 2
    columns = ["run", "data", "recipe; kernels", "steps x batch", "n", "accuracy", "seconds", "machine", "commit"]
    rows = []
    for name in arguments:
        try:
            rows.append(row(Path(name)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"training.tabulate: {name} is not a finished train.py summary ({error})", file=sys.stderr)
            return 2
    print(_HEADER)
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
