"""Which process trains which run, said by files beside the runs' own, so that processes share the work.

A claim is a file that one process can make (O_EXCL) and that goes when its run is on file. Its owner touches it every
half a minute. It is void when it is of this machine and its process does not run, or of another machine and was not
touched for ten minutes. Who takes over makes the next claim on the same run, which again only one process can; so
this needs no lock, and none is left behind.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from blink.errors import UserError
from blink.experiments import runs
from blink.processes import alive, machine, start_of

# seconds between two touches
_TOUCHED_EVERY = 30.0
# after which a claim of another machine is void: many touches, and what a network disk's cache may hold back
VOID_AFTER = 600.0
# after which an empty one is: its owner was killed between making and writing it
_EMPTY_VOID_AFTER = 10.0


class Claims:
    """On runs that go to the file `path`."""

    def __init__(self, path: Path):
        path = path.resolve()
        self.folder = path.with_name(f"{path.name}.claims")

    def take(self, run: dict) -> "Claim | None":
        """A claim on this run; None while another process has one. Raises UserError.

        Only what is on file after it was taken is sure to be no run of another's.
        """
        name = _name(run)
        with _said(self.folder):
            number = max(self._numbers().get(name, [0]))
            if number and not self._void(self._path(name, number)):
                return None
            path = self._path(name, number + 1)
            with suppress(FileExistsError):
                self.folder.mkdir()
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            except FileNotFoundError:
                # another process took the empty folder away
                return self.take(run)
            claim = Claim(self, name, number + 1, descriptor, run)
            text = json.dumps(claim.facts).encode()
            try:
                if os.write(descriptor, text) != len(text):
                    raise OSError(28, "No space left on device")
            except OSError:
                claim.release()
                raise
        return claim

    def owners(self, of: list[dict]) -> list[str]:
        """Who has claims on these runs that are not void, in words."""
        found, names = set(), set(map(_name, of))
        with _said(self.folder):
            for name, numbers in self._numbers().items():
                path = self._path(name, max(numbers))
                owner, _ = _owner(path)
                if name in names and owner is not None and not self._void(path):
                    found.add(f"{owner['host']} (process {owner['process']})")
        return sorted(found)

    def remove_void(self) -> None:
        """Remove what killed processes left, whatever their runs."""
        with _said(self.folder):
            for name, numbers in self._numbers().items():
                if self._void(self._path(name, max(numbers))):
                    self.remove(name, max(numbers))
        with suppress(OSError):
            self.folder.rmdir()

    def remove(self, name: str, up_to: int) -> None:
        """Remove the claims on one run up to a number, and the folder once it is empty."""
        for number in self._numbers().get(name, []):
            if number <= up_to:
                self._path(name, number).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _numbers(self) -> dict[str, list[int]]:
        """Of each claimed run its claims; the last of them is valid, or none is."""
        found: dict[str, list[int]] = {}
        with suppress(FileNotFoundError):
            for path in os.listdir(self.folder):
                if match := re.fullmatch(r"(seed\d+-[0-9a-f]{16})\.(\d+)", path):
                    found.setdefault(match[1], []).append(int(match[2]))
        return found

    def _void(self, path: Path) -> bool:
        owner, touched = _owner(path)
        if touched is None:
            return True
        if owner is not None and owner["machine"] == machine() is not None:
            return not alive(owner["process"], owner["start"])
        # a network disk's clock, which touched it too, may not be this machine's
        with suppress(FileNotFoundError):
            os.utime(self.folder)
            return self.folder.stat().st_mtime - touched > (_EMPTY_VOID_AFTER if owner is None else VOID_AFTER)
        return True


class Claim:
    """This process's, on `run`: a context in which the claim is kept fresh, and after which it is gone."""

    def __init__(self, claims: Claims, name: str, number: int, descriptor: int, run: dict):
        self.run, self._claims, self._name, self._number, self._descriptor = run, claims, name, number, descriptor
        self._over = Event()
        self._thread = Thread(target=self._touch, daemon=True)

    @property
    def facts(self) -> dict:
        return {
            "host": platform.node(),
            "process": os.getpid(),
            "machine": machine(),
            "start": start_of(os.getpid()),
            "seed": self.run["seed"],
            "variant": self.run["variant"],
        }

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        self._thread.join()
        with _said(self._claims.folder):
            self.release()

    def release(self) -> None:
        os.close(self._descriptor)
        self._claims.remove(self._name, self._number)

    def _touch(self) -> None:
        while not self._over.wait(_TOUCHED_EVERY):
            # the disk may be away for a while; a claim that was taken over, after ten minutes, stays so
            with suppress(OSError):
                os.utime(self._descriptor)


def _name(run: dict) -> str:
    """Of a run's claims, but for their number."""
    return f"seed{run['seed']}-{hashlib.sha256(json.dumps(runs.identity(run)).encode()).hexdigest()[:16]}"


def _owner(path: Path) -> tuple[dict | None, float | None]:
    """(what a claim says of its owner, None where it is not written yet; when it was touched, None if it is gone)."""
    try:
        with open(path, "rb") as file:
            touched = os.fstat(file.fileno()).st_mtime
            return json.loads(file.read()), touched
    except FileNotFoundError:
        return None, None
    except ValueError:
        return None, touched


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Inside, what the disk refuses raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not claim a run in {folder} ({error.strerror}); see who owns it, or name another --json"
        ) from error
