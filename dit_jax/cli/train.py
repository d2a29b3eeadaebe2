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
from typing import NamedTuple

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from dit_jax.checkpoint import steps, store
from dit_jax.cli import command
from dit_jax.data import feed, loader
from dit_jax.machine import cluster, devices, disk, sharding
from dit_jax.models import flops
from dit_jax.runs import build, keep, record
from dit_jax.runs import workdir as workdirs
from dit_jax.sampling import generate
from dit_jax.train import divergence, loop
from dit_jax.train import state as states
from dit_jax.train import step as train_steps


def define(values):
    config_flags.DEFINE_config_file("config", None, "Path[:VARIANT].", flag_values=values)
    flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=values)
    command.define_cluster(values)


def main(values):
    config, workdir = values.config, disk.path(values.workdir)
    parts = build.parts(config)
    fed = feed.make(config, parts.mesh)
    if not disk.is_on_disk(workdir):
        logging.info("looking at %s", workdir)  # a bucket that does not answer is asked for long
    with cluster.together():
        workdirs.check(workdir, build.to_json(config))
    if jax.process_count() > 1:
        cluster.check_same(
            config=build.to_json(config),
            code=cluster.code_version(),
            workdir=[str(workdir), steps.latest(workdir / "checkpoints")],
        )
    with workdirs.held(workdir):
        return start(config, parts, fed, workdir)


def start(config, parts, fed, workdir):
    """Trains a new run, or one that goes on; returns the exit code."""
    directory, run = workdir / "checkpoints", config.run
    step = steps.latest(directory)
    if step and step >= run.total_steps:
        logging.info("%s is trained already: it is at step %d", workdir, step)
        return 0
    with cluster.together():
        if jax.process_index() == 0:
            for broken in steps.incomplete(directory):
                aside = steps.set_aside(directory, broken)
                logging.warning("step %d is not whole; set aside in %s", broken, aside)
    state, past = resume(config, parts, directory)
    with cluster.together():
        if jax.process_index() == 0:
            workdirs.claim(workdir, build.to_json(config))
    if int(state.step):
        logging.info("going on from step %d of %s", state.step, workdir)
    jitted, stop_requested = parts.jit_step(), listen_for_stop()
    while True:
        try:
            failure = train(config, parts, fed, state, past, jitted, workdir, stop_requested)
            break
        except loop.Interrupted as error:
            return command.fail("dit-train", tell_of_stop(error, directory), code=42)
        except divergence.Diverged as error:
            message, bad = str(error), error.step
        if len(past.rollbacks) >= run.max_rollbacks:
            good = steps.latest(directory)
            kept = "nothing was saved before" if good is None else f"step {good} is kept"
            return command.fail("dit-train", f"{message}; {kept}", code=3)
        state = None  # its memory is needed
        state, saved = resume(config, parts, directory)
        past = saved._replace(rollbacks=[*past.rollbacks, [bad, int(state.step)]])
        logging.warning(
            "%s: back to step %d, past the %d batches since; time %d of %d",
            *(message, state.step, bad - int(state.step)),
            *(len(past.rollbacks), run.max_rollbacks),
        )
    if failure:
        saved = steps.latest(directory) or 0
        raise OSError(
            f"step {run.total_steps} could not be saved: {failure}; the same command goes on from "
            f"step {saved}"
        )
    logging.info("trained to step %d: %s", run.total_steps, workdir)
    return 0


def tell_of_stop(error, directory):
    saved = steps.latest(directory)
    if saved == error.step:
        return f"{error}, which is saved: the same command goes on from there"
    return f"{error}, which could not be saved: the same command goes on from step {saved or 0}"


class Past(NamedTuple):
    """What a run remembers of its way, beside its state.

    rollbacks: [step where it diverged, step that it went back to] of each. losses: of the last
    steps, as divergence.Spikes has them.
    """

    rollbacks: list
    losses: list

    @property
    def skipped(self):
        """How many batches were skipped."""
        return sum(bad - good for bad, good in self.rollbacks)


def train(config, parts, fed, state, past, jitted, workdir, stop_requested):
    """Trains from the state to the end; returns why the last save failed, or None."""
    start, run = int(state.step), config.run
    key = jax.random.split(jax.random.key(np.uint32(config.seed)))[1]
    if past.rollbacks:  # other noise too
        key = jax.random.fold_in(key, len(past.rollbacks))
    batches = make_batches(config, parts, fed, start + past.skipped)
    first = next(batches)
    train_step = compile_step(jitted, state, first, key)
    if "moments" in first:
        check_latents(first, key)
    batches = itertools.chain([first], batches)
    spikes = divergence.Spikes(run.spike_factor, past.losses)
    keeper, log = open_outputs(config, parts, workdir, start)

    def save(step, state, loss, last):
        items = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
        meta = {"model": parts.model._asdict(), "config": build.to_json(config), "loss": loss}
        meta |= {"rollbacks": past.rollbacks, "losses": spikes.losses}
        if fed.vae_digests:
            meta["vae_digests"] = fed.vae_digests
        (keeper.save_now if last else keeper.save)(step, items, meta)

    with keeper:  # waits for what is still being written, also when an error passes
        loop.run(
            state,
            train_step,
            batches,
            key,
            total_steps=run.total_steps,
            log_every=run.log_every,
            checkpoint_every=run.checkpoint_every,
            spikes=spikes,
            log=log,
            save=save,
            save_again=keeper.poll,
            hooks=[(run.sample_every, make_hook(config, parts.draw, fed.decoder, workdir))],
            stop_requested=cluster.agree(stop_requested),
        )
    return keeper.failure


