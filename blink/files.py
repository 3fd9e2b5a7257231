"""Output files: found unwritable before the work, written whole or not at all."""

import io
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from blink import __version__
from blink.errors import UserError
from blink.processes import alive

# as the name of a file
STANDARD_OUTPUT = Path("-")


def cache_folder() -> Path | None:
    """$BLINK_CACHE, else blink under the user's cache folder; None for a user without a home."""
    if os.environ.get("BLINK_CACHE"):
        return Path(os.environ["BLINK_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blink"
    except RuntimeError:
        return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: it takes its place if the block succeeds, else it is removed.

    A link keeps pointing where it does; a pipe or a device (/dev/stdout) is itself what to write to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{_node()}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        # what stopped the block is what matters, not that there was nothing to remove
        with suppress(OSError):
            temporary.unlink()
        raise


def _node() -> str:
    return re.sub(r"[^\w]", "_", platform.node())


def remove_leftovers(folder: Path) -> None:
    """Remove what `replacing` was writing to in this folder when its process on this machine was killed."""
    for path in folder.glob(f"*.{_node()}-*.tmp"):
        process = path.name.removesuffix(".tmp").rpartition("-")[2]
        with suppress(OSError):
            if process.isdecimal() and not alive(int(process)):
                path.unlink()


def from_json(text: str | bytes):
    """What a text of unknown origin holds. Raises ValueError for whatever it is that cannot be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def write_json(path: Path, content: dict) -> None:
    """Write atomically: the old file stays whole if the disk fills up. `STANDARD_OUTPUT` is that. Raises UserError."""
    content = {"blink": __version__, **content}
    if path == STANDARD_OUTPUT:
        print(json.dumps(content, allow_nan=False), file=getattr(sys.stdout, "json", sys.stdout), flush=True)
        return
    write(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    """Write atomically: the old file stays whole if the disk fills up. Raises UserError."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); free some space or name another file") from error


def replaceable(path: Path) -> bool:
    """Whether it is, or would be, a file; others take what they get when they get it."""
    return path != STANDARD_OUTPUT and (path.is_file() or not path.exists())


def check_json(options) -> None:
    """See, before the work, that --json can be written, and replaces what `write_json` wrote only, if --overwrite says
    so. Raises UserError.
    """
    path = options.json
    if path is None or path == STANDARD_OUTPUT:
        return
    check_output(path)
    try:
        with open(path, "rb") if path.is_file() else nullcontext(io.BytesIO()) as file:
            head = file.read(64).lstrip()
    except OSError as error:
        raise UserError(f"could not read {path} ({error.strerror}); name another file") from error
    if head and not re.match(rb'\{\s*"(blink|command)":', head):
        raise UserError(f"{path} holds something else than results; name another file")
    if head and not options.overwrite:
        raise UserError(f"{path} holds earlier results; replace them by --overwrite, or name another file")


def make_folder(path: Path) -> None:
    """Make it and see that files can be made in it, before hours are spent on what goes there; what killed processes
    left half written is removed. Raises UserError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not make the folder {path} ({error.strerror}); name another") from error
    try:
        with tempfile.TemporaryFile(dir=path):
            remove_leftovers(path)
    except OSError as error:
        raise UserError(f"nothing can be written to {path} ({error.strerror}); name another folder") from error


def check_output(path: Path | None, append: bool = False) -> None:
    """See that a file can be written, or added to, before hours are spent on what goes there; None: no file is asked
    for. Raises UserError.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        if path.exists() and not path.is_file():
            # a pipe or a device takes what it gets when it gets it
            return
        if append and path.exists():
            with open(path, "ab"):
                return
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); name another file") from error
    make_folder(path.resolve().parent)


def is_missing(path: Path) -> bool:
    """Whether there is surely nothing at this path; what else may be wrong with it shows where it is read."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return False
