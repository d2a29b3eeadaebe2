"""Private or version-bound parts of other packages: the only file to mend when one of them changes.

The package supports jax 0.7.2 to 0.12, flax 0.11.2 to 0.12.12 and orbax-checkpoint 0.12.4 to
0.12.8. Each entry names the package, the versions it was checked with, and why the public API is
not enough. An entry imports its package itself: a command parses its flags before it imports jax.
"""

import asyncio
import contextlib
import functools
import glob
import inspect
import os
import re
import sys
import tempfile
import traceback
from logging import getLogger

from absl import flags, logging

from dit_jax.errors import UserError

# jax


def distributed_client():
    """The client of jax's coordination service; None before jax.distributed.initialize.

    jax 0.7.2 to 0.12. It has a key-value store that all processes share. jax.distributed can start
    the service but does not give access to the client. Orbax uses this private name too.
    """
    from jax._src import distributed

    return distributed.global_state.client


def process_allgather(x, *, tiled=False):
    """The value of x on every process, as NumPy: stacked, or concatenated if tiled.

    A global array that this process can address only in part becomes the whole array. jax 0.7.2 to
    0.12. jax.experimental may change without a deprecation; jax has no other all-gather for hosts.
    """
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=tiled))


def sync_processes(name):
    """Waits until every process has called it with the same name.

    jax 0.7.2 to 0.12. jax.experimental may change without a deprecation; jax has no other barrier.
    """
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def hybrid_device_grid(shape, slices, devices):
    """The devices of several TPU slices as an array for a Mesh, by slice along the first axis.

    shape: of the grid within a slice. jax 0.7.2 to 0.12. jax.make_mesh ignores slices; this
    function, which does not, is in jax.experimental and may change without a deprecation.
    """
    from jax.experimental import mesh_utils

    across = (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(
        shape, across, devices, allow_split_physical_axes=True
    )


def tpu_devices(topology, **options):
    """The devices of a TPU topology such as "v3:8x16" that need not exist, for libtpu's compiler.

    jax 0.7.2 to 0.12. jax.experimental may change without a deprecation; jax has no other way to
    compile for absent devices.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology, platform="tpu", **options).devices


def unusable_xla_flags():
    """Why XLA cannot read XLA_FLAGS, in a line; None if it can, or if they are not set.

    jaxlib 0.7.2 to 0.12. XLA aborts the process at its first use, so another process tries first: a
    fork, which takes 10 ms. `debug_options` reads the flags; the public API has nothing that does.
    """
    import jax  # noqa: F401, first: it limits what jaxlib logs
    from jaxlib import xla_client

    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(Exception):  # this process must end here
                os.dup2(errors.fileno(), 2)
                _ = xla_client.CompileOptions().executable_build_options.debug_options
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            return None
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
    return lines[0].partition("] ")[2] if lines else "XLA aborts"


def unusable_devices(error):
    """Why jax cannot use the devices that it was asked for, in a line; None for another error.

    jax 0.7.2 to 0.12. It raises RuntimeError, or AssertionError for JAX_PLATFORMS=cuda without a
    GPU, in a function with this name.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_assertion = last.name == "backends" and last.filename.endswith("xla_bridge.py")
    if not is_assertion and not str(error).startswith("Unable to initialize backend"):
        return None
    return " ".join(str(error).partition(" (")[0].split()) or "there is no GPU"


def unusable_variable(error):
    """The environment variable that jax cannot read, or None for another error.

    jax 0.7.2 to 0.12. `import jax` reads most of them, a backend the others. ValueError names the
    variable or, for a number, only its value.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not re.search(r"\bjax\W_src\b", frames[-1].filename):
        return None
    text = str(error)
    given = {k: x for k, x in os.environ.items() if k.startswith(("JAX", "XLA_"))}
    named = [name for name in given if re.search(rf"\b{name}\b", text, re.IGNORECASE)]
    if not named and re.search("config|xla_bridge", os.path.basename(frames[-1].filename)):
        named = [name for name, value in given.items() if repr(value)[1:-1] and repr(value) in text]
    return named[0] if named else None


def quiet_libtpu():
    """Keeps libtpu from printing errors on a machine without a TPU.

    libtpu 0.0.41. jax loads it wherever it is installed; it complains that it cannot find out which
    TPU this is, whatever its log level, unless these variables say so. jax 0.7.2 logs the failure.
    """
    getLogger("jax._src.xla_bridge").setLevel("WARNING")
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        for name, value in {
            "TPU_ACCELERATOR_TYPE": "v3-8",  # any type
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_SKIP_MDS_QUERY": "1",
        }.items():
            os.environ.setdefault(name, value)


def partitionable_threefry():
    """An `impl` of jax.random.key: threefry2x32 with JAX_THREEFRY_PARTITIONABLE always on.

    jax 0.7.2 to 0.12. jax reads that setting when it lowers a program, so a context around the
    code that draws numbers has no effect. Every implementation that jax names obeys the setting;
    jax.extend, which makes others, may change without a deprecation.
    """
    import jax
    from jax.extend import random as extend_random

    base = extend_random.threefry_prng_impl

    def fixed(function):
        @functools.wraps(function)
        def call(*args):
            with jax.threefry_partitionable(True):
                return function(*args)

        return call

    return extend_random.define_prng_impl(
        key_shape=base.key_shape,
        seed=base.seed,
        split=fixed(base.split),
        random_bits=fixed(base.random_bits),
        fold_in=base.fold_in,
        name="dit_jax_threefry2x32",
        tag="dit",
    )


@contextlib.contextmanager
def default_arithmetic():
    """A context for calls of optax: 32 bits, and implicit promotion of types and ranks.

    jax 0.7.2 to 0.12, optax 0.2.8. Adam states no dtypes: JAX_ENABLE_X64 would change its numbers,
    and it fails with JAX_NUMPY_DTYPE_PROMOTION=strict. Before jax 0.8, enable_x64 was in
    jax.experimental only.
    """
    import jax

    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with (
        x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


# optax


def muon(rate, **options):
    """optax.contrib.muon; UserError if this optax has none for stacked kernels.

    optax 0.2.7 and 0.2.8. contrib may change without a deprecation. 0.2.5 knows no dimension
    numbers and 0.2.6 no consistent_rms.
    """
    import optax

    known = inspect.signature(optax.contrib.muon).parameters
    if missing := [name for name in options if name not in known]:
        raise UserError(
            f"optimizer must be adamw with optax {optax.__version__}, got 'muon', which needs "
            f"{missing[0]}: pip install 'optax>=0.2.8'"
        )
    return optax.contrib.muon(rate, **options)


# etils, TensorStore

# How an exception of TensorStore begins if the bucket refused access or could not be reached.
# tensorstore 0.1.86. It raises ValueError for every failure, so only the text tells them apart.
# "ABORTED: All 32 retry attempts failed" is a server that does not answer.
TENSORSTORE_REFUSALS = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED: All",
)


def keep_etils_off_tensorflow():
    """Makes etils reach buckets with gcsfs even if TensorFlow is installed.

    etils 1.15. With TensorFlow, epath raises TensorFlow's exceptions, which `machine.disk` does not
    recognise. etils offers no setting but this undocumented environment variable.
    """
    os.environ.setdefault("EPATH_USE_TF", "no")


def list_buckets_afresh():
    """Makes every listing of a bucket ask the server, so that it shows other processes' writes.

    fsspec 2026.9, gcsfs 2026.10. gcsfs caches listings for ever; etils opens the file system and
    passes no options, so the default for all of fsspec's "gcs" file systems has to change.
    """
    import fsspec  # only buckets need it

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


# orbax-checkpoint


@functools.cache
def _array_readers():
    """Orbax's registry of handlers that let every read in progress end when one fails.

    orbax-checkpoint 0.12.4 to 0.12.8. Orbax closes the event loop at the first failure, and the
    reads that still run then print errors. Its handlers are made to be subclassed; their use of one
    event loop is not documented.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    class FinishReads:
        async def deserialize(self, infos, args=None):
            return await self._finish(super().deserialize(infos, args))

        async def metadata(self, infos):
            return await self._finish(super().metadata(infos))

        async def _finish(self, read):
            before = asyncio.all_tasks()
            try:
                return await read
            except Exception:
                if running := asyncio.all_tasks() - before:
                    await asyncio.wait(running)
                raise

    class DeviceReads(FinishReads, ocp.type_handlers.ArrayHandler):
        """Reads to devices."""

    class HostReads(FinishReads, ocp.type_handlers.NumpyHandler):
        """Reads to NumPy."""

    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, DeviceReads()), (np.ndarray, HostReads())
    )


