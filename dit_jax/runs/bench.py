"""Measures how fast this machine trains, samples or loads a run's settings.

FLOP/s count the arithmetic of the model, without what rematerialisation repeats; MFU is their share
of the devices' bfloat16 peak.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.convert import files, native, torch_dit
from dit_jax.data import feed, loader
from dit_jax.data import fields as data_fields
from dit_jax.errors import UserError
from dit_jax.machine import devices, prng, sharding
from dit_jax.models import dit
from dit_jax.runs import build
from dit_jax.runs import run as run_lib
from dit_jax.sampling import generate as generate_lib


def measure(settings, what, *, repeats, warmup, peer):
    """The figures of training ("train") or sampling ("sample") one batch of random data.

    peer: also run it in PyTorch, in turn with ours. Those of training also say how long a step
    waits for the data of the settings, if they can be opened.
    """
    figures = measure_random(settings, what, repeats=repeats, warmup=warmup, peer=peer)
    if what == "train":
        figures |= measure_waiting(settings, repeats=repeats, warmup=warmup)
    return figures


def measure_random(settings, what, *, repeats, warmup, peer):
    """As `measure`, of random data only."""
    if peer:
        native.check_prediction(settings, "a peer in PyTorch")
        torch_dit.check(dit.configure(**vars(settings.model)))
        files.require("torch")
        leave_memory()
    with devices.explained_memory():
        ours = (prepare_train if what == "train" else prepare_sample)(settings)
        runs = {"dit_jax": ours.run} | (make_peers(settings, what) if peer else {})
        seconds, first = time_in_turn(runs, repeats, warmup)
    figures = {
        "what": what,
        **describe(settings),
        "batch_size": settings.train.batch_size,
        **summarize(seconds["dit_jax"], ours.flops, settings),
        "compile_seconds": ours.compile_seconds,
        "peak_memory_gb": ours.memory / 1e9,
    }
    for name in runs.keys() - {"dit_jax"}:
        figures |= compare(name, seconds, first[name], settings)
    return figures


def measure_waiting(settings, *, repeats, warmup):
    """How long training steps wait for the next batch of the settings' data.

    data_wait: the share of their time, as in the log of a run. seconds_mean_with_data: of a step
    with its wait. loader_images_per_second: of the loader on all cores, without training. Only
    "data", which says why, if the data cannot be opened or are random.
    """
    data = settings.data
    if data.source == "synthetic":
        return {"data": "random: data.source is synthetic"}
    parts, key = build.parts(settings), prng.key(settings.seed)
    try:
        data_fields.check_paths(data)
        fed = open_data(settings, parts.mesh)
    except UserError as error:
        return {"data": f"not measured: {error}"}
    size = settings.train.batch_size
    batch_bytes = size * loader.example_bytes(fed.source, fed.augment)
    batches = run_lib.make_batches(settings, parts, fed, 0)
    state = parts.create_state(key)
    with devices.explained_memory():
        step, _ = compile_timed(parts.jit_step(), state, next(batches), key)
        state, *_ = time_waiting(step, state, batches, key, warmup)
        per_second = drain(batches, loader.num_ahead(batch_bytes), repeats)
        _, waited, total = time_waiting(step, state, batches, key, repeats)
    return {
        "data": f"{data.source} {data.path}".strip(),
        "data_wait": waited / total,
        "seconds_mean_with_data": total / repeats,
        "loader_images_per_second": per_second * size,
    }


def drain(batches, num_ahead, timed):
    """Draws what was loaded ahead, then `timed` batches; how many of these came per second."""
    for _ in range(num_ahead):
        next(batches)
    started = time.perf_counter()
    for _ in range(timed):
        jax.block_until_ready(next(batches))
    return timed / (time.perf_counter() - started)


def time_waiting(step, state, batches, key, num_steps):
    """(state, seconds waited for batches, seconds of all) of steps that run as in `train.loop`.

    The step before runs on the devices while the next batch is drawn.
    """
    started, waited, before = time.perf_counter(), 0.0, None
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = step(state, batch, key)
        jax.block_until_ready(before)
        before = metrics
    jax.block_until_ready(state)
    return state, waited, time.perf_counter() - started


def open_data(settings, mesh=None):
    """The Feed of the settings; UserError if its data do not fit the model or a host's memory."""
    fed = feed.make(settings, mesh)
    loader.check_fits(fed.source, augment=fed.augment, num_rows=settings.train.batch_size)
    return fed


def describe(settings):
    """The figures that name the model, the devices and the version of jax."""
    model = settings.model
    return {
        "model": f"{model.name} {model.conditioning}",
        "input_size": list(model.input_size),
        "dtype": settings.compute.dtype,
        "devices": devices.describe(),
        "jax": jax.__version__,
    }


def measure_data(settings, repeats, warmup):
    """The figures of the host's part of a batch, on one core."""
    fed, size = open_data(settings), settings.train.batch_size
    share = loader.part(
        fed.source,
        batch_size=size,
        seed=settings.seed,
        start=0,
        augment=fed.augment,
        rows=list(range(size)),
    )
    indices = iter(range(warmup + repeats))
    seconds, _ = time_in_turn({"data": lambda: share[next(indices)]}, repeats, warmup)
    median = statistics.median(seconds["data"])
    return {
        "what": "data",
        "source": f"{settings.data.source} {settings.data.path}",
        "examples": len(fed.source),
        "batch_size": size,
        "images_per_second_per_core": size / median,
        "seconds_median": median,
        "cores_for_1459_images_per_second": 1459 * median / size,  # XL/2 on the paper's pod
    }


