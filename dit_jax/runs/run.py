"""A training run from its settings to its end: restore, train, save, record.

Everything random is a function of (seed, step), so that a resumed run repeats an undisturbed one.
"""

import contextlib
import itertools
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.data import feed, loader
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.machine import cluster, devices, prng, sharding
from dit_jax.runs import (
    averages,
    build,
    history,
    hooks,
    keep,
    lock,
    moved,
    outline,
    record,
    report,
    scoring,
)
from dit_jax.runs import loggers as loggers_lib
from dit_jax.runs import origin as origins
from dit_jax.runs import workdir as workdirs
from dit_jax.train import divergence, loop
from dit_jax.train import frozen as frozen_lib
from dit_jax.train import state as states
from dit_jax.train import step as train_steps


class Stopped(Exception):
    """The run was asked to stop; the message says from which step it can be resumed."""


def run(settings, workdir, listen_for_stop, init_from=None):
    """Trains a new run in workdir, or resumes the one in it, to run.total_steps.

    init_from: a run or a checkpoint from whose parameters a new run starts; None: from random ones.
    listen_for_stop() -> stop_requested() is called when training begins; stop_requested() is asked
    after every step. Raises UserError if the workdir cannot be used, Stopped, `divergence.Diverged`
    if there was one divergence too many, or OSError if the last save failed.
    """
    parts, origin = prepare(settings, workdir, init_from)
    step = steps.latest(workdir / "checkpoints")
    if step and step >= settings.run.total_steps:
        logging.info("%s", explain_end(settings, workdir, step))
        return
    with devices.explained_memory():
        fed = open_data(settings, parts, workdir)
        with lock.held(workdir):
            _start(settings, parts, fed, workdir, origin, listen_for_stop)


def prepare(settings, workdir, init_from=None):
    """(Parts, origin) of a run that may start or resume in workdir; writes nothing.

    origin: of `origins.choose`. UserError if the settings or the workdir do not fit.
    """
    parts = build.parts(settings)
    with cluster.together():
        workdirs.check(workdir, settings)
        origin = origins.choose(workdir, init_from, parts.model)
    if jax.process_count() > 1:
        cluster.check_same(
            config=settings_lib.to_json(settings),
            code=cluster.code_version(),
            workdir=[str(workdir), steps.latest(workdir / "checkpoints")],
            init_from=origin,
        )
    return parts, origin


def open_data(settings, parts, workdir):
    """The Feed of the run; UserError if it is not what the run in workdir was fed with."""
    fed, batch = feed.make(settings, parts.mesh), sharding.of_batch(parts.mesh)
    with cluster.together():
        moved.check(workdir, settings, fed)
        scoring.check(settings, fed)
        num_rows = sharding.count_local_rows(batch, settings.train.batch_size)
        loader.check_fits(fed.source, augment=fed.augment, num_rows=num_rows)
    if jax.process_count() > 1:
        cluster.check_same(data=[fed.sha256, fed.vae_digests])
    return fed


def _start(settings, parts, fed, workdir, origin, listen_for_stop):
    directory, limits = workdir / "checkpoints", settings.run
    _set_incomplete_steps_aside(directory)
    state, past = resume(settings, parts, fed, directory, origin)
    with cluster.together():
        if jax.process_index() == 0:
            workdirs.claim(workdir, settings, origin)
            history.start(workdir, int(state.step))
    if int(state.step):
        logging.info("resuming %s from step %d", workdir, state.step)
    if settings.train.frozen:
        logging.info("%s", frozen_lib.describe(state.params, settings.train.frozen))
    outline.log(settings, parts, state.params, len(fed.source))
    jitted, stop_requested = parts.jit_step(), listen_for_stop()
    while True:
        try:
            failure = _train(settings, parts, fed, state, past, jitted, workdir, stop_requested)
            break
        except loop.Interrupted as error:
            _conclude(workdir, "stopped", error.step)
            raise Stopped(_explain_stop(error, directory)) from error
        except divergence.Diverged as error:
            message, bad = str(error), error.step
        if len(past.rollbacks) >= limits.max_rollbacks:
            good = steps.latest(directory)
            kept = "nothing was saved before" if good is None else f"step {good} is kept"
            _conclude(workdir, "diverged", bad, reason=message)
            raise divergence.Diverged(f"{message}; {kept}", bad)
        state = None  # frees its memory
        state, saved = resume(settings, parts, fed, directory, origin)
        past = saved._replace(rollbacks=[*past.rollbacks, [bad, int(state.step)]])
        history.add(workdir, "rolled back", bad, to=int(state.step), reason=message)
        logging.warning(
            "%s: rolled back to step %d, skipping the %d batches since; rollback %d of %d",
            *(message, state.step, bad - int(state.step)),
            *(len(past.rollbacks), limits.max_rollbacks),
        )
    _conclude(workdir, "failed" if failure else "finished", limits.total_steps, reason=failure)
    if failure:
        saved = steps.latest(directory) or 0
        raise OSError(
            f"step {limits.total_steps} could not be saved: {failure}; the same command resumes "
            f"from step {saved}"
        )
    logging.info("trained to step %d: %s", limits.total_steps, workdir)


