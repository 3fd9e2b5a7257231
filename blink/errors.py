"""The one exception that a user's mistake or a failed run raises; train.py prints it as one line and exits with 2. What
others' errors say.
"""

# what allocators and libraries say in a RuntimeError when there is no memory on a CPU
_NO_MEMORY = ("allocate memory", "not enough memory", "bad_alloc", "could not create a")


class UserError(Exception):
    """One line that says what was wrong, what was expected and what to do."""


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # PyTorch's own has a type, by whose name it is known where PyTorch need not be imported
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def brief(error: BaseException) -> str:
    """What an error says, in one line of some length; a library's may quote all of a file."""
    lines = str(error).splitlines()
    said = lines[0] if lines and lines[0].strip() else type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]} ..."
