"""What all commands share: flags, one-line errors and exit codes.

0 done, 2 wrong use, 3 training diverged, 42 stopped (start it again), 130 Ctrl-C, 141
the reader of the output has gone.
"""

import os
import signal
import sys
from pathlib import Path

from absl import flags, logging

from dit_jax import compat, settings
from dit_jax.cli import arguments, interrupt
from dit_jax.errors import UserError
from dit_jax.machine import allocator, disk, peers

CLUSTER = ("coordinator", "num_processes", "process_id")
PACKAGE = str(Path(__file__).parents[1])
MAX_CROP = 4096  # pixels: with the flips, a batch of 32 such crops takes 3 GB before it is encoded


def run(
    name, define, main, *, check=None, required=(), words=(), takes=(), stopped=130, uses_jax=True
):
    """Defines and parses the flags, calls main(values, *positional) and returns the exit code.

    check(values, *positional) is called before, while jax is not imported: it raises for what is
    wrong whatever the checkpoint holds, so that a mistake is reported at once.
    required: flags that must be given. words: flags that can be given as words, in this order.
    takes: the names of the other positional arguments, which come first; None: any number. stopped:
    the exit code after SIGINT or SIGTERM, which end the process at once unless main calls
    `interrupt.raise_from_here`.

    A UserError, an OSError, a MemoryError, a bucket's refusal, and devices or environment variables
    that jax cannot use become one line on stderr and exit code 2. Any other exception is a bug and
    keeps its traceback.
    """
    handlers = interrupt.listen(name, stopped)
    compat.log_plainly(_is_for_users)
    compat.hide_harmless_exceptions()
    values = flags.FlagValues()
    define(values)
    try:
        if arguments.HELP & set(sys.argv[1:]):
            print(f"{sys.modules[main.__module__].__doc__}\n{arguments.describe(values)}")
            return 0
        rules = {"required": required, "words": words, "takes": takes}
        return _run(name, values, check, main, uses_jax, **rules)
    except KeyboardInterrupt:
        interrupt.arrived()
        return fail(name, "interrupted", code=130)
    except BrokenPipeError:  # `| head`: the output that is left goes to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        return fail(name, _name_buckets(values, error))
    except MemoryError as error:
        return fail(name, f"this needs more memory than this host has: {_show_reason(error)}")
    except Exception as error:
        if disk.is_refusal(error):
            return fail(name, _name_buckets(values, error))
        if reason := compat.unusable_devices(error):
            return fail(name, _explain_devices(reason))
        if variable := compat.unusable_variable(error):
            return fail(name, _explain_variable(variable, error))
        raise
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _name_buckets(values, error):
    """An error, with the first argument in a bucket if the client of buckets raised it."""
    if not disk.is_of_bucket(error):
        return error
    given = {name: values[name].value for name in values}
    found = [f"{name} {text}" for name, text in given.items() if str(text).startswith(disk.BUCKETS)]
    found += [word for word in sys.argv[1:] if word.startswith(disk.BUCKETS)]
    return f"{found[0]} must be in a bucket that answers: {error}" if found else error


def _show_reason(error):
    return " ".join(str(error).split()) or type(error).__name__


def _run(name, values, check, main, uses_jax, **rules):
    try:
        positional = arguments.parse(values, **rules)
    except (flags.Error, ValueError, TypeError) as error:  # a config raises any of them
        return fail(name, error)
    if check:
        check(values, *positional)
    if uses_jax:
        _prepare_jax()
    if "coordinator" in values:
        _join(values)
    code = main(values, *positional) or 0
    sys.stdout.flush()
    return code


def _prepare_jax():
    """UserError for XLA_FLAGS that would abort the process; keeps memory, and libtpu quiet."""
    if "jax" in sys.modules:  # a program that calls commands: it has read them already
        return
    text = os.environ.get("XLA_FLAGS")
    if text and (reason := compat.unusable_xla_flags()):
        raise UserError(f"XLA_FLAGS must be flags that this XLA knows, got {text!r}: {reason}")
    compat.quiet_libtpu()
    allocator.keep_memory()


def _explain_devices(reason):
    if platforms := os.environ.get("JAX_PLATFORMS"):
        rule = "must name devices that this machine has, and that are free"
        return f"JAX_PLATFORMS {rule}, got {platforms!r}: {reason}"
    return f"the devices of this machine cannot be used: {reason}"


def _explain_variable(name, error):
    reason = " ".join(str(error).split())
    return f"{name} must be a value that jax knows, got {os.environ[name]!r}: {reason}"


def define_cluster(values):
    """Defines the flags of a command that several processes may run together."""
    options = {"flag_values": values}
    address = "host:port of process 0; not needed on TPU pods and in Slurm."
    number = "This process's number, from 0, with --coordinator."
    flags.DEFINE_string("coordinator", None, address, **options)
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", lower_bound=1, **options)
    flags.DEFINE_integer("process_id", None, number, lower_bound=0, **options)


def define_size(values, default, text):
    """Defines the flag size: of crops, in pixels."""
    bounds = {"lower_bound": 1, "upper_bound": MAX_CROP}
    flags.DEFINE_integer("size", default, text, **bounds, flag_values=values)


def define_seed(values):
    options = {"lower_bound": 0, "upper_bound": settings.MAX_SEED, "flag_values": values}
    flags.DEFINE_integer("seed", 0, "Of the noise.", **options)


def has_peers(values):
    """Whether other processes run this command too, for a command with `define_cluster`."""
    return any(values[name].present for name in CLUSTER) or peers.are_found()


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


def check_exists(name, text):
    """UserError unless there is a file or folder at a path on a disk."""
    if not expand(text).exists():
        raise UserError(f"{name} must exist, got {text}")


def output_folder(text, *, writes=True):
    """The Path of a folder to write; UserError if it is a file or, with writes, read-only."""
    path = expand(text)
    if writes:
        disk.check_writable(path, "OUT")
    if path.exists() and not path.is_dir():
        raise UserError(f"OUT must be a folder or new, got the file {path}")
    return path


def output_path(text, suffix="", *, name="out"):
    """The Path of a file to write; UserError if it cannot be written or ends otherwise.

    suffix: of a command that replaces the file, so that a mistyped OUT is no file of another kind.
    name: of the argument.
    """
    path = expand(text)
    disk.check_writable(path, name)
    if path.is_dir():
        raise UserError(f"{name} must be a file, got the directory {path}")
    if not path.parent.is_dir():
        raise UserError(f"{name} must be in a directory that exists, got {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{name} must be where you may write, got {path}")
    if not path.name.endswith(suffix):
        raise UserError(f"{name} must end with {suffix}, got {path}")
    return path


def _is_for_users(record):
    """True for this package's messages and for libraries' warnings.

    It hides library warnings that repeat a raised exception.
    """
    if record.pathname.startswith(PACKAGE):
        return True
    repeats = record.exc_info or record.name.startswith(("gcsfs", "fsspec"))
    return record.levelno > 20 and not repeats
