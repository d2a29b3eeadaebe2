"""Plans a training step for TPUs that are not there: libtpu compiles for them on any CPU.

Every time here is an estimate and no measurement. The compiler notes the cycles that it expects of
each instruction of one device; their sum over the clock is the time of the arithmetic. It notes
none for collectives, so their bytes over the rate of the links stand beside it: with overlap the
longer of the two counts, without overlap their sum.
"""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from typing import NamedTuple

import jax

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import devices as machine
from dit_jax.machine import sharding
from dit_jax.planning import hlo

GIB = 2**30


class Chip(NamedTuple):
    """A generation of TPUs; a device is what JAX calls so, a core or a whole chip.

    memory: bytes of a device. flops_per_cycle: of the matrix units of a device, in bfloat16.
    link_rate: bytes/s that a chip can send over all its links together, one way.
    sides: of a topology. example: one of the topologies.
    """

    devices: int
    memory: float
    flops_per_cycle: int
    link_rate: float
    sides: int
    example: str


# memory: Google Cloud's pages of each version (cloud.google.com/tpu/docs/v3 and its neighbours),
# less where the compiler gives less (v6e 31.5, tpu7x 95 GiB).
# flops_per_cycle: two for each cell of the matrix units of 128 x 128, from v6e on 256 x 256; v6e
# and tpu7x with four of them a device, which their peaks ask for and the compiler's cycles too.
# The clock that follows from the peak is 687, 938, 1049, 1503, 1751, 1750 and 2200 MHz; published
# are 700, 940 and 1050 for the first three (Jouppi et al. 2020, doi:10.1145/3360307, and 2023,
# arXiv:2304.01433).
# link_rate: v2 4 links of 496 Gbit/s (Jouppi et al. 2020); v3 4 of 70 GB/s and v4 6 of 50 GB/s
# (Jouppi et al. 2023, table 4; the older paper has 656 Gbit/s, 82 GB/s, for v3); later ones half of
# the "bidirectional ICI bandwidth per chip" on Google's pages.
CHIPS = {
    "v2": Chip(2, 8 * GIB, 2 * 1 * 128**2, 4 * 62e9, 2, "v2:2x2"),
    "v3": Chip(2, 16 * GIB, 2 * 2 * 128**2, 4 * 70e9, 2, "v3:8x16"),
    "v4": Chip(1, 32 * GIB, 2 * 8 * 128**2, 6 * 50e9, 3, "v4:2x2x4"),
    "v5e": Chip(1, 16 * GIB, 2 * 4 * 128**2, 200e9, 2, "v5e:4x4"),
    "v5p": Chip(1, 95 * GIB, 2 * 8 * 128**2, 600e9, 3, "v5p:2x2x2"),
    "v6e": Chip(1, 31.5 * GIB, 2 * 4 * 256**2, 400e9, 2, "v6e:2x4"),
    "tpu7x": Chip(2, 95 * GIB, 2 * 4 * 256**2, 600e9, 3, "tpu7x:2x2x1"),
}
REMAT = ("none", "dots", "full")  # most memory first


class Target(NamedTuple):
    """The TPUs to compile for."""

    topology: str
    chip: Chip
    devices: list

    @property
    def peak_flops(self):
        """Dense bfloat16 FLOP/s of a device."""
        return machine.peak_flops(self.devices[0].device_kind)

    @property
    def clock(self):
        """Cycles per second, as the peak and the matrix units say it."""
        return self.peak_flops / self.chip.flops_per_cycle


