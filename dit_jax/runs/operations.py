"""Times the operations of a DiT's blocks one by one, forward and backward, and the update.

Shapes: N batch, T tokens, D hidden size, K heads, F width of the MLP.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dit_jax import compat
from dit_jax.convert import files, torch_dit
from dit_jax.machine import devices, prng
from dit_jax.models import attention, dit, fields, layers
from dit_jax.runs import bench, build
from dit_jax.train import ema

UPDATE = "update"
HEADER = "operation    times    ms each    of the step"
PEER_HEADER = "   torch ms     speedup"


class Operation(NamedTuple):
    """apply(*arrays of these shapes) -> an array; a training step does it `count` times."""

    apply: Callable
    shapes: tuple
    count: int


def measure(settings, *, repeats, warmup, peer):
    """The figures of the operations of a training step on the first device; prints a row for each.

    rows: [{"operation", "count", "seconds_median" of one, "share" of the step}]. An operation is
    timed with the gradients of all its inputs; "update" is the optimizer and the EMA. "rest" is
    what the others leave of the step: embedders, the loss, copies, and what `compute.remat`
    computes twice. It is below 0 where XLA gains more than that by fusing operations. peer: also
    those of PyTorch, eager, in turn with ours: "torch_seconds_median" and "dit_jax_over_torch", how
    many times as fast ours is. The blocks must be the paper's with adaLN-Zero.
    """
    if peer:
        torch_dit.check(dit.configure(**vars(settings.model)))
        files.require("torch")
        bench.leave_memory()
    given = make(settings)
    seconds = {}
    with devices.explained_memory():
        step = time_step(settings, repeats, warmup)
        for name in (*given, UPDATE):
            runs = {"dit_jax": prepare(name, given, settings)}
            runs |= {"torch": prepare_peer(name, given, settings)} if peer else {}
            times, _ = bench.time_in_turn(runs, repeats, warmup)
            seconds[name] = {who: statistics.median(each) for who, each in times.items()}
    counts = {name: each.count for name, each in given.items()} | {UPDATE: 1}
    rows = make_rows(step, seconds, counts)
    print(HEADER + (PEER_HEADER if peer else ""))
    print("\n".join(map(row, rows)))
    return {
        "what": "operations",
        **bench.describe(settings),
        "batch_size": settings.train.batch_size,
        "step_seconds_median": step,
        "rows": rows,
    }


def time_step(settings, repeats, warmup):
    """The median of the seconds of a training step; frees its memory."""
    runs = {"step": bench.prepare_train(settings, jax.devices()[:1]).run}
    return statistics.median(bench.time_in_turn(runs, repeats, warmup)[0]["step"])


def make(settings):
    """{name: Operation} of the blocks of a training step."""
    model, n = dit.configure(**vars(settings.model)), settings.train.batch_size
    t, d, blocks = model.num_tokens, model.hidden_size, model.num_blocks
    width = fields.mlp_width(model.mlp, d)
    x, condition, wide = (n, t, d), (n, 1, d), (n, t, width)
    heads = (n, t, model.num_heads, d // model.num_heads)
    name = devices.resolve_attention(settings.compute.attention, settings.compute.dtype)

    def linear_of(x, size):
        return Operation(_linear(x[-1], size, settings), (x, (x[-1], size), (size,)), blocks)

    return {
        "norm": Operation(_normalise, (x, condition, condition), 2 * blocks),
        "qkv": linear_of(x, 3 * d),
        "attention": Operation(attention.ATTENTIONS[name], (heads,) * 3, blocks),
        "proj": linear_of(x, d),
        "fc1": linear_of(x, width),
        "gelu": Operation(_gelu, (wide,), blocks),
        "fc2": linear_of(wide, d),
        "residual": Operation(_add, (x, condition, x), 2 * blocks),
        "modulation": linear_of(condition, 6 * d),
    }


def _linear(inputs, outputs, settings):
    """apply(x, kernel, bias) of a linear of the blocks."""
    options = {"dot_general": layers.PRODUCTS[devices.resolve_product()]}
    options["dtype"] = layers.DTYPES[settings.compute.dtype]

    def make():
        return layers.Linear(inputs, outputs, rngs=nnx.Rngs(prng.key(0)), **options)

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    return lambda x, kernel, bias: nnx.merge(graphdef, {"kernel": kernel, "bias": bias})(x)


def _normalise(x, shift, scale):
    return layers.modulate(layers.layer_norm(x), shift, scale)


def _gelu(x):
    return nnx.gelu(x, approximate=True)


def _add(x, gate, y):
    return x + gate * y


def draw(operation):
    """Random float32 arrays: the inputs of an Operation, then the gradient of its output."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in operation.shapes]
    out = jax.eval_shape(operation.apply, *shapes)
    rng = np.random.default_rng(0)
    return [rng.standard_normal(each.shape).astype(np.float32) for each in (*shapes, out)]


