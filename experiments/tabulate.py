"""Make the tables of results/README.md, results/search.md and README.md from the JSON files in results/. Files of
`blink train` and `blink profile` become rows, JSON lines of `blink ablate` and `blink race` tables; others, such as a
benchmark's, are left out.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blink.errors import UserError
from blink.experiments import compare, log, pool, provenance, records
from blink.experiments.lending import lent
from blink.experiments.plans import PLANS
from blink.experiments.race import table as race
from blink.experiments.runs import distinct, trial
from blink.tables import markdown as table
from blink.training.results import with_spread

_ROOT = Path(__file__).resolve().parent.parent
_HEADER = """# Results

Made by `blink tabulate`; nothing here is typed in. All variants of all plans in one table: [search.md](search.md).

## Trainings

Accuracy: test images, test-time augmented, of the weight average where the recipe keeps one. Seconds: whitening,
training and final evaluation, without compilation. A figure on one data set's fingerprint compares with figures on the
same fingerprint only.

"""
_PERFORMANCE = """
## Training steps

One step, by `blink profile`: its floor is the sum over its parts of the larger of counted bytes over the measured
copy rate and counted FLOPs over the measured matrix product rate; idle is the gaps between pieces of work. Against
eager PyTorch, steps alternate in one run; "allowed" is the speed-up if all but eager's convolutions took no time.

"""
_PLANS = """
# Plans

Variants of a plan against its first one, by `blink ablate`, with the same seeds, interleaved. "difference" is of
accuracy, in points, paired by machine and seed; "speed" is the first variant's seconds over this one's, paired too; +-
is half of a 95 % t interval of the mean. Runs of several machines share a table, which then has no seconds, and "n" is
pairs/runs where some runs have no partner. Only variants that the runs tell from the first, or bound to a small
difference from it, are in a table. Seconds on a CPU hold what else it did meanwhile: PFLOP says what a variant costs.
"""
_RACES = """
# Races

Against others' unmodified scripts, by `blink race`: blocks of runs in processes of their own alternate,
the warm-up of each does not count. "seconds" by each script's own rules, "our clock" by the wall clock around the
same spans; "times blink's" is of our clock, block by block; "cold s" and "again s" are whole processes of one counted
run, first with empty compiler caches, then with those. A race on a few thousand images proves the command and nothing
else: the peers keep their batches of thousands, which leaves them a few steps, and blink's shrink to 16 steps an epoch.
"""
RUN_COLUMNS = ["run", "data", "recipe; kernels", "steps x batch", "n", "accuracy", "seconds", "machine", "commit"]
PROFILE_COLUMNS = [
    "profile", "recipe; kernels", "graph", "batch", "step ms", "convolutions", "all else", "idle", "floor ms",
    "floor / step", "eager ms", "speed-up", "allowed", "machine", "commit",
]  # fmt: skip


def machine_of(content: dict) -> str:
    environment = content["environment"]
    machine = environment["device"]
    if environment["device_type"] == "cpu":
        machine += f", {environment['threads']} thread{'s' if environment['threads'] != 1 else ''}"
    else:
        machine += f", {environment['power_limit']}, driver {environment['driver']}"
    return f"{machine}, {content['dtype']}, torch {environment['torch']}, triton {environment['triton']}"


def run_row(path: Path, content: dict) -> list[str]:
    """A training's row."""
    data, summary = content["data"], content["summary"]
    return [
        f"[{path.stem}]({path.name})",
        f"{data['name']} {data['fingerprint']}, {data['train']:,} + {data['test']:,} images",
        f"{content['recipe']['name']}; {content['kernels']['name']}; {content['kernels']['stem']}",
        f"{content['budget']['total_steps']} x {content['budget']['batch_size']}",
        str(summary["accuracy"]["n"]),
        with_spread(summary["accuracy"], 4),
        with_spread(summary["seconds"], 2),
        machine_of(content),
        str(content["environment"]["commit"]),
    ]


def profile_row(path: Path, content: dict) -> list[str]:
    """A profile's row."""
    found, race = content["profile"], content["profile"]["race"]
    convolutions = sum(row["ms"] for row in found["rows"] if "conv" in row["part"])
    rest = found["parts_ms"] - found["idle_ms"] - convolutions
    return [
        f"[{path.stem}]({path.name})",
        f"{content['recipe']['name']}; {content['kernels']['name']}",
        "on" if content["graph"] else "off",
        str(content["budget"]["batch_size"]),
        *(f"{ms:.2f}" for ms in (found["step_ms"], convolutions, rest, found["idle_ms"], found["floor_ms"])),
        f"{100 * found['floor_ms'] / found['step_ms']:.0f} %",
        f"{race['eager_ms']:.2f}",
        f"{race['speedup']:.2f}x",
        f"{race['allowed']:.2f}x",
        machine_of(content),
        str(content["environment"]["commit"]),
    ]


