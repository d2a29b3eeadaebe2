"""The training loop: step, check, save, log, hooks."""

import time

import jax

from dit_jax.train import divergence


class Interrupted(Exception):
    """Training was asked to stop and did so after step `step`, which it handed to save."""

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
    the metrics since the last log and the seconds of a step; the metric data_wait is the share of
    time spent waiting for batches. Raises divergence.Diverged if a metric is not finite, or if
    `spikes`, a divergence.Spikes, finds a spike of the loss.

    save(step, state, loss, last) is called after all metrics up to that step were checked; loss is
    the mean since the last call. last: the final save, so wait for it. save_again() says at every
    log whether to repeat a save that failed. hooks: (every, hook); hook(step, state) is called
    every `every` steps and at the end. stop_requested() is asked with at most two steps in flight.
    """
    step = int(state.step)
    recent, started = [], time.perf_counter()  # metrics since the last log, on the device
    losses, waited = [], 0.0  # losses: since the last save
    while step < total_steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        state, metrics = train_step(state, batch, key)
        step += 1
        jax.block_until_ready(recent[-1:])  # the step before; this one keeps the devices busy
        recent.append(metrics)
        stopping = stop_requested()
        saving = stopping or _due(step, checkpoint_every, total_steps)
        logging = saving or _due(step, log_every, total_steps)
        if logging:
            recent = _read(recent, step, spikes)  # waits for the device
            seconds = time.perf_counter() - started
            means = {name: _mean([m[name] for m in recent]) for name in recent[0]}
            losses += [m["loss"] for m in recent]
        if saving or (logging and save_again()):
            save(step, state, _mean(losses), stopping or step == total_steps)
            losses = []
        if logging:  # after a final save, so that the record names it
            log(step, means | {"data_wait": waited / seconds}, seconds / len(recent))
        if stopping and step < total_steps:
            raise Interrupted(step)
        for every, hook in hooks:
            if _due(step, every, total_steps):
                hook(step, state)
        if logging:
            recent, started, waited = [], time.perf_counter(), 0.0
    return state


def _due(step, every, total_steps):
    return step % every == 0 or step == total_steps


def _read(recent, step, spikes):
    """The metrics {name: float} of the steps up to `step`, checked for divergence."""
    recent = [{name: float(x) for name, x in m.items()} for m in jax.device_get(recent)]
    for i, metrics in enumerate(recent, start=step - len(recent) + 1):
        divergence.check_finite(metrics, i)
        spikes.check(metrics["loss"], i)
    return recent


def _mean(values):
    return sum(values) / len(values)
