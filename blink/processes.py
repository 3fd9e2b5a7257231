"""Whether a process is still there: for files that belong to one."""

import os
from pathlib import Path


def machine() -> str | None:
    """What this kernel, since it started, and this container's processes have of their own: only where it is the same
    does a process number name the same process. None where /proc does not say.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def start_of(process: int) -> int | None:
    """When a process of this machine started, in ticks since the kernel did; None where /proc does not say."""
    return _look(process)[1]


def alive(process: int, start: int | None = None) -> bool:
    """Whether this machine runs the process; start: what `start_of` said, lest another has its number by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # there, and another user's
        pass
    state, found = _look(process)
    # a dead one (Z, X) keeps its number until its parent asks for it
    return state not in ("Z", "X") and (None in (start, found) or start == found)


def _look(process: int) -> tuple[str | None, int | None]:
    """(state, start), the 3rd and 22nd field of /proc/PID/stat (man 5 proc); the 2nd, a name, may hold anything."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None, None
    return state, int(fields[18])