def tree_reader(template=None):
    """An Orbax handler that reads trees such as `template`, and ends cleanly if a read fails.

    orbax-checkpoint 0.12.4 to 0.12.8. Orbax holds each read twice in memory, so concurrent reads
    are limited to the largest leaf, or 200 MB if that is more.
    """
    import jax
    import orbax.checkpoint as ocp

    largest = max((x.size * x.dtype.itemsize for x in jax.tree.leaves(template)), default=0)
    return ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=max(0.2, 1.01 * largest / 1e9),  # must exceed the largest request
        type_handler_registry=_array_readers(),
    )


def hide_harmless_exceptions():
    """Hides two exceptions that reach only sys.unraisablehook; all others are printed.

    orbax-checkpoint 0.12.4 to 0.12.8: "Event loop is closed", for writes that run on after one
    failed. jax 0.7.2 to 0.12: KeyboardInterrupt in XLA's garbage-collection callback, which drops
    it; `cli.interrupt` raises it again.
    """
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


def _print_unraisable(unraisable):
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt) and str(error) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


# absl and ml_collections


def log_plainly(is_for_users):
    """absl's log as plain lines on stderr, filtered by is_for_users(record).

    absl-py 2.5. The handler exists before its flags are parsed, which absl asks for although nobody
    sets them; it has no option for the format.
    """
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.addFilter(is_for_users)