def make_target(topology):
    """The Target of a topology as "v3:8x16": a generation and the chips along each side.

    UserError where it is unknown or libtpu is not installed.
    """
    name, _, sides = topology.partition(":")
    chip = CHIPS.get(name)
    extents = [int(side) for side in re.findall(r"[1-9]\d*", sides)]
    known = chip and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sides) and len(extents) == chip.sides
    examples = ", ".join(chip.example for chip in CHIPS.values())
    wrong = (
        f"topology must be a generation and the chips along each side, as {examples}, of a size "
        f"that is built, got {topology!r}"
    )
    if not known:
        raise UserError(wrong)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("topology needs libtpu, which is missing: pip install -e .[tpu]")
    _hush_libtpu()
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    if math.prod(extents) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = compat.tpu_devices(topology, **options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(wrong) from error
    return Target(topology, chip, found)


def _hush_libtpu():
    """Tells libtpu, before it is loaded, that it only compiles.

    It then asks nobody which machine this is, and takes no lock that a program at work may hold.
    """
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")  # any: the topology is told later


def arguments(state, batch, mesh):
    """What a training step takes, as ShapeDtypeStructs: the state, the batch and a key.

    state: with shardings. batch: {name: (shape, dtype)} of the global batch.
    """
    rows, everywhere = sharding.of_batch(mesh), sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return (
        state,
        {name: jax.ShapeDtypeStruct(*x, sharding=rows) for name, x in batch.items()},
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
    )


def num_bytes(tree):
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def make(step, args, target, *, model_flops):
    """The figures of a jitted training step on a Target, as plain JSON values.

    args: as `arguments` gives them. model_flops: of one step, without what is computed twice.
    memory_gb (1e9 bytes, of one device), seconds, bytes; "fits" says whether it can run.
    """
    state_gb, limit_gb = num_bytes(args[0]) / 1e9, target.chip.memory / 1e9
    traced = step.trace(*args)
    figures = {
        "topology": target.topology,
        "devices": len(target.devices),
        "device_kind": target.devices[0].device_kind,
        "flops_model": model_flops,
        "flops_program": count_flops(traced.jaxpr.jaxpr),
    }
    started = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = {"arguments": state_gb, "limit": limit_gb}
        return figures | {"fits": False, "memory_gb": memory}
    figures["compile_seconds"] = time.perf_counter() - started
    figures["memory_gb"] = memory = read_memory(compiled.memory_analysis(), limit_gb)
    figures["fits"] = memory["total"] <= limit_gb
    return figures | estimate(hlo.read(compiled.as_text()), target, model_flops)


def read_memory(stats, limit_gb):
    """GB (1e9 bytes) of one device, from a compiled program's statistics."""
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the state stays in its place
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": fresh,
        "code": stats.generated_code_size_in_bytes,
    }
    parts = {name: size / 1e9 for name, size in parts.items()}
    return parts | {"total": sum(parts.values()), "limit": limit_gb}


def estimate(program, target, model_flops):
    """Times of a step, in seconds, MFU, and the collectives, from a compiled program."""
    rate = target.chip.link_rate / target.chip.devices
    arithmetic = program.cycles / target.clock
    links = sum(each.wire_bytes * each.count for each in program.collectives) / rate
    seconds = {
        "arithmetic": arithmetic,
        "links": links,
        "with_overlap": max(arithmetic, links),
        "without_overlap": arithmetic + links,
    }
    peak = target.peak_flops * len(target.devices)
    return {
        "estimated_seconds": seconds,
        "estimated_mfu": {
            name: model_flops / (seconds[name] * peak)
            for name in ("arithmetic", "with_overlap", "without_overlap")
        },
        "link_bytes_per_second": rate,
        "collectives": summarize(program.collectives),
    }


def summarize(collectives):
    """[{kind, group, count, bytes, wire_bytes}] of a step of one device, most bytes first."""
    count, given, sent = Counter(), Counter(), Counter()
    for each in collectives:
        place = each.kind, each.group
        count[place] += each.count
        given[place] += each.num_bytes * each.count
        sent[place] += each.wire_bytes * each.count
    return [
        {"kind": kind, "group": group, "count": count[kind, group]}
        | {"bytes": given[kind, group], "wire_bytes": round(size)}
        for (kind, group), size in sent.most_common()
    ]


def count_flops(jaxpr):
    """FLOPs of the products of matrices in a jaxpr, all turns of its loops counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                total += turns * count_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def advise(figures, *, mesh, remat, shard_optimizer):
    """Which switches of a config help where the step does not fit, as lines; none where it fits.

    mesh: {"data", "fsdp", "tensor"}, sizes of the axes.
    """
    if figures["fits"]:
        return []
    memory, lines = figures["memory_gb"], []
    if memory["arguments"] > memory["limit"] / 2 and mesh["data"] > 1:
        size = f"the state takes {memory['arguments']:.1f} of {memory['limit']:.1f} GB"
        lines.append(f"{size}: raise config.mesh.fsdp, which divides all of it")
        if not shard_optimizer:
            lines.append("set config.mesh.shard_optimizer=true: three quarters of it are divided")
    if remat != REMAT[-1]:
        stronger = REMAT[REMAT.index(remat) + 1]
        lines.append(f"set config.compute.remat={stronger}: fewer activations are kept")
    lines.append("raise config.mesh.tensor: activations inside a block are divided")
    lines.append("raise config.train.accumulation_steps: fewer examples at a time")
    return lines


def meshes(count, *, heads, batch_size):
    """The sensible meshes of so many devices, as dicts of data, fsdp and tensor.

    tensor is at most 8 and divides the heads; the batch is divided evenly. fsdp is at most 16: of
    32, each would have 36 of XL's 1152 rows, which are no whole tiles of 8, and copies cost much.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        rest = count // tensor
        if count % tensor or heads % tensor or batch_size % rest:
            continue
        for fsdp in sorted({1, 4, 8, 16, min(rest, 16)}):
            if rest % fsdp == 0:
                found.append({"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor})
    return found


def rank(rows):
    """Rows of figures, best first: those that fit, by the time with overlap, then without."""

    def order(row):
        seconds = row.get("estimated_seconds", {})
        times = [seconds.get(name, math.inf) for name in ("with_overlap", "without_overlap")]
        return not row["fits"], *times

    return sorted(rows, key=order)