def _conclude(workdir, event, step, **more):
    """Records how the run ended."""
    history.add(workdir, event, step, **more)
    report.refresh(workdir)


def _set_incomplete_steps_aside(directory):
    with cluster.together():
        if jax.process_index() == 0:
            for step in steps.incomplete(directory):
                aside = steps.set_aside(directory, step)
                logging.warning("step %d is incomplete and was moved to %s", step, aside)


def explain_end(settings, workdir, step):
    """Why a run at this step has nothing to train, and how to train it further."""
    total, decay = settings.run.total_steps, settings.train.decay_steps
    text = f"{workdir} is trained already: it is at step {step}, and run.total_steps is {total}"
    if decay and decay <= step:
        return (
            f"{text}. To train it further, start another run with --init_from={workdir}: the "
            f"learning rate of this one is 0 after train.decay_steps {decay}"
        )
    return f"{text}. To train it further, set that above {step}"


def _explain_stop(error, directory):
    saved = steps.latest(directory)
    if saved == error.step:
        return f"{error}, which is saved: the same command resumes from there"
    return f"{error}, which could not be saved: the same command resumes from step {saved or 0}"


class Past(NamedTuple):
    """What a checkpoint remembers of its run beside the state.

    rollbacks: [step where it diverged, step that it was rolled back to] of each rollback. losses:
    of the last steps, for `divergence.Spikes`. init_from: the origin, of `origins.choose`.
    """

    rollbacks: list
    losses: list
    init_from: dict | None

    @property
    def skipped(self):
        """How many batches the rollbacks skipped."""
        return sum(bad - good for bad, good in self.rollbacks)


def _train(settings, parts, fed, state, past, jitted, workdir, stop_requested):
    """Trains from the state to the end; returns why the last save failed, or None."""
    start, limits = int(state.step), settings.run
    key = jax.random.split(prng.key(settings.seed))[1]
    if past.rollbacks:  # other noise than the steps that diverged
        key = jax.random.fold_in(key, len(past.rollbacks))
    batches = make_batches(settings, parts, fed, start + past.skipped)
    first = next(batches)
    train_step = _compile(jitted, state, first, key)
    if "posterior" in first:
        _check_latents(first, key)
    batches = itertools.chain([first], batches)
    watched = diffusion_fields.watched(settings.diffusion)
    spikes = divergence.Spikes(limits.spike_factor, past.losses, watched)
    scorer = scoring.Scorer(settings, parts, fed, workdir) if limits.score_every else None
    measured = _score_missed(settings, scorer, state, workdir)
    about = _describe(settings, parts, fed, past)
    saver = averages.Saver(settings, about, workdir) if settings.train.averages else None
    keeper, log, loggers = _open_outputs(settings, parts, workdir, start, measured)

    def save(step, state, measures, last):
        if saver:
            saver.complete(step, state)
        meta = about | measures | {"rollbacks": past.rollbacks, "losses": spikes.losses}
        (keeper.save_now if last else keeper.save)(step, state.saved, meta)

    # They wait for a save in progress, also if an exception passes.
    with loggers, keeper, saver or contextlib.nullcontext():
        events = hooks.make(settings, parts, fed, workdir, loggers)
        if saver:
            saver.begin(state)
            events.append((saver.every, saver.save))
        loop.run(
            state,
            train_step,
            batches,
            key,
            total_steps=limits.total_steps,
            log_every=limits.log_every,
            checkpoint_every=limits.checkpoint_every,
            spikes=spikes,
            scores=scorer and (limits.score_every, scorer),
            log=log,
            save=save,
            save_again=keeper.poll,
            hooks=events,
            stop_requested=cluster.agree(stop_requested),
        )
    return keeper.failure


def _describe(settings, parts, fed, past):
    """What the meta of everything that a run saves says of the run."""
    about = {
        "init_from": past.init_from,
        "vae_digests": fed.vae_digests,
        "data_sha256": fed.sha256,
        "class_names": list(fed.class_names),
    }
    about = {name: value for name, value in about.items() if value}
    config = settings_lib.to_json(settings)
    return {"model": parts.model.to_json(), "config": config} | about