def origin(path: Path, content: dict) -> str:
    """The command of a training or profile, and the seeds of its runs, as an item of a list."""
    seeds = "".join(f"; {provenance.seeds(run['seed'] for run in runs)}" for runs in [content.get("runs")] if runs)
    return f"- {path.stem}: {provenance.commands([content])}{seeds}\n"


def tables(folder: Path) -> tuple[str, str]:
    """(trainings, profiles) of every JSON file in `folder`, with their commands. Raises UserError."""
    runs, profiles, sources = [], [], {"runs": "", "profiles": ""}
    for path in sorted(folder.glob("*.json")):
        with refused_unless_whole(path):
            content = json.loads(path.read_text())
            if "profile" in content:
                profiles.append(profile_row(path, content))
                sources["profiles"] += origin(path, content)
            elif content.get("summary"):
                runs.append(run_row(path, content))
                sources["runs"] += origin(path, content)
    return tuple(
        table(columns, rows) + (f"\n{sources[name]}" if rows else "")
        for columns, rows, name in ((RUN_COLUMNS, runs, "runs"), (PROFILE_COLUMNS, profiles, "profiles"))
    )


def race_origin(found: list[dict]) -> str:
    """A paragraph on a race's records; seeds: of this project's runs, which alone are told theirs."""
    told = [record for record in found if record.get("seed") is not None]
    seeds = (record["seed"] + i for record in told for i in range(len(record["runs"])))
    return provenance.paragraph(found, seeds)


def line_tables(folder: Path) -> tuple[str, str, str, str]:
    """(every plan's tables, the log of all plans, every race's tables, for README.md the races on GPUs or, where there
    are none, those on CPUs) of the files of JSON lines in `folder`.
    """
    races, near, files = "", {"cuda": "", "cpu": ""}, {}
    for path in sorted(folder.glob("*.jsonl")):
        with refused_unless_whole(path):
            found = records.read(path)
            if found and "contestant" in found[0]:
                races += f"\n[{path.name}]({path.name}): {race.markdown(found)}\n{race_origin(found)}"
                link = f"[{path.name}](results/{path.name})"
                near[found[0]["environment"]["device_type"]] += f"{link}: {race.markdown(found, brief=True)}\n"
                continue
            files[path.name] = distinct(found, path)
            unknown = next((run["plan"] for run in files[path.name] if run["plan"] not in PLANS), None)
            if unknown is not None:
                raise UserError(f"{path} holds runs of {unknown!r}, which is no plan of this version; remove it")
    pools = pool.pooled(with_lent(files).items(), records.tell)
    # in the order of the plans, whatever their files are called
    plans = dict.fromkeys(PLANS, "")
    for each in pools:
        name = each.shared["plan"]
        links = ", ".join(f"[{file}]({file})" for file in each.by_file)
        with refused_unless_whole(", ".join(each.by_file)):
            text = compare.markdown(each, PLANS[name], provenance.paragraph(each.runs, [r["seed"] for r in each.runs]))
        plans[name] += f"\n{links}: {text}"
    told = "".join(f"\n## {name}\n\n{PLANS[name].summary}\n{text}" for name, text in plans.items() if text)
    return told, log.markdown(pools), races, near["cuda"] or near["cpu"]


def with_lent(files: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Each file's runs, and what of them other plans lend to the plans whose own runs under the same conditions it
    or another file has.
    """
    own: dict[str, set[str]] = {}
    for run in (run for runs in files.values() for run in runs):
        own.setdefault(run["plan"], set()).add(trial(run)[0])
    return {
        file: runs + [r for plan, among in own.items() for r in lent(runs, plan, PLANS[plan].variants, among)]
        for file, runs in files.items()
    }


@contextmanager
def refused_unless_whole(path: Path | str) -> Iterator[None]:
    """Inside, a file that is not as a command of this project wrote it raises UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not whole as it was written ({error!r}); delete or remake it") from error


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- end --> replaced. Raises UserError without these marks."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"README.md lacks the marks <!-- {name} --> and <!-- end --> that its table goes between")
    return pattern.sub(lambda match: match.group(1) + content + match.group(2), text)


EXAMPLES = ("blink tabulate", "blink tabulate --check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=_ROOT, help="the checkout (default: this one)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")


def run(options: argparse.Namespace) -> int:
    folder, readme = options.root / "results", options.root / "README.md"
    runs, profiles = tables(folder)
    plans, search, races, near_races = line_tables(folder)
    text = _HEADER + runs + _PERFORMANCE + profiles + _PLANS + plans + (_RACES + races if races else "")
    wanted = {folder / "README.md": text, folder / "search.md": search}
    try:
        wanted[readme] = fill(readme.read_text(), "record", near_races)
        stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
        for path in [] if options.check else stale:
            path.write_text(wanted[path])
    except OSError as error:
        raise UserError(f"{error.filename} could not be read or written ({error.strerror})") from error
    if options.check:
        for path in stale:
            print(f"{path} is stale: run blink tabulate", file=sys.stderr)
    return 1 if options.check and stale else 0
