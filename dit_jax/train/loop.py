"""The training loop: step, look, save, show."""

import time

import jax

from dit_jax.train import divergence


class Interrupted(Exception):
    """Training was asked to stop, after the step `step`, which was handed to save."""

    def __init__(self, step):
        super().__init__(f"stopped after step {step}")
        self.step = step


def run(
    state,
    train_step,
    batches,
    key,
    *,
    total_steps,
    log_every,
    checkpoint_every,
    spikes,
    log,
    save,
    save_again,
    hooks,
    stop_requested,
):
    """Trains from state.step to total_steps and returns the last state.

    train_step(state, batch, key) -> state, metrics. log(step, means, seconds) gets the means of
    the metrics, among them data_wait, the share of the time in which the next batch was not there,
    and the seconds a step took since the last log. Raises divergence.Diverged where a metric of a
    step is not finite, or where `spikes`, a divergence.Spikes, says so of its loss.

    save(step, state, loss, last) is called only after every metric up to that step was checked;
    loss is the mean since it was called before, last: nothing follows. save_again() says, at every
    log, whether a save is to be tried again. hooks are (every, hook): hook(step, state) is called
    every so many steps and at the end. stop_requested() is asked after each step.
    """
    step = int(state.step)
    recent, started = [], time.perf_counter()  # the metrics since the last log stay on the device
    losses = []  # since the last save
    waited = 0.0
    while step < total_steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = train_step(state, batch, key)
        step += 1
        recent.append(metrics)
        stopping = stop_requested()
        saving = stopping or _due(step, checkpoint_every, total_steps)
        looking = saving or _due(step, log_every, total_steps)
        if looking:
            recent = _read(recent, step, spikes)  # waits for the device
            seconds = time.perf_counter() - started
            means = {name: _mean([m[name] for m in recent]) for name in recent[0]}
            losses += [m["loss"] for m in recent]
        if saving or (looking and save_again()):
            save(step, state, _mean(losses), stopping or step == total_steps)
            losses = []
        if looking:  # after a last save, so that the record tells of it
            log(step, means | {"data_wait": waited / seconds}, seconds / len(recent))
        if stopping and step < total_steps:
            raise Interrupted(step)
        for every, hook in hooks:
            if _due(step, every, total_steps):
                hook(step, state)
        if looking:
            recent, started, waited = [], time.perf_counter(), 0.0
    return state


def _due(step, every, total_steps):
    return step % every == 0 or step == total_steps


def _read(recent, step, spikes):
    """The metrics {name: float} of the steps up to `step`, each of them checked."""
    recent = [{name: float(x) for name, x in m.items()} for m in jax.device_get(recent)]
    for i, metrics in enumerate(recent, start=step - len(recent) + 1):
        divergence.check_finite(metrics, i)
        spikes.check(metrics["loss"], i)
    return recent


def _mean(values):
    return sum(values) / len(values)
