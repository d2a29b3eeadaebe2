"""Errors that a user can mend. Every other exception is a bug, and keeps its traceback."""


class UserError(ValueError):
    """Names the argument, the rule and the value in one line, which a command prints.

    It is a ValueError, so that a caller from Python may catch it as one.
    """
