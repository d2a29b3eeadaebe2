"""Trains a DiT. Start the same command again, and it goes on from the last checkpoint.

    dit-train --config=configs/digits.py --workdir=runs/digits [--config.TOPIC.FIELD=value]

configs/base.py explains every field. To a run that is taken up again, only --config.run.* and
--config.mesh.* may be new. On a pod of TPUs, or in a job of Slurm, start it on every host: they
find each other; elsewhere --coordinator, --num_processes and --process_id tell. All see one
workdir, which may be gs://BUCKET/NAME: config.json, metrics.jsonl, loss.png, samples/STEP.png,
checkpoints/STEP/.
"""

import itertools
import signal
import sys
import time

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from dit_jax import checkpoint, cluster, devices, disk, generate, sharding
from dit_jax.cli import build, command, feed
from dit_jax.cli import workdir as workdirs
from dit_jax.data import loader
from dit_jax.models import flops
from dit_jax.train import loop, record
from dit_jax.train import state as states
from dit_jax.train import step as steps


def define(values):
    config_flags.DEFINE_config_file("config", None, "Path[:VARIANT].", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=values)
    command.define_cluster(values)


def main(values):
    config, workdir = values.config, disk.path(values.workdir)
    parts = build.parts(config)
    fed = feed.make(config, parts.mesh)
    workdirs.check(workdir, build.to_json(config))
    if jax.process_count() > 1:
        cluster.check_same(
            config=build.to_json(config),
            code=cluster.code_version(),
            workdir=[str(workdir), checkpoint.latest_step(workdir / "checkpoints")],
        )
    with workdirs.held(workdir):
        return start(config, parts, fed, workdir)


def start(config, parts, fed, workdir):
    """Trains a new run, or one that goes on; returns the exit code."""
    directory, total_steps = workdir / "checkpoints", config.run.total_steps
    step = checkpoint.latest_step(directory)
    if step and step >= total_steps:
        logging.info("%s is trained already: it is at step %d", workdir, step)
        return 0
    init_key, train_key = jax.random.split(jax.random.key(np.uint32(config.seed)))
    state = None
    while state is None:  # once, and again after a step that is set aside
        step = checkpoint.latest_step(directory)
        state = create_or_restore(parts, init_key, directory, step)
    if jax.process_index() == 0:
        workdirs.claim(workdir, build.to_json(config))
    if step:
        logging.info("going on from step %d of %s", step, workdir)
    try:
        train(config, parts, fed, state, train_key, workdir)
    except loop.Diverged as error:
        return command.fail("dit-train", f"{error}; the last good checkpoint is kept", code=3)
    except loop.Interrupted as error:
        return command.fail("dit-train", f"{error}: the same command goes on from there", code=42)
    logging.info("trained to step %d: %s", total_steps, workdir)
    return 0


def train(config, parts, fed, state, key, workdir):
    """Trains from the state to the end of the run."""
    start, run = int(state.step), config.run
    batch_size = config.train.batch_size
    batches = loader.batches(
        fed.source,
        batch_size=batch_size,
        seed=config.seed,
        start=start,
        sharding=sharding.of_batch(parts.mesh),
        augment=fed.augment,
    )
    batches = map(fed.prepare, batches)
    first = next(batches)
    train_step = compile_step(parts, state, first, key)
    if "moments" in first:
        check_latents(first, key)
    batches = itertools.chain([first], batches)
    log = record.make_log(
        workdir / "metrics.jsonl",
        start=start,
        total_steps=run.total_steps,
        batch_size=batch_size,
        flops_per_step=batch_size * flops.train_flops(parts.model),
        peak_flops=devices.total_peak_flops(),
    )
    manager = checkpoint.open_manager(workdir / "checkpoints", keep=run.keep_checkpoints)

    def save(step, state):
        items = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
        meta = {"model": parts.model._asdict(), "config": build.to_json(config)}
        if fed.vae_digests:
            meta["vae_digests"] = fed.vae_digests
        checkpoint.save(manager, step, items, meta)

    with manager:  # waits for what is still being written, also when an error passes
        loop.run(
            state,
            train_step,
            batches,
            key,
            total_steps=run.total_steps,
            log_every=run.log_every,
            checkpoint_every=run.checkpoint_every,
            log=log,
            save=save,
            hooks=[(run.sample_every, make_hook(config, parts.draw, fed.decoder, workdir))],
            stop_requested=cluster.agree(listen_for_stop()),
        )


def create_or_restore(parts, key, directory, step):
    """The state saved in the directory as number `step`; a new one where step is None.

    None where it was damaged and is set aside; the last one that is left is never set aside.
    """
    if step is None:
        return parts.create_state(key)
    templates = parts.abstract_state()._asdict()
    place = templates.pop("step").sharding
    damage = None
    try:
        items = checkpoint.restore(directory, step, templates)
    except checkpoint.Damaged as error:
        damage = error
    if cluster.any_of(damage is not None):
        damage = damage or checkpoint.Damaged("another process cannot read its part")
        if checkpoint.oldest_step(directory) == step:
            raise damage
        if jax.process_index() == 0:
            place = checkpoint.set_aside(directory, step)
            logging.warning("%s; set aside in %s, going on from an older one", damage, place)
        cluster.any_of(False)  # all wait for it
        return None
    return states.TrainState(step=jax.device_put(np.int32(step), place), **items)


def check_latents(batch, key):
    """Says how the latents of a batch are spread, and warns where a DiT would not expect it."""
    x0 = steps.to_x0(batch, key)
    mean, deviation = float(x0.mean()), float(x0.std())
    logging.info("latents: mean %.3f, standard deviation %.3f", mean, deviation)
    if abs(mean) > 0.5 or not 0.5 < deviation < 2:
        logging.warning("latents should have mean 0 and standard deviation 1: is it the right vae?")


def compile_step(parts, state, batch, key):
    """The step compiled before it is timed."""
    started = time.perf_counter()
    step = parts.jit_step().lower(state, batch, key).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - started)
    return step


def make_hook(config, draw, decoder, workdir):
    """hook(step, state): the loss curve, and samples at fixed noise and labels, where they show."""
    labels = [i % config.model.num_classes for i in range(config.run.num_samples)]
    (workdir / "samples").mkdir(exist_ok=True)

    def hook(step, state):
        if jax.process_index() == 0:
            record.plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
        if config.data.space != "pixels" and not decoder:
            return  # latents cannot be shown without a decoder
        images = generate.draw_all(draw, state.ema, labels, seed=0, batch_size=len(labels))
        images = decoder.decode(images) if decoder else images
        if jax.process_index() == 0:
            scale = generate.grid_scale(images.shape[1:3])
            with (workdir / "samples" / f"{step:07d}.png").open("wb") as file:
                generate.grid(images, scale=scale).save(file, format="png")

    return hook


def listen_for_stop():
    """stop_requested() is true after SIGINT or SIGTERM; a second one ends the process at once."""
    asked = []

    def handle(signum, frame):
        asked.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        print("\nstopping after this step; once more leaves without saving", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    return lambda: bool(asked)


def entry():
    required = ["config", "workdir"]
    sys.exit(command.run("dit-train", define, main, required=required, stopped=42))


if __name__ == "__main__":
    entry()
