"""What every command does around its work: flags, messages, exit codes.

0 done, 2 wrong use, 3 training diverged, 42 stopped and saved: start me again.
"""

import sys
import traceback
from pathlib import Path

from absl import flags, logging

PACKAGE = str(Path(__file__).parents[1])


def run(name, main, flag_values, argv=None):
    """Parses argv into flag_values, calls main() and returns the exit code.

    A ValueError raised by this package is a user's mistake: one line on stderr and 2. Any other
    exception is a fault and keeps its traceback.
    """
    argv = sys.argv if argv is None else argv
    _set_up_logging()
    if any(arg in ("--help", "-h") for arg in argv):
        print(f"{sys.modules[main.__module__].__doc__}\nFlags:\n{flag_values.get_help()}")
        return 0
    _make_configs_importable(argv)
    try:
        rest = flag_values(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        return fail(name, error)
    try:
        return main() or 0
    except ValueError as error:
        if not _is_from_package(error):
            raise
        return fail(name, error)


def fail(name, message, code=2):
    """Says in one line on stderr why a command cannot do its work; returns the exit code."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    print(f"{name}: {lines[-1] if lines else message!r}", file=sys.stderr)
    return code


def _is_from_package(error):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def _make_configs_importable(argv):
    """configs/x.py says `from configs import base`: its parent's folder goes on the path."""
    for arg in argv:
        if arg.startswith(("--config=", "-config=")):
            path = Path(arg.partition("=")[2].partition(":")[0])
            sys.path.insert(0, str(path.resolve().parent.parent))


def _set_up_logging():
    """This package's messages as plain lines; of the libraries' only the warnings."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.addFilter(lambda record: record.levelno > 20 or record.pathname.startswith(PACKAGE))
