"""What the downloads of published data sets share."""

import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

from blink.errors import UserError

SOCKET_TIMEOUT_SECONDS = 5


@contextmanager
def downloading(root: Path, name: str) -> Iterator[Path]:
    """A folder below `root` for what is half done, removed afterwards: what is moved out of it is whole, so that an
    interrupted download leaves nothing that looks like a data set. Raises UserError, within seconds when there is no
    network.
    """
    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision sets no timeout of its own, and a silent network would hang for minutes
        socket.setdefaulttimeout(SOCKET_TIMEOUT_SECONDS)
        with TemporaryDirectory(prefix=".downloading-", dir=root) as folder:
            yield Path(folder)
    except (URLError, HTTPException, OSError, EOFError, RuntimeError, tarfile.TarError) as error:
        lines = str(getattr(error, "reason", error)).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"could not download {name} ({reason}); put it under {root}, or name other data with --data"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
