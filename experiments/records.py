"""Runs of an experiment as JSON lines: each is written when it ends, so that a later call goes on where one stopped.

Several processes, on several machines too, may add to one file: each waits for its lock (fcntl), and looks there only
behind it. A process that is killed while it writes leaves the beginning of a line, which readers pass over and the next
line takes the place of.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from blink.errors import UserError
from blink.files import from_json


def tell(line: str) -> None:
    """A note, on standard error."""
    print(f"blink: {line}", file=sys.stderr)


def as_line(record: dict) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


@contextmanager
def locked(path: Path) -> Iterator[FileIO]:
    """The file, made if there is none, for reading and adding while no other process does. Raises UserError.

    Within, nothing else may open the file: when it closes it, the lock is gone.
    """
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); name another file") from error
    with file:
        _lock(file, path, fcntl.LOCK_EX)
        yield file


def append(path: Path, record: dict, key: Callable[[dict], object] | None = None) -> bool:
    """Add one line and see it on the disk; one that does not fit there is taken back.

    key: what a record is known by; where one is on file already, nothing is added. Whether a line was added. Raises
    UserError when it cannot be written.
    """
    line = as_line(record)
    with locked(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), size, 0)
            if key is not None and key(record) in map(key, _parse(data, path, (), lambda line: None)):
                return False
            begun = _unfinished(data)
            if begun:
                size -= len(begun)
                os.ftruncate(file.fileno(), size)
            elif data and not data.endswith(b"\n"):
                line = b"\n" + line
            if file.write(line) != len(line):
                os.ftruncate(file.fileno(), size)
                raise OSError(28, "No space left on device")
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"could not write {path} ({error.strerror}); free some space or name another file"
            ) from error
    return True


def read(path: Path, keys: tuple[str, ...] = (), note: Callable[[str], None] = tell, wait: bool = False) -> list[dict]:
    """All records; none where there is no file. The beginning of a last line is left out, which `note` is told.

    wait: for whoever adds a line just now. Raises UserError naming a line that is not whole or lacks a key.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that lines can be added to; name a file")
    try:
        with open(path, "rb") as file:
            if wait:
                _lock(file, path, fcntl.LOCK_SH)
            data = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); expected a file of JSON lines") from error
    return _parse(data, path, keys, note)


def _lock(file, path: Path, how: int) -> None:
    try:
        fcntl.lockf(file, how)
    except OSError as error:
        raise UserError(
            f"{path} cannot be locked ({error.strerror}), so that processes could share it; name a file on another disk"
        ) from error


def _unfinished(data: bytes) -> bytes:
    """The last line if it is the beginning of a record only; a whole one may lack its end of line."""
    last = data[data.rfind(b"\n") + 1 :]
    try:
        from_json(last)
    except ValueError:
        return last if last.startswith(b"{") else b""
    return b""


def _parse(data: bytes, path: Path, keys: tuple[str, ...], note: Callable[[str], None]) -> list[dict]:
    begun = _unfinished(data)
    lines = data.removesuffix(begun).splitlines()
    if begun:
        note(f"line {len(lines) + 1} of {path} was not finished and does not count; its run is missing")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            missing = [key for key in keys if key not in record]
            if missing:
                raise ValueError(f"without {missing[0]!r}: another command's")
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is no run ({error}); remove that line or name another file"
            ) from error
        records.append(record)
    return records
