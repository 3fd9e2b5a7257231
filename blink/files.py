"""Files written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: it takes its place if the block succeeds, else it is removed.

    A link keeps pointing where it does; a pipe or a device (/dev/stdout) is itself what to write to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        # what stopped the block is what matters, not that there was nothing to remove
        with suppress(OSError):
            temporary.unlink()
        raise
