"""Runs of an experiment as JSON lines: each is written when it ends, so that a later call goes on where one stopped."""

import json
import os
from pathlib import Path

from blink.errors import UserError


def append(path: Path, record: dict) -> None:
    """Add one line. Several processes may write to one file; a line that does not fit on the disk is taken back.

    Raises UserError when it cannot be written.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            written = file.write(line)
            if written != len(line):
                os.ftruncate(file.fileno(), before)
                raise OSError(28, "No space left on device")
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}); free some space or name another file") from error


def read(path: Path, keys: tuple[str, ...] = ()) -> list[dict]:
    """All records; none where there is no file. Raises UserError naming a line that is not whole or lacks a key."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that lines can be added to; name a file")
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a file of JSON lines") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
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
