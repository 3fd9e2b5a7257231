"""Files that a training writes on its way: one that cannot be written ends nothing, and is named at the end."""

from collections.abc import Callable
from pathlib import Path

from blink.errors import UserError


class Outputs:
    """Calls what writes files; what failed is tried again at the end, when room may have been made.

    note: called with a line for the first failure of a file.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._failed: dict[Path, tuple[Callable[[], None], UserError]] = {}

    def write(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether it could be written."""
        before = self._failed.pop(path, None)
        try:
            write()
        except UserError as error:
            self._failed[path] = write, error
            if before is None:
                self._note(f"{error}; it is tried again at the end")
            return False
        return True

    def finish(self) -> None:
        """Try again what failed. Raises UserError naming all that cannot be written."""
        for path, (write, _) in list(self._failed.items()):
            self.write(path, write)
        if self._failed:
            cause = next(iter(self._failed.values()))[1].__cause__
            reason = getattr(cause, "strerror", None) or cause
            raise UserError(
                f"could not write {', '.join(map(str, self._failed))} ({reason}); all other files are whole: free some "
                "space or name another folder"
            )
