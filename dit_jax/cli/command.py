"""What every command does around its work: flags, messages, exit codes.

0 done, 2 wrong use, 3 training diverged, 42 stopped and saved: start me again, 130 Ctrl-C.
"""

import sys
import traceback
from pathlib import Path

from absl import flags, logging

QUOTES = "\"'"
PACKAGE = str(Path(__file__).parents[1])


def run(name, define, main, *, required=(), takes=()):
    """Defines and parses the flags, calls main(values, *words) and returns the exit code.

    `required` names the flags that must be given, `takes` the words that stand beside the flags,
    None any. A ValueError raised by this package is a user's mistake, an OSError one of the place
    that was named: one line on stderr and 2. Any other exception is a fault and keeps its
    traceback.
    """
    _set_up_logging()
    values = flags.FlagValues()
    define(values)
    if any(arg in ("--help", "-h") for arg in sys.argv):
        print(f"{sys.modules[main.__module__].__doc__}\nFlags:\n{values.get_help()}")
        return 0
    try:
        words = _parse(values, required, takes)
    except (KeyError, AttributeError) as error:
        return fail(name, f"config has no field {str(error).strip(QUOTES)}")
    except (flags.Error, ValueError, TypeError) as error:
        return fail(name, error)
    try:
        return main(values, *words) or 0
    except ValueError as error:
        if not _is_from_package(error):
            raise
        return fail(name, error)
    except OSError as error:
        return fail(name, error)
    except KeyboardInterrupt:
        return fail(name, "interrupted", code=130)


def fail(name, message, code=2):
    """Says in one line on stderr why a command cannot do its work; returns the exit code."""
    last_line = str(message).strip().splitlines()[-1].strip()
    print(f"{name}: {last_line.removeprefix('ValueError: ')}", file=sys.stderr)
    return code


def output_path(text):
    """The Path of a file to write; ValueError where its directory does not exist."""
    if not Path(text).parent.is_dir():
        raise ValueError(f"out must be in a directory that exists, got {text}")
    return Path(text)


def _parse(values, required, takes):
    for arg in sys.argv:
        if arg.startswith("--config="):
            path = Path(arg.partition("=")[2].partition(":")[0])
            if not path.is_file():
                raise ValueError(f"config must be a Python file, got {path}")
            # It says `from configs import base`: that folder's parent goes on the path.
            sys.path.insert(0, str(path.resolve().parent.parent))
    values.set_gnu_getopt(True)  # flags may follow words
    words = values(sys.argv)[1:]
    if takes is not None and len(words) != len(takes):
        raise ValueError(f"takes {' '.join(takes) or 'flags only'}, got {' '.join(words)!r}")
    for name in required:
        if values[name].value is None:
            raise ValueError(f"--{name} must be given")
    return words


def _is_from_package(error):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def _set_up_logging():
    """This package's messages as plain lines; of the libraries' only the warnings."""
    flags.FLAGS.mark_as_parsed()  # absl's own, which nobody sets
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.addFilter(lambda record: record.levelno > 20 or record.pathname.startswith(PACKAGE))