def differentiate(apply, *arrays):
    """(the output, the gradients of the inputs) for inputs and the gradient of the output."""
    *inputs, grad = arrays
    out, pull_back = jax.vjp(apply, *inputs)
    return out, pull_back(grad)


def prepare(name, operations, settings):
    """run(): does one of the operations, or the update, and waits."""
    if name == UPDATE:
        return prepare_update(settings)
    operation, dtype = operations[name], layers.DTYPES[settings.compute.dtype]
    arrays = [jnp.asarray(x, dtype) for x in draw(operation)]
    jitted = jax.jit(differentiate, static_argnums=0)
    return lambda: jax.block_until_ready(jitted(operation.apply, *arrays))


def prepare_update(settings):
    """run(): the update of all parameters by their gradients, and of their EMA."""
    parts = build.parts(settings, jax.devices()[:1])
    state = parts.create_state(prng.key(0))
    grads = jax.jit(lambda params: jax.tree.map(lambda x: 0.1 * x, params))(state.params)

    def update(params, average, opt_state, grads):
        with compat.default_arithmetic():
            changes, opt_state = parts.optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, changes)
        return params, ema.update(average, params, decay=settings.train.ema_decay), opt_state

    jitted = jax.jit(update, donate_argnums=(0, 1, 2))
    carried = state.params, state.ema, state.opt_state

    def run():
        nonlocal carried
        carried = jax.block_until_ready(jitted(*carried, grads))

    return run


def prepare_peer(name, operations, settings):
    """run(): the same in PyTorch."""
    from dit_jax.convert import torch_operations  # which imports torch

    if name != UPDATE:
        return torch_operations.make(name, draw(operations[name]), dtype=settings.compute.dtype)
    model, train = dit.configure(**vars(settings.model)), settings.train
    options = {"learning_rate": train.learning_rate, "ema_decay": train.ema_decay}
    return torch_operations.make_update(model, **options)


def make_rows(step, seconds, counts):
    """The rows of `measure`, with "rest" last.

    step: its seconds. seconds: {name: {"dit_jax": of one, perhaps "torch": of one}}. counts: how
    many of each a step does.
    """
    rows = []
    for name, each in seconds.items():
        ours, count = each["dit_jax"], counts[name]
        found = {"operation": name, "count": count, "seconds_median": ours}
        found["share"] = count * ours / step
        if "torch" in each:
            found["torch_seconds_median"] = each["torch"]
            found["dit_jax_over_torch"] = each["torch"] / ours
        rows.append(found)
    rest = 1 - sum(each["share"] for each in rows)
    return [*rows, {"operation": "rest", "count": 1, "seconds_median": rest * step, "share": rest}]


def row(found):
    """One line of the table."""
    words = f"{found['operation']:11s}  {found['count']:5d}  {1e3 * found['seconds_median']:9.4g}"
    words += f"  {100 * found['share']:11.1f} %"
    if "torch_seconds_median" in found:
        words += f"  {1e3 * found['torch_seconds_median']:9.4g}"
        words += f"  {found['dit_jax_over_torch']:10.2f}"
    return words