class Work(NamedTuple):
    """A compiled program. run() runs it once and waits.

    flops: of one run, 0 if they are not counted. compile_seconds: of tracing and compiling. memory:
    the peak in bytes, before PyTorch runs. needed: bytes of the program, None if they are unknown.
    """

    run: Callable
    flops: float
    compile_seconds: float
    memory: int
    needed: int | None


def prepare_train(settings, on=None):
    """One training step on one batch that stays on the devices: those given, or all."""
    parts, key = build.parts(settings, on), prng.key(0)
    state = parts.create_state(key)
    batch = random_batch(settings, parts.mesh)
    step, compile_seconds = compile_timed(parts.jit_step(), state, batch, key)

    def run():
        nonlocal state
        state, _ = step(state, batch, key)
        jax.block_until_ready(state)

    work = settings.train.batch_size * parts.train_flops
    run()
    return Work(run, work, compile_seconds, devices.peak_memory(), needed_bytes(step))


def prepare_sample(settings):
    """Sampling one batch from noise to the end, without a decoder."""
    parts = build.parts(settings)
    init = jax.jit(parts.init, out_shardings=sharding.replicated(parts.mesh))
    params = init(prng.key(0))
    labels = np.asarray(random_batch(settings, parts.mesh)["label"])
    keys = np.asarray(jax.random.key_data(jax.random.split(prng.key(1), len(labels))))
    given = {"labels": labels, "key_data": keys}
    given = jax.device_put(given, sharding.replicated(parts.mesh))
    generate, compile_seconds = compile_timed(parts.generate, params, given)

    def run():
        jax.block_until_ready(generate(params, given))

    work = generate_lib.count_flops(parts.model, parts.process, settings.sampling)
    work *= settings.train.batch_size
    run()
    return Work(run, work, compile_seconds, devices.peak_memory(), needed_bytes(generate))


def leave_memory():
    """Keeps jax from taking the memory of a GPU at once: PyTorch needs some too."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def make_peers(settings, what):
    """{name: run} of the same work in PyTorch."""
    from dit_jax.convert import torch_peer  # which imports torch

    model = dit.configure(**vars(settings.model))
    options = {"batch_size": settings.train.batch_size, "dtype": settings.compute.dtype}
    diffusion = {name: getattr(settings.diffusion, name) for name in ("schedule", "num_steps")}
    if what == "train":
        options |= {"learning_rate": settings.train.learning_rate}
        options |= {"ema_decay": settings.train.ema_decay}
        make = functools.partial(torch_peer.make_train_step, model, diffusion, **options)
    else:
        sampling = dataclasses.asdict(settings.sampling)
        make = functools.partial(torch_peer.make_sampling, model, diffusion, sampling, **options)
    return {"torch": make(compiled=False), "torch_compile": make(compiled=True)}


def compare(name, seconds, first, settings):
    """The figures of a peer, and how many times as fast ours is, by medians."""
    median = statistics.median(seconds[name])
    return {
        f"{name}_images_per_second": settings.train.batch_size / median,
        f"{name}_seconds_median": median,
        f"{name}_seconds_first": first,
        f"dit_jax_over_{name}": median / statistics.median(seconds["dit_jax"]),
    }


def random_batch(settings, mesh):
    """{"x0", "label"}: a global batch of random latents on the devices."""
    model, size = settings.model, settings.train.batch_size
    shape = (size, *model.input_size, model.in_channels)

    def make():
        x0 = jax.random.normal(prng.key(2), shape, jnp.float32)
        return {"x0": x0, "label": jnp.arange(size, dtype=jnp.int32) % model.num_classes}

    make, _ = compile_timed(jax.jit(make, out_shardings=sharding.of_batch(mesh)))
    return make()


def compile_timed(jitted, *args):
    """(the compiled program, seconds of tracing and compiling); UserError if it does not fit."""
    started = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - started
    devices.check_memory(compiled)
    return compiled, seconds


def needed_bytes(compiled):
    """Bytes that a compiled program needs on each device, None if that is unknown."""
    needed = devices.needed_memory(compiled)
    return needed and sum(needed.values())


def time_in_turn(runs, repeats, warmup):
    """{name: seconds of each repeat}, {name: seconds of the very first run}, after `warmup` runs.

    The runs take turns, so that other load on the machine affects all of them.
    """
    seconds = {name: [] for name in runs}
    for _ in tqdm(range(warmup + repeats), unit="round", disable=None):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    first = {name: times[0] for name, times in seconds.items()}
    return {name: times[warmup:] for name, times in seconds.items()}, first


def summarize(seconds, work, settings):
    """The figures of runs that took `seconds` each and `work` FLOPs each."""
    median = statistics.median(seconds)
    figures = speed(seconds, settings) | {"model_tflops_per_second": work / median / 1e12}
    peak = devices.total_peak_flops()
    return figures | ({"mfu": work / median / peak} if peak else {})


def speed(seconds, settings):
    """The figures of runs of one batch that took `seconds` each."""
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "images_per_second": settings.train.batch_size / median,
        "seconds_median": median,
        "seconds_quartile_range": quartiles[2] - quartiles[0],
    }