def unknown_config_field(error):
    """The field that a config lacks, from an exception of ml_collections; None if it is no config.

    ml_collections 1.1. It raises KeyError and AttributeError with pages of text.
    """
    text = str(error).strip('"')
    if "get_config" in text:
        return None
    name = re.search(r"attribute '(\w+)'", text) or re.search(r"(?:Key \W*)?(\w+)", text)
    return name[1]  # "Key": if the file itself sets the field


def explain_flag_error(error, values):
    """What is wrong with a flag's value, in words, from absl's IllegalFlagValueError.

    values: the FlagValues. absl-py 2.5, ml_collections 1.1. absl's own text differs from type to
    type, and its parsers do not document the attributes that bound a value.
    """
    flag, _, reason = str(error).removeprefix("flag --").partition(": ")
    name, _, value = flag.partition("=")
    if "as a ConfigDict" in reason:
        return f"--{name} must be set field by field, as --{name}.FIELD=VALUE, got {value!r}"
    parser = values[name].parser if name in values else None
    if hasattr(parser, "enum_values"):
        rule = f"one of {', '.join(parser.enum_values)}"
    elif "Non-boolean" in reason:
        rule = "true or false"
    elif isinstance(parser, (flags.IntegerParser, flags.FloatParser)):
        kind = "a whole number" if isinstance(parser, flags.IntegerParser) else "a number"
        rule = kind + _explain_bounds(parser.lower_bound, parser.upper_bound)
    else:
        return f"--{name} must be another value, got {value!r}: {reason}"
    return f"--{name} must be {rule}, got {value if _is_number(value) else repr(value)}"


def _explain_bounds(least, most):
    if most is None:
        return "" if least is None else f" of at least {least}"
    return f" of at most {most}" if least is None else f" in {least} .. {most}"


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
