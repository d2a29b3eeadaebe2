"""Plans a training step for absent TPUs: libtpu compiles for them on any CPU.

All times are estimates, not measurements. The compiler notes the cycles that it expects for each
instruction of one device; their sum divided by the clock is the time of computation. It notes none
for collectives, so the time of communication is their bytes divided by the rate of the links. A
step with overlap takes the longer of the two, and without overlap their sum.
"""

import importlib.util
import math
import os
import time
from collections import Counter
from typing import NamedTuple

import jax

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import devices as machine
from dit_jax.machine import prng, sharding
from dit_jax.planning import chips, hlo

REMAT = ("none", "dots", "full")  # most memory first


class Target(NamedTuple):
    """The TPUs to compile for."""

    topology: str
    chip: chips.Chip
    devices: list

    @property
    def peak_flops(self):
        """Dense bfloat16 FLOP/s of a device."""
        return machine.peak_flops(self.devices[0].device_kind)

    @property
    def clock(self):
        """Cycles per second, derived from the peak and the matrix units."""
        return self.peak_flops / self.chip.flops_per_cycle


def make_target(topology):
    """The Target of a topology as "v3:8x16": a generation and the chips along each side.

    UserError if it is unknown, or if libtpu is missing or too old for it.
    """
    name, extents = chips.parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("topology needs libtpu, which is missing: pip install -e .[tpu]")
    _prepare_libtpu()
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    if math.prod(extents) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = compat.tpu_devices(topology, **options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        if "Invalid TPU external name" in str(error):
            raise UserError(f"topology {topology} needs a newer libtpu and jax") from error
        chips.refuse(topology)
    return Target(topology, chips.CHIPS[name], found)


def _prepare_libtpu():
    """Sets libtpu up, before it is loaded, to compile only.

    It then neither queries a metadata server nor takes the lock of a running program.
    """
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")  # any type: the topology is set later


def arguments(state, batch, mesh):
    """The arguments of a training step as ShapeDtypeStructs: the state, the batch and a key.

    state: with shardings. batch: {name: (shape, dtype)} of the global batch.
    """
    rows, replicated = sharding.of_batch(mesh), sharding.replicated(mesh)
    key = jax.eval_shape(lambda: prng.key(0))
    return (
        state,
        {name: jax.ShapeDtypeStruct(*x, sharding=rows) for name, x in batch.items()},
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated),
    )


def num_bytes(tree):
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def make(step, args, target, *, model_flops):
    """The figures of a jitted training step, or of a sampling, on a Target, as plain JSON values.

    args: of `arguments`, or others; the first is the state. model_flops: FLOPs of one step without
    recomputation. "fits" says whether the step fits the memory; memory_gb are of one device, in 1e9
    bytes; times are in seconds.
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
    """Memory of one device in GB (1e9 bytes), from a compiled program's statistics."""
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes  # the state is updated in place
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": new,
        "code": stats.generated_code_size_in_bytes,
    }
    parts = {name: size / 1e9 for name, size in parts.items()}
    return parts | {"total": sum(parts.values()), "limit": limit_gb}


def estimate(program, target, model_flops):
    """Times of a step in seconds, MFU and collectives, from a compiled program."""
    rate = target.chip.link_rate / target.chip.devices
    arithmetic = program.cycles.total() / target.clock
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
        "arithmetic_seconds": {
            kind: cycles / target.clock for kind, cycles in program.cycles.most_common()
        },
        "estimated_mfu": {
            name: model_flops / (seconds[name] * peak)
            for name in ("arithmetic", "with_overlap", "without_overlap")
        },
        "link_bytes_per_second": rate,
        "collectives": summarize(program.collectives),
    }


def summarize(collectives):
    """[{kind, group, count, bytes, wire_bytes}] of one device and step, largest first."""
    count, given, sent = Counter(), Counter(), Counter()
    for each in collectives:
        key = each.kind, each.group
        count[key] += each.count
        given[key] += each.num_bytes * each.count
        sent[key] += each.wire_bytes * each.count
    return [
        {"kind": kind, "group": group, "count": count[kind, group]}
        | {"bytes": given[kind, group], "wire_bytes": round(size)}
        for (kind, group), size in sent.most_common()
    ]


def count_flops(jaxpr):
    """FLOPs of the products in a jaxpr: of all iterations of a loop, of the largest branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in equation.params["branches"])
            continue
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        iterations = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                total += iterations * count_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def advise(figures, *, mesh, remat, shard_optimizer):
    """The settings to change if the step does not fit, as lines; [] if it fits.

    mesh: {"data", "fsdp", "tensor"}, sizes of the axes.
    """
    if figures["fits"]:
        return []
    memory, lines = figures["memory_gb"], []
    if memory["arguments"] > memory["limit"] / 2 and mesh["data"] > 1:
        size = f"the state takes {memory['arguments']:.1f} of {memory['limit']:.1f} GB"
        lines.append(f"{size}: raise config.mesh.fsdp, which shards all of it")
        if not shard_optimizer:
            lines.append("set config.mesh.shard_optimizer=true: three quarters of it are sharded")
    if remat != REMAT[-1]:
        stronger = REMAT[REMAT.index(remat) + 1]
        lines.append(f"set config.compute.remat={stronger}: fewer activations are stored")
    lines.append("raise config.mesh.tensor: activations inside a block are sharded")
    lines.append("raise config.train.accumulation_steps: fewer examples at a time")
    return lines


def meshes(count, *, heads, width, batch_size):
    """The meshes worth trying with so many devices, as dicts of data, fsdp and tensor.

    tensor is at most 8 and divides the heads and the width of the MLP; the batch is divided evenly.
    fsdp is at most 16: with 32, each shard would have 36 of XL's 1152 rows, not a multiple of the
    tile of 8, and the copies would be slow.
    """
    found = []
    for tensor in (1, 2, 4, 8):
        rest = count // tensor
        if count % tensor or heads % tensor or width % tensor or batch_size % rest:
            continue
        for fsdp in sorted({1, 4, 8, 16, min(rest, 16)}):
            if rest % fsdp == 0:
                found.append({"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor})
    return found


def rank(rows):
    """Rows of figures, best first: those that fit, by time with overlap, then without."""

    def order(row):
        seconds = row.get("estimated_seconds", {})
        times = [seconds.get(name, math.inf) for name in ("with_overlap", "without_overlap")]
        return not row["fits"], *times

    return sorted(rows, key=order)


def as_flags(changes):
    """The flags of a command that make these changes."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())