def open_outputs(config, parts, workdir, start):
    """(a Keeper of the run's steps, the log of `loop.run`) from a step on."""
    run, batch_size = config.run, config.train.batch_size
    with cluster.together():
        keeper = keep.Keeper(
            workdir / "checkpoints",
            newest=run.keep_checkpoints,
            best=run.keep_best,
            verify=run.verify_checkpoints,
        )
        write = record.make_log(
            workdir / "metrics.jsonl",
            start=start,
            total_steps=run.total_steps,
            batch_size=batch_size,
            flops_per_step=batch_size * flops.train_flops(parts.model),
            peak_flops=devices.total_peak_flops(),
            saved=lambda: keeper.saved,
        )

    def log(step, means, seconds):
        with cluster.together():  # process 0 may find that another run writes there
            write(step, means, seconds)

    return keeper, log


def make_batches(config, parts, fed, start):
    """The batches of the run from number `start` on, on the devices."""
    batches = loader.batches(
        fed.source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=start,
        sharding=sharding.of_batch(parts.mesh),
        augment=fed.augment,
    )
    return map(fed.prepare, batches)


def resume(config, parts, directory):
    """(state, Past) of the newest step that is whole; of a new run where there is none.

    A damaged step is set aside; the last one that is left never is.
    """
    while True:
        step = steps.latest(directory)
        if step is None:
            key = jax.random.split(jax.random.key(np.uint32(config.seed)))[0]
            return parts.create_state(key), Past([], [])
        try:
            return restore(config, parts, directory, step)
        except store.Damaged as damage:
            if steps.saved(directory) == [step]:
                raise store.Damaged(
                    f"{damage}; there is no older step: restore one or use another workdir"
                ) from damage
            with cluster.together():
                if jax.process_index() == 0:
                    aside = steps.set_aside(directory, step)
                    damage = f"{damage}; set aside in {aside}, going on from an older one"
            logging.warning("%s", damage)


def restore(config, parts, directory, step):
    """(state, Past) of a saved step; Damaged, on all processes, where one cannot read its part."""
    templates = parts.abstract_state()._asdict()
    everywhere = templates.pop("step").sharding
    with cluster.together(store.Damaged):
        meta = store.read_meta(directory, step)
        items = store.restore(directory, step, templates, verify=False)
    if config.run.verify_checkpoints:
        store.compare(directory / str(step), items, meta["digests"])
    state = states.TrainState(step=jax.device_put(np.int32(step), everywhere), **items)
    return state, Past(*(meta.get(name, []) for name in Past._fields))


def check_latents(batch, key):
    """Says how the latents of a batch are spread, and warns where a DiT would not expect it."""
    x0 = train_steps.to_x0(batch, key)
    mean, deviation = float(x0.mean()), float(x0.std())
    logging.info("latents: mean %.3f, standard deviation %.3f", mean, deviation)
    if abs(mean) > 0.5 or not 0.5 < deviation < 2:
        logging.warning("latents should have mean 0 and standard deviation 1: is it the right vae?")


def compile_step(jitted, state, batch, key):
    """The step compiled before it is timed; a second time, JAX still has it."""
    started = time.perf_counter()
    step = jitted.lower(state, batch, key).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - started)
    return step


def make_hook(config, draw, decoder, workdir):
    """hook(step, state): the loss curve, and samples at fixed noise and labels, where they show."""
    labels = [i % config.model.num_classes for i in range(config.run.num_samples)]

    def hook(step, state):
        if jax.process_index() == 0:
            with disk.only_warned("the loss curve could not be drawn"):
                record.plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
        if config.data.space != "pixels" and not decoder:
            return  # latents cannot be shown without a decoder
        images = generate.draw_all(draw, state.ema, labels, seed=0, batch_size=len(labels))
        images = decoder.decode(images) if decoder else images
        grid = generate.grid(images, scale=generate.grid_scale(images.shape[1:3]))
        if jax.process_index() == 0:
            path = workdir / "samples" / f"{step:07d}.png"
            with disk.only_warned("samples could not be written"):
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    grid.save(file, format="png")

    return hook


def listen_for_stop():
    """stop_requested() is true after SIGINT or SIGTERM, or where the machine will be taken away.

    A second signal ends the process at once.
    """
    asked = []

    def handle(signum, frame):
        asked.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        print("\nstopping after this step; once more leaves without saving", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    cluster.watch_maintenance(asked.append)
    return lambda: bool(asked)


def entry():
    required = ["config", "workdir"]
    sys.exit(command.run("dit-train", define, main, required=required, stopped=42))


if __name__ == "__main__":
    entry()
