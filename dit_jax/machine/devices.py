"""Facts about the devices: their peak FLOP/s, their names, and their memory."""

import contextlib
import math
import os
import resource
from pathlib import Path

import jax

from dit_jax.errors import UserError

# Dense bfloat16 FLOP/s of one JAX device, by a part of its device_kind; the first match counts.
# Sources: Google Cloud's TPU pages and NVIDIA's data sheets. On TPU v2, v3 and 7x a JAX device is a
# core, half a chip.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}


CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
LESS_MEMORY = (
    "lower train.batch_size, raise train.accumulation_steps, or set compute.remat to dots or full"
)


def peak_flops(kind):
    """Dense bfloat16 FLOP/s of a device of this kind, None if PEAK_FLOPS does not list it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def total_peak_flops():
    """The sum of `peak_flops` over all devices, None if they are not listed."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


def describe():
    """The number and kind of the devices, for example "8 x TPU v4"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def attentions(dtype, *, forward=False):
    """The attentions that can run on these devices, the usual one first.

    "cudnn" needs a GPU and bfloat16. forward: a loss takes a jvp, which cuDNN has not.
    """
    return ("cudnn", "xla") if _fits_cudnn(dtype) and not forward else ("xla",)


def _fits_cudnn(dtype):
    return jax.default_backend() == "gpu" and dtype == "bfloat16"


def resolve_attention(name, dtype, *, forward=False):
    """The attention to use on these devices; UserError if "cudnn" cannot run here.

    "auto" is the first of `attentions`. Any other name is returned: `models.dit.make_apply` checks
    it.
    """
    if name == "auto":
        return attentions(dtype, forward=forward)[0]
    if name == "cudnn" and not _fits_cudnn(dtype):
        raise UserError(
            "attention can be 'cudnn' only on a GPU in bfloat16, "
            f"got 'cudnn' on {jax.default_backend()} in {dtype}"
        )
    return name


def resolve_product(devices=None):
    """How linears multiply on these devices, by default jax's: a name in `models.layers.PRODUCTS`.

    "flat" on CPUs, where the program is faster, and "batched" elsewhere.
    """
    devices = jax.devices() if devices is None else devices
    return "flat" if devices[0].platform == "cpu" else "batched"


def peak_memory():
    """Peak memory so far in bytes, of the fullest local device; on a CPU, of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(entry["peak_bytes_in_use"] for entry in stats)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def host_memory():
    """The memory of this host in bytes, or what its control group may use, if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # there is none, or it says "max"
        return total


def memory_limit():
    """The memory of the smallest local device in bytes. CPU devices share the host's memory."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return min(entry.get("bytes_limit", math.inf) for entry in stats)
    return host_memory() // jax.local_device_count()


def needed_memory(compiled):
    """{what: bytes} that a compiled program needs on each device, None if that is unavailable."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes  # donated inputs are reused
    sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes, new
    return dict(zip(("arguments", "temporaries", "outputs"), sizes, strict=True))


def check_memory(compiled):
    """UserError if a compiled program needs more memory than a device has."""
    needed, limit = sum((needed_memory(compiled) or {}).values()), memory_limit()
    if needed > limit:
        raise UserError(
            f"a step must fit into the memory of a device, {limit / 1e9:.3g} GB, got "
            f"{needed / 1e9:.3g} GB: {LESS_MEMORY}"
        )


@contextlib.contextmanager
def explained_memory():
    """A context in which a lack of the devices' memory is a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a step must fit into the memory of a device: {LESS_MEMORY}: {reason}"
        ) from error
