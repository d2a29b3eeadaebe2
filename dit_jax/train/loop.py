"""The training loop: step, check, score, save, log, hooks.

Its caller gives functions:
log(step, means, seconds) gets the means of the metrics since the last log and the seconds of a
step; the metric data_wait is the share of time spent waiting for batches.
scores: None or (every, score). score(step, state) -> {name: float} is called every `every` steps
and at the end; its result is saved and logged with the step.
save(step, state, measures, last) is called after all metrics up to that step were checked. measures
has the mean of the metric `spikes.name`, usually the loss, since the last call, and the scores.
last: the final save, so wait for it.
save_again() says at every log whether to repeat a save that failed.
hooks: (every, hook). hook(step, state) is called after the log, every `every` steps and at the end.
stop_requested() is asked with at most two steps in flight.
"""

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
    scores,
    log,
    save,
    save_again,
    hooks,
    stop_requested,
):
    """Trains from state.step to total_steps and returns the last state.

    train_step(state, batch, key) -> state, metrics; the other functions are explained above. Raises
    divergence.Diverged if a metric is not finite, or if `spikes`, a divergence.Spikes, finds a
    spike of the loss.
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
        stopping = stop_requested() and step < total_steps
        saving = stopping or _due(step, checkpoint_every, total_steps)
        # A signal leaves little time: a step at which a run stops is scored when it is resumed.
        scoring = scores and not stopping and _due(step, scores[0], total_steps)
        logging = saving or scoring or _due(step, log_every, total_steps)
        if logging:
            recent = _read(recent, step, spikes)  # waits for the device
            seconds = time.perf_counter() - started
            means = {name: _mean([m[name] for m in recent]) for name in recent[0]}
            losses += [m[spikes.name] for m in recent]
            means["data_wait"] = waited / seconds
        measured = scores[1](step, state) if scoring else {}
        if saving or (logging and save_again()):
            measures = {spikes.name: _mean(losses)} | measured
            save(step, state, measures, stopping or step == total_steps)
            losses = []
        if logging:  # after a final save, so that the record names it
            log(step, means | measured, seconds / len(recent))
        if stopping:
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
        spikes.check(metrics[spikes.name], i)
    return recent


def _mean(values):
    return sum(values) / len(values)
