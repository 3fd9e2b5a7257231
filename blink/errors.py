"""The one exception that a user's mistake or a failed run raises; train.py prints it as one line and exits with 2."""


class UserError(Exception):
    """One line that says what was wrong, what was expected and what to do."""
