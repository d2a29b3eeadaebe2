"""The training loop: step, look, save, show."""

import math
import time

import jax


class Diverged(Exception):
    """A loss or a gradient is not finite; the message names the step."""


class Interrupted(Exception):
    """Training was asked to stop and has saved; the message names the step."""


def run(
    state,
    train_step,
    batches,
    key,
    *,
    total_steps,
    log_every,
    checkpoint_every,
    log,
    save,
    hooks,
    stop_requested,
):
    """Trains from state.step to total_steps and returns the last state.

    train_step(state, batch, key) -> state, metrics. log(step, means, seconds) gets the means of
    the metrics, among them data_wait, the share of the time in which the next batch was not there,
    and the seconds a step took since the last log. save(step, state) is called only
    after every metric up to that step was found finite. hooks are (every, hook): hook(step, state)
    is called every so many steps and at the end. stop_requested() is asked after each step.
    """
    step = int(state.step)
    recent, started = [], time.perf_counter()  # the metrics since the last log stay on the device
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
            means = _means(recent, step)  # waits for the device
            seconds = time.perf_counter() - started
            log(step, means | {"data_wait": waited / seconds}, seconds / len(recent))
        if saving:
            save(step, state)
        if stopping and step < total_steps:
            raise Interrupted(f"stopped after step {step}, which is saved")
        for every, hook in hooks:
            if _due(step, every, total_steps):
                hook(step, state)
        if looking:
            recent, started, waited = [], time.perf_counter(), 0.0
    return state


def _due(step, every, total_steps):
    return step % every == 0 or step == total_steps


def _means(recent, step):
    recent = jax.device_get(recent)
    for i, metrics in enumerate(recent, start=step - len(recent) + 1):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} at step {i}")
    return {name: sum(float(m[name]) for m in recent) / len(recent) for name in recent[0]}
