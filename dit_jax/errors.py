"""Errors that a user can mend. Every other exception is a bug, and keeps its traceback."""

import contextlib


class UserError(ValueError):
    """Names the argument, the rule and the value in one line, which a command prints.

    It is a ValueError, so that a caller from Python may catch it as one.
    """


@contextlib.contextmanager
def of_topic(topic):
    """A context in which a UserError names its field in full: size ... becomes model.size ..."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{topic}."):
            raise
        raise UserError(f"{topic}.{error}") from error
