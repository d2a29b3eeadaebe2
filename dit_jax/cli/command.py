"""What every command does around its work: flags, messages, exit codes.

0 done, 2 wrong use, 3 training diverged, 42 stopped and saved: start me again, 130 Ctrl-C, 141 the
reader of its output has gone.
"""

import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

import jax
import ml_collections
from absl import flags, logging

from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk

PACKAGE = str(Path(__file__).parents[1])
CONFIGS = str(Path(ml_collections.__file__).parent)


def run(name, define, main, *, required=(), takes=(), tidies=False, stopped=130):
    """Defines and parses the flags, calls main(values, *words) and returns the exit code.

    `required` names the flags that must be given, `takes` the words that stand beside the flags,
    None any. tidies: main has something to tidy up after SIGINT or SIGTERM, which then raise
    KeyboardInterrupt; else the process ends at once, with the exit code `stopped`.

    A ValueError raised by this package is a user's mistake, an OSError and what a bucket refuses
    one of the place that was named: one line on stderr and 2. Any other exception is a fault and
    keeps its traceback.
    """
    _set_up_logging()
    values = flags.FlagValues()
    define(values)
    if any(arg in ("--help", "-h") for arg in sys.argv):
        print(f"{sys.modules[main.__module__].__doc__}\nFlags:\n{values.get_help()}")
        return 0
    try:
        words = _parse(values, required, takes)
    except (flags.Error, ValueError, TypeError, OSError) as error:
        return fail(name, error)
    handlers = _listen(name, tidies, stopped)
    try:
        if "coordinator" in values:
            _join(values)
        code = main(values, *words) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `| head`; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        if not _is_from(error, PACKAGE):
            raise
        return fail(name, error)
    except AttributeError as error:
        if not _is_from(error, CONFIGS):
            raise
        return fail(name, f"{_explain_field(error, None)}, which configs/base.py has")
    except OSError as error:
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
    """Says what SIGINT and SIGTERM do; returns what they did before."""

    def stop(signum, frame):
        if tidies and frame.f_code.co_name == "_xla_gc_callback":  # an exception is lost in there
            threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
            return
        if tidies:
            raise KeyboardInterrupt
        # Not by an exception either, which XLA may lose; and its threads may crash at the exit.
        rest = "" if stopped == 130 else " with nothing new to save: start the same command again"
        os.write(2, f"{name}: interrupted{rest}\n".encode())
        os._exit(stopped)

    return {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}


def define_cluster(values):
    """The flags of a command that several processes may run as one."""
    options = {"flag_values": values}
    message = "host:port of process 0, where neither a TPU pod nor Slurm tells."
    flags.DEFINE_string("coordinator", None, message, **options)
    flags.DEFINE_integer("num_processes", None, "With it.", lower_bound=1, **options)
    flags.DEFINE_integer("process_id", None, "With it, from 0.", lower_bound=0, **options)


def _join(values):
    cluster.connect(
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
    )
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)


def fail(name, message, code=2):
    """Says in one line on stderr why a command cannot do its work; returns the exit code."""
    last_line = str(message).strip().splitlines()[-1].strip()
    print(f"{name}: {last_line.removeprefix('ValueError: ')}", file=sys.stderr)
    return code


def expand(text):
    """The Path on a disk of a text that may start with ~, as a shell leaves it after --flag=."""
    if "://" in str(text):  # a Path would make a folder of that name
        raise UserError(f"a path must be on a disk, got {text}: mount the bucket")
    return disk.path(text)


def output_folder(text):
    """The Path of a folder to write; UserError where it is a file."""
    path = expand(text)
    if path.exists() and not path.is_dir():
        raise UserError(f"OUT must be a folder or new, got the file {path}")
    return path


def output_path(text):
    """The Path of a file to write; UserError where it cannot be written."""
    path = expand(text)
    if path.is_dir():
        raise UserError(f"out must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise UserError(f"out must be in a directory that exists, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"out must be where you may write, got {path}")
    return path


def _parse(values, required, takes):
    """Gives the flags their values; returns the words beside them."""
    values.set_gnu_getopt(True)  # flags may follow words
    arguments, path = _find_config(values)
    try:
        words = values(arguments)[1:]
    except (SyntaxError, ImportError) as error:
        raise UserError(f"config must be a Python file that runs, got {path}: {error}") from error
    except (KeyError, AttributeError) as error:
        raise UserError(_explain_field(error, path)) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_explain_value(error)) from error
    if takes is not None and len(words) != len(takes):
        raise UserError(f"takes {' '.join(takes) or 'flags only'}, got {' '.join(words)!r}")
    if takes and "" in words:
        raise UserError(f"{takes[words.index('')]} must not be empty")
    for name in required:
        if values[name].value is None:
            raise UserError(f"--{name} must be given")
    for name in values:
        value = values[name].value
        if value in ("", []):
            raise UserError(f"{name} must not be empty")
        if isinstance(value, str) and value.startswith("--"):  # `--vae --labels=1`
            raise UserError(f"{name} must have a value, got {value}")
    return words


def _find_config(values):
    """(sys.argv with the config as one argument, the path of its file or None)."""
    arguments = list(sys.argv)
    if "config" not in values:
        return arguments, None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if not equals and i + 1 < len(arguments):
            value = arguments.pop(i + 1)
        path, colon, variant = value.partition(":")
        if not path:
            raise UserError("config must not be empty")
        path = expand(path)
        if not path.is_file():
            raise UserError(f"config must be a Python file that exists, got {path}")
        # It says `from configs import base`: that folder's parent goes on the path.
        sys.path.insert(0, str(path.resolve().parent.parent))
        arguments[i] = f"--config={path}{colon}{variant}"
        return arguments, path
    return arguments, None


def _explain_field(error, path):
    """What is wrong in words, from an exception of ml_collections about a name."""
    text = str(error).strip('"')
    if "get_config" in text:
        return f"config must be a Python file with a get_config(), got {path}"
    if "attribute " in text.lower():
        return f"config has no such field: {text}"
    name = re.search(r"(?:Key \W*)?(\w+)", text)  # Key: one that the file itself would add
    meant = re.search(r"Did you mean \W*(\w+)", text)
    return f"config has no field {name[1]}" + (f"; did you mean {meant[1]}?" if meant else "")


def _explain_value(error):
    """What is wrong in words, from an exception of absl about a value."""
    flag, _, reason = str(error).removeprefix("flag --").partition(": ")
    name, _, value = flag.partition("=")
    if "as a ConfigDict" in reason:
        return f"{name} must be set field by field, as --{name}.FIELD=VALUE, got {value!r}"
    if "invalid literal for int" in reason:
        return f"{name} must be a whole number, got {value!r}"
    if "could not convert string to float" in reason:
        return f"{name} must be a number, got {value!r}"
    if "Non-boolean" in reason:
        return f"{name} must be true or false, got {value!r}"
    return error


def _is_from(error, folder):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(folder)


def _set_up_logging():
    """This package's messages as plain lines; of the libraries' only the warnings."""
    flags.FLAGS.mark_as_parsed()  # absl's own, which nobody sets
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.addFilter(_is_for_users)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _tell_unraisable


def _tell_unraisable(unraisable):
    """As Python does; but where one write fails, Orbax has the others complain of it one by one."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_for_users(record):
    """Ours, and warnings of libraries, but none that tells with a traceback what is raised too."""
    if record.pathname.startswith(PACKAGE):
        return True
    told_twice = record.exc_info or record.name.startswith(("gcsfs", "fsspec"))
    return record.levelno > 20 and not told_twice
