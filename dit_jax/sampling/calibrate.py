"""Chooses the steps of a sampling that a cache should compute, by the test of the first block.

First-Block Cache and TeaCache (Liu et al. 2024, https://arxiv.org/abs/2411.19108) run the first
block in every step, and the others only if its result has changed enough. Here a few samples are
measured once, and the result is a schedule for `sampling.cache`: later samples test nothing, and
their steps are known before they are compiled. Shapes: M images, S steps.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import caches, forecasts


class Calibration(NamedTuple):
    """changes (S-1,): of `measure`. threshold: of `choose`. cache: the schedule that it gives."""

    changes: np.ndarray
    threshold: float
    cache: str


def measure(apply, params, x, time, labels):
    """How much the residual of the first block changes from each step to the next: (S-1,) NumPy.

    The mean size of the change, divided by that of the residual before. apply: of a DiT of one
    block; params: of the whole. x (M, S+1, H, W, C): a trajectory; time (S,): of its steps.
    """
    params = params | {"blocks": jax.tree.map(lambda layers: layers[:1], params["blocks"])}
    labels = jnp.asarray(labels)

    @jax.jit
    def residual(params, x, t):
        return caches.compute(functools.partial(apply, params), x, t, {"y": labels})[1]

    changes, before = [], None
    for level, t in enumerate(time):
        after = residual(params, jnp.asarray(x[:, level]), jnp.float32(t))
        if before is not None:
            changes.append(jnp.abs(after - before).sum() / jnp.abs(before).sum())
        before = after
    return np.asarray(jnp.stack(changes), np.float64)


def choose(changes, threshold):
    """(S,) bool: the steps before which the changes since the last such step exceed a threshold.

    The first and the last step are computed in any case.
    """
    computed, total = [True], 0.0
    for change in changes:
        total += change
        computed.append(total > threshold)
        total = 0.0 if computed[-1] else total
    computed[-1] = True
    return np.array(computed)


def find_threshold(changes, count):
    """The least threshold, about, with which `choose` computes at most `count` steps, 2 or more."""
    low, high = 0.0, float(changes.sum())
    if choose(changes, low).sum() <= count:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(changes, middle).sum() <= count else (middle, high)
    return high


def calibrate(changes, wanted):
    """The Calibration of changes (S-1,). wanted: a number of steps, or, below 1, a threshold."""
    threshold = wanted if wanted < 1 else find_threshold(changes, wanted)
    return Calibration(changes, threshold, forecasts.write(choose(changes, threshold)))
