"""Ctrl-C and SIGTERM end a command with one line, whenever they come.

They end the process at once, after `clean_at_the_end`. An exception could get lost in C++ code or
in a destructor, print a traceback where modules are imported, and crash: it would unwind Python and
end the interpreter while XLA's threads work. Only dit-prepare, which has no such threads, raises
one, to stop its worker processes.
"""

import atexit
import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RAISE_EVERY = 0.2  # seconds, until the exception arrives
_cleanups = []  # functions
RESUMES = {"dit-train": 42}  # the exit code 42 means: start me again


def listen_from_the_first_import():
    """Sets the handlers if this process runs a command; `command.run` comes some imports later."""
    program = sys.argv[0] if sys.argv else ""
    if program not in sys.orig_argv:  # a worker process has the arguments of its parent
        return
    if program == "-m":  # Python is still importing the packages of `python -m dit_jax.cli.train`
        program = next((word for word in sys.orig_argv if "dit_jax.cli." in word), "")
        program = program.replace("dit_jax.cli.", "dit-")
    name = os.path.basename(program)
    if name.startswith("dit-"):
        listen(name, RESUMES.get(name, 130))
        atexit.register(_ignore_more)  # else Python gives signals their deadly default near the end


def listen(name, code):
    """Lets SIGINT and SIGTERM end the process at once; returns the earlier handlers."""
    rest = " with nothing new to save: start the same command again" if code == 42 else ""

    def end(signum, frame):
        _ignore_more()
        for clean in _cleanups:
            clean()
        with contextlib.suppress(Exception):  # no reader, or the signal came during a print
            sys.stdout.flush()
        os.write(2, f"{name}: interrupted{rest}\n".encode())
        os._exit(code)  # no normal exit: XLA's threads may crash in it

    return {signum: signal.signal(signum, end) for signum in SIGNALS}


def clean_at_the_end(function):
    """Lets SIGINT and SIGTERM call a function before they end the process; it must not raise."""
    _cleanups.append(function)


def _ignore_more():
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def raise_from_here():
    """Lets SIGINT and SIGTERM raise KeyboardInterrupt, again and again until one arrives."""

    def start(signum, frame):
        signal.signal(signal.SIGALRM, check)
        signal.setitimer(signal.ITIMER_REAL, RAISE_EVERY, RAISE_EVERY)
        raise KeyboardInterrupt

    def check(signum, frame):
        if not _is_interrupted(sys.exc_info()[1]):  # C++ code or a destructor dropped it
            raise KeyboardInterrupt

    for signum in SIGNALS:
        signal.signal(signum, start)


def arrived():
    """Ends the repetition of `raise_from_here`, and ignores further signals."""
    _ignore_more()
    signal.setitimer(signal.ITIMER_REAL, 0)


def _is_interrupted(error):
    """Whether KeyboardInterrupt is being handled, as while a command cleans up."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
