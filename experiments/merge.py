"""Put the runs of several files of blink ablate into one, each once: what machines without a common disk trained. Of a
run that is in several files, that of the first named counts.
"""

from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path

from blink.errors import UserError
from blink.experiments import runs
from blink.experiments.claims import Claims
from blink.experiments.pool import same_recipe
from blink.experiments.records import as_line
from blink.files import check_output, replacing

EXAMPLES = (
    "blink merge runs/se.*-of-4.jsonl -o runs/se.jsonl",
    "blink merge here.jsonl there.jsonl -o both.jsonl --overwrite",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines of blink ablate; not changed")
    add = parser.add_argument_group("what is written").add_argument
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="all runs, by conditions, seed and variant")
    add("--overwrite", action="store_true", help="FILE may be there, if it holds runs of blink ablate")


def run(options: Namespace) -> int:
    out, files = options.out, options.files
    check_output(out)
    found: dict[tuple, dict] = {}
    first: dict[tuple, tuple[Path, dict]] = {}
    read = 0
    for path in files:
        if not path.exists():
            raise UserError(f"there is no {path}; expected a file of blink ablate")
        if out.exists() and out.samefile(path):
            raise UserError(f"{out} is one of the files to merge, which are kept as they are; name another --out")
        for each in runs.read(path):
            other, like = first.setdefault(runs.trial(each), (path, each))
            if not same_recipe(like, each):
                what = f"the runs of {each['variant']!r} in {other} and {path} are of two recipes or budgets"
                raise UserError(f"{what}; merge those of one")
            found.setdefault(runs.identity(each), each)
            read += 1
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: no run is in there; expected what blink ablate writes")
    if out.exists():
        check_overwritten(out, options.overwrite)
    try:
        with replacing(out) as temporary:
            temporary.write_bytes(b"".join(as_line(found[key]) for key in sorted(found)))
    except OSError as error:
        raise UserError(f"could not write {out} ({error.strerror}); free some space or name another file") from error
    twice = f"; duplicates left out: {read - len(found)}" if read > len(found) else ""
    print(f"{out}: {len(found)} runs of {len(files)} file{'s' if len(files) != 1 else ''}{twice}")
    return 0


def check_overwritten(path: Path, overwrite: bool) -> None:
    """See that a file may be replaced by another one of runs. Raises UserError."""
    if not overwrite:
        raise UserError(f"{path} is there already; name another --out, or add --overwrite")
    try:
        ours = runs.read(path, lambda line: None) or path.stat().st_size == 0
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"{path} holds other things than runs and is not overwritten; name another --out")
    claims = Claims(path)
    claims.remove_void()
    with suppress(FileNotFoundError):
        if any(claims.folder.iterdir()):
            raise UserError(f"{path} is being added to by blink ablate; wait for it, or name another --out")
