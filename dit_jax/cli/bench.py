"""Measures how fast this machine trains or samples a config, on random data. It decides nothing.

    dit-bench train --config=configs/imagenet256.py:XL/2
    dit-bench sample --config=configs/digits.py --out=bench.json

Times are of whole steps (train) or of whole samplings of one batch (sample), each waited for.
FLOP/s count the model's own arithmetic, without what rematerialisation or the null label's pass
outside the guided interval would add or save; MFU is their share of the chips' bfloat16 peak.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from dit_jax import devices, sharding
from dit_jax.cli import build, command
from dit_jax.data import synthetic
from dit_jax.diffusion import schedules
from dit_jax.models import flops
from dit_jax.train import state as states


def define(values):
    config_flags.DEFINE_config_file("config", None, "Path[:VARIANT].", flag_values=values)
    options = {"flag_values": values}
    flags.DEFINE_integer("repeats", 10, "Timed steps or samplings.", lower_bound=2, **options)
    flags.DEFINE_integer("warmup", 2, "Those before them.", lower_bound=1, **options)
    flags.DEFINE_string("out", None, "A JSON file for the figures.", **options)


def main(values, what):
    if what not in ("train", "sample"):
        raise ValueError(f"what to measure must be train or sample, got {what!r}")
    config, out = values.config, values.out and command.output_path(values.out)
    measure = measure_train if what == "train" else measure_sample
    figures = {
        "what": what,
        "model": f"{config.model.size}/{config.model.patch_size} {config.model.conditioning}",
        "input_size": list(config.model.input_size),
        "dtype": config.compute.dtype,
        "batch_size": config.train.batch_size,
        "devices": devices.describe(),
        "jax": jax.__version__,
        **measure(config, values.repeats, values.warmup),
        "peak_memory_gb": devices.peak_memory() / 1e9,
    }
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def measure_train(config, repeats, warmup):
    """Figures of training steps on one batch that stays on the devices."""
    parts, key = build.parts(config), jax.random.key(0)
    state = states.create(parts.init, parts.optimizer, key, parts.mesh)
    batch = random_batch(config, parts.mesh)
    jitted = jax.jit(parts.train_step, donate_argnums=0)
    step, compile_seconds = compile_timed(jitted, state, batch, key)

    def run():
        nonlocal state
        state, _ = step(state, batch, key)
        jax.block_until_ready(state)

    work = config.train.batch_size * flops.train_flops(parts.model)
    return summarize(time_runs(run, repeats, warmup), work, config, compile_seconds)


def measure_sample(config, repeats, warmup):
    """Figures of sampling one batch from noise to the end, without a decoder."""
    parts = build.parts(config)
    init = jax.jit(parts.init, out_shardings=sharding.replicated(parts.mesh))
    params = init(jax.random.key(0))
    labels = random_batch(config, parts.mesh)["label"]
    keys = jax.device_put(jax.random.split(jax.random.key(1), len(labels)), labels.sharding)
    draw, compile_seconds = compile_timed(parts.draw, params, labels, keys)

    def run():
        jax.block_until_ready(draw(params, labels, keys))

    passes = count_passes(config, parts.schedule)
    work = config.train.batch_size * passes * flops.forward_flops(parts.model)
    return summarize(time_runs(run, repeats, warmup), work, config, compile_seconds)


def count_passes(config, schedule):
    """Forward passes for one image: one a step, one more where a step is guided."""
    steps = schedules.respace(schedule, config.sampling.num_steps).timestep
    first, last = config.sampling.cfg_interval
    guided = (first <= steps) & (steps <= last) & (config.sampling.cfg_scale != 1)
    return len(steps) + int(guided.sum())


def random_batch(config, mesh):
    """{"image", "label"}: a global batch of random latents on the devices."""
    model, size = config.model, config.train.batch_size
    shape = (*model.input_size, model.in_channels)
    example = synthetic.Synthetic(shape, model.num_classes)[0]

    def make():
        image = jax.random.normal(jax.random.key(2), (size, *example["image"].shape))
        return {"image": image, "label": jnp.arange(size, dtype=jnp.int32) % model.num_classes}

    return jax.jit(make, out_shardings=sharding.of_batch(mesh))()


def compile_timed(jitted, *args):
    started = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - started


def time_runs(run, repeats, warmup):
    """Seconds of each of `repeats` runs after `warmup` runs."""
    seconds = []
    for _ in range(warmup + repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds[warmup:]


def summarize(seconds, work, config, compile_seconds):
    """The figures of runs that took `seconds` each and `work` FLOPs each."""
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    figures = {
        "images_per_second": config.train.batch_size / median,
        "seconds_median": median,
        "seconds_quartile_range": quartiles[2] - quartiles[0],
        "model_tflops_per_second": work / median / 1e12,
        "compile_seconds": compile_seconds,
    }
    peak = devices.total_peak_flops()
    return figures | ({"mfu": work / median / peak} if peak else {})


def entry():
    sys.exit(command.run("dit-bench", define, main, required=["config"], takes=["train|sample"]))


if __name__ == "__main__":
    entry()
