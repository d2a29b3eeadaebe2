"""What all commands share: flags, one-line errors and exit codes.

0 done, 2 wrong use, 3 training diverged, 42 stopped and saved (start it again), 130 Ctrl-C, 141
the reader of the output has gone.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from absl import flags, logging

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import disk

PACKAGE = str(Path(__file__).parents[1])
OWN_CONFIG = f"{PACKAGE}/runs/own_config.py"


def run(name, define, main, *, required=(), takes=(), tidies=False, stopped=130):
    """Defines and parses the flags, calls main(values, *positional) and returns the exit code.

    required: flags that must be given. takes: the names of the positional arguments; None: any
    number. tidies: main has something to clean up, so SIGINT and SIGTERM raise KeyboardInterrupt
    in it; otherwise they end the process at once, with the exit code `stopped`.

    A UserError, and an OSError or a bucket's refusal, becomes one line on stderr and exit code 2.
    Any other exception is a bug and keeps its traceback.
    """
    compat.log_plainly(_is_for_users)
    compat.hide_closed_event_loop()
    values = flags.FlagValues()
    define(values)
    if any(arg in ("--help", "-h") for arg in sys.argv):
        print(f"{sys.modules[main.__module__].__doc__}\nFlags:\n{values.get_help()}")
        return 0
    try:
        positional = _parse(values, required, takes)
    except (flags.Error, ValueError, TypeError, OSError) as error:  # a config raises any of them
        return fail(name, error)
    except Exception as error:
        if not disk.is_refusal(error):
            raise
        return fail(name, error)
    handlers = _listen(name, tidies, stopped)
    try:
        if "coordinator" in values:
            _join(values)
        code = main(values, *positional) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`: the output that is left goes to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        return fail(name, error)
    except KeyboardInterrupt:
        return fail(name, "interrupted", code=130)
    except Exception as error:
        if not disk.is_refusal(error):
            raise
        return fail(name, error)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _listen(name, tidies, stopped):
    """Sets the handlers of SIGINT and SIGTERM; returns the earlier ones."""

    def stop(signum, frame):
        if tidies and compat.is_in_xla_callback(frame):  # it would drop the exception: try again
            threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
            return
        if tidies:
            raise KeyboardInterrupt
        # No exception: XLA may drop it. No normal exit: XLA's threads may crash in it.
        rest = "" if stopped == 130 else " with nothing new to save: start the same command again"
        os.write(2, f"{name}: interrupted{rest}\n".encode())
        os._exit(stopped)

    return {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}


def define_cluster(values):
    """Defines the flags of a command that several processes may run together."""
    options = {"flag_values": values}
    address = "host:port of process 0; not needed on TPU pods and in Slurm."
    number = "This process's number, from 0, with --coordinator."
    flags.DEFINE_string("coordinator", None, address, **options)
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", lower_bound=1, **options)
    flags.DEFINE_integer("process_id", None, number, lower_bound=0, **options)


def _join(values):
    import jax

    from dit_jax.machine import cluster

    cluster.connect(
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
    )
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)


def fail(name, message, code=2):
    """Prints one line on stderr that says why the command failed; returns the exit code."""
    last_line = str(message).strip().splitlines()[-1].strip()
    for kind in ("ValueError: ", "dit_jax.errors.UserError: "):  # ml_collections adds a traceback
        last_line = last_line.removeprefix(kind)
    print(f"{name}: {last_line}", file=sys.stderr)
    return code


def expand(text):
    """The Path of a text on a disk; expands ~, which a shell leaves alone after --flag=."""
    if "://" in str(text):  # a Path would create a folder with that name
        raise UserError(f"a path must be on a disk, got {text}: mount the bucket")
    return disk.path(text)


def output_folder(text):
    """The Path of a folder to write; UserError if it is a file."""
    path = expand(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"OUT must be a folder or new, got the file {path}")
    return path


def output_path(text):
    """The Path of a file to write; UserError if it cannot be written."""
    path = expand(text)
    if path.is_dir():
        raise UserError(f"out must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise UserError(f"out must be in a directory that exists, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"out must be where you may write, got {path}")
    return path


def _parse(values, required, takes):
    """Parses sys.argv into the flags; returns the positional arguments."""
    values.set_gnu_getopt(True)  # flags may follow positional arguments
    arguments, path = _find_config(values)
    try:
        positional = values(arguments)[1:]
    except (SyntaxError, ImportError) as error:
        raise UserError(f"config must be a Python file that runs, got {path}: {error}") from error
    except (KeyError, AttributeError) as error:
        raise UserError(compat.explain_config_error(error, path)) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(compat.explain_flag_error(error)) from error
    if takes is not None and len(positional) != len(takes):
        raise UserError(f"takes {' '.join(takes) or 'flags only'}, got {' '.join(positional)!r}")
    if takes and "" in positional:
        raise UserError(f"{takes[positional.index('')]} must not be empty")
    for name in required:
        if values[name].value is None:
            raise UserError(f"--{name} must be given")
    for name in values:
        value = values[name].value
        if value in ("", []):
            raise UserError(f"{name} must not be empty")
        if isinstance(value, str) and value.startswith("--"):  # `--vae --labels=1`
            raise UserError(f"{name} must have a value, got {value}")
    return positional


def _find_config(values):
    """(sys.argv with --config as one argument, the path of the config file or None).

    A command with --workdir that is given no --config takes the config of the run in workdir.
    """
    arguments = list(sys.argv)
    if "config" not in values:
        return arguments, None
    value, i = _pop_flag(arguments, "config")
    if value is None:
        workdir, _ = _pop_flag(list(arguments), "workdir") if "workdir" in values else (None, 0)
        if workdir:
            arguments.insert(1, f"--config={OWN_CONFIG}:{workdir}")
        return arguments, None
    path, colon, variant = value.partition(":")
    if not path:
        raise UserError("config must not be empty")
    path = expand(path)
    if not path.is_file():
        raise UserError(f"config must be a Python file that exists, got {path}")
    # The file may say `from configs import base`, so the parent of its folder is importable.
    sys.path.insert(0, str(path.resolve().parent.parent))
    arguments.insert(i, f"--config={path}{colon}{variant}")
    return arguments, path


def _pop_flag(arguments, name):
    """(value, index) of --NAME=VALUE or --NAME VALUE, which it removes; (None, 0) if not given."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            del arguments[i]
            return (value if equals or i == len(arguments) else arguments.pop(i)), i
    return None, 0


def _is_for_users(record):
    """True for this package's messages and for libraries' warnings.

    It hides library warnings that repeat a raised exception.
    """
    if record.pathname.startswith(PACKAGE):
        return True
    repeats = record.exc_info or record.name.startswith(("gcsfs", "fsspec"))
    return record.levelno > 20 and not repeats