def _score_missed(settings, scorer, state, workdir):
    """The scores of a resumed step that has none because the run was stopped there, else {}."""
    if not scorer:
        return {}
    step, missed = int(state.step), False
    with cluster.together():
        if jax.process_index() == 0:
            missed = scoring.is_missed(settings, record.read(workdir / "metrics.jsonl"), step)
    return scorer(step, state) if cluster.any_of(missed) else {}


def _open_outputs(settings, parts, workdir, start, measured):
    """(a Keeper, the log of `loop.run`, Loggers) from a step on, with its scores."""
    limits, batch_size = settings.run, settings.train.batch_size
    watched = diffusion_fields.watched(settings.diffusion)
    with cluster.together():
        keeper = keep.Keeper(
            workdir / "checkpoints",
            newest=limits.keep_checkpoints,
            best=limits.keep_best,
            best_by=watched if limits.keep_best_by == "loss" else "frechet_distance",
            verify=limits.verify_checkpoints,
        )
        write = record.make_log(
            workdir / "metrics.jsonl",
            start=start,
            measured=measured,
            total_steps=limits.total_steps,
            batch_size=batch_size,
            flops_per_step=batch_size * parts.train_flops,
            peak_flops=devices.total_peak_flops(),
            saved=lambda: keeper.saved,
            shown=watched,
        )
        loggers = loggers_lib.Loggers()
        if jax.process_index() == 0:
            lines = record.read(workdir / "metrics.jsonl")
            loggers = loggers_lib.open_all(settings, workdir, start, lines)

    def log(step, means, seconds):
        with cluster.together():  # rank 0 may find that another run writes to the record
            line = write(step, means, seconds)
        if line:
            loggers.scalars(line)

    return keeper, log, loggers


def make_batches(settings, parts, fed, start):
    """The batches of the run from number `start` on, on the devices."""
    batches = loader.batches(
        fed.source,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
        start=start,
        sharding=sharding.of_batch(parts.mesh),
        augment=fed.augment,
    )
    return map(fed.prepare, batches)


def resume(settings, parts, fed, directory, origin):
    """(TrainState, Past) of the newest step that can be read, or of a new run if none is saved.

    origin: of `origins.choose`, what a new run starts from. A corrupt step is set aside, unless it
    is the last one: then `store.Damaged` is raised.
    """
    while True:
        step = steps.latest(directory)
        if step is None:
            return _create_state(settings, parts, fed, origin), Past([], [], origin)
        try:
            return _restore(settings, parts, directory, step)
        except store.Damaged as damage:
            if steps.saved(directory) == [step]:
                raise store.Damaged(
                    f"{damage}; there is no older step: restore one or use another workdir"
                ) from damage
            with cluster.together():
                if jax.process_index() == 0:
                    aside = steps.set_aside(directory, step)
                    damage = f"{damage}; moved to {aside}, resuming from an older step"
            logging.warning("%s", damage)


def _create_state(settings, parts, fed, origin):
    if origin:
        return origins.create_state(origin, settings, parts, fed.class_names)
    return parts.create_state(jax.random.split(prng.key(settings.seed))[0])


def _restore(settings, parts, directory, step):
    """(TrainState, Past) of a saved step; `store.Damaged` on all processes if one cannot read."""
    template = parts.abstract_state()
    with cluster.together(store.Damaged):
        meta = store.read_meta(directory, step)
        items = store.restore(directory, step, template.saved, verify=False)
    if settings.run.verify_checkpoints:
        store.compare(directory / str(step), items, meta["digests"])
    count = jax.device_put(np.int32(step), template.step.sharding)
    state = states.TrainState(step=count, **items)
    past = Past(meta.get("rollbacks", []), meta.get("losses", []), meta.get("init_from"))
    return state, past


def _check_latents(batch, key):
    """Logs mean and standard deviation of the latents, and warns if a DiT would not expect them."""
    x0 = train_steps.to_x0(batch, key)
    mean, deviation = float(x0.mean()), float(x0.std())
    logging.info("latents: mean %.3f, standard deviation %.3f", mean, deviation)
    if abs(mean) > 0.5 or not 0.5 < deviation < 2:
        logging.warning("latents should have mean 0 and standard deviation 1: is it the right vae?")


def _compile(jitted, state, batch, key):
    """The step, compiled before the first step is timed."""
    started = time.perf_counter()
    step = jitted.lower(state, batch, key).compile()
    devices.check_memory(step)
    logging.info("compiled the step in %.1f s", time.perf_counter() - started)
    return step
