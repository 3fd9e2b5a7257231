"""The one exception that a user's mistake or a failed run raises; train.py prints it as one line and exits with 2."""


class UserError(Exception):
    """One line that says what was wrong, what was expected and what to do."""


def brief(error: BaseException) -> str:
    """What an error says, in one line of some length; a library's may quote all of a file."""
    lines = str(error).splitlines()
    said = lines[0] if lines and lines[0].strip() else type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]} ..."
