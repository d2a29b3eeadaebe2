"""Samplers: from noise to data along `process.Levels`, for every process and any model.

A sampler is an `init` and a `step`, so that a loop, a trajectory, a preview or a server can drive
it; `run` is one `lax.scan` over all steps. DDPM and DDIM are here, and those that need few steps in
`solvers.py`. Shapes: N batch, S steps; x (N, ..., C) has any number of axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import at


class State(NamedTuple):
    """x at the current level, and what a multistep sampler remembers of earlier steps.

    history: a tree whose shapes and dtypes `init` fixes, because a scan carries it.
    """

    x: jax.Array
    history: Any = ()


class Sampler(NamedTuple):
    """How to go from level 0, noise, to level num_steps, data.

    init(x) -> State at level 0. step(predict, state, i, noise) -> State at level i + 1, where
    predict is of `process.predictor` and is asked about levels below num_steps, and noise is like
    x, or None if the sampler is not `stochastic`. passes (S,): the network calls of each step.
    """

    num_steps: int
    init: Callable
    step: Callable
    passes: np.ndarray
    stochastic: bool


def ddpm(levels):
    """Ancestral sampling (Ho et al. 2020, alg. 2).

    The variance is the one that the network predicts, or else the posterior's.
    """
    ratio, variance = _forward(levels)
    x0_weight = levels.alpha[1:] * variance / levels.sigma[:-1] ** 2
    x_weight = ratio * levels.sigma[1:] ** 2 / levels.sigma[:-1] ** 2
    posterior = levels.sigma[1:] / levels.sigma[:-1] * np.sqrt(variance)  # 0 at the last step

    def step(predict, state, i, noise):
        x, prediction = state.x, predict(state.x, i)
        mean = at(x0_weight, i, x) * prediction.x0 + at(x_weight, i, x) * x
        if prediction.log_variance is None:
            deviation = at(posterior, i, x)
        else:
            is_last = i == levels.num_steps - 1
            deviation = jnp.where(is_last, 0.0, jnp.exp(0.5 * prediction.log_variance))
        return State(mean + deviation * noise)

    return Sampler(levels.num_steps, State, step, once(levels), stochastic=True)


def ddim(levels, *, eta=0.0):
    """Song et al. 2021, eq. 12 and 16; eta 0 is deterministic."""
    alpha, sigma = levels.alpha[1:], levels.sigma[1:]
    _, variance = _forward(levels)
    added = eta * sigma / levels.sigma[:-1] * np.sqrt(variance)  # 0 at the last step
    rest = np.sqrt(sigma**2 - added**2) if eta else sigma

    def step(predict, state, i, noise):
        x, prediction = state.x, predict(state.x, i)
        x = at(alpha, i, x) * prediction.x0 + at(rest, i, x) * prediction.noise
        return State(x + at(added, i, x) * noise if eta else x)

    return Sampler(levels.num_steps, State, step, once(levels), stochastic=eta > 0)


def once(levels):
    """The `passes` of one network call in each step."""
    return np.ones(levels.num_steps, int)


def _forward(levels):
    """(ratio, variance) of each step backwards: x_i = ratio x_{i+1} + noise of that variance."""
    ratio = levels.alpha[:-1] / levels.alpha[1:]
    return ratio, levels.sigma[:-1] ** 2 - ratio**2 * levels.sigma[1:] ** 2


def run(sampler, predict, x, *, noise_at=None, trajectory=False, memory=None):
    """x at level 0 -> x at the last level. noise_at(i): standard normal noise for step i.

    trajectory True: returns x at every level instead, (S+1, N, ..., C). "x0": returns x and the x0
    that is predicted from it, (2, S+1, N, ..., C); at the last level both are the data. memory:
    what a predict of `caches.predictor` has before the first step.
    """
    if sampler.stochastic and noise_at is None:
        raise ValueError("noise_at must be given for a stochastic sampler")
    kept = ("x", "x0") if trajectory == "x0" else ("x",) if trajectory else ()

    def ask(x, *levels, memory):
        if memory is None:
            return predict(x, *levels), None
        return predict(x, *levels, memory=memory)

    def step(carry, i):
        (state, memory), answers = carry, []
        noise = noise_at(i) if sampler.stochastic else None

        def remember(x, *levels):
            answers.append(ask(x, *levels, memory=answers[0][1] if answers else memory))
            return answers[-1][0]

        state = sampler.step(remember, state, i, noise)
        prediction, memory = answers[0]  # later calls look ahead: they are not kept
        found = {"x": state.x, "x0": prediction.x0}
        return (state, memory), {name: found[name] for name in kept}

    steps = jnp.arange(sampler.num_steps, dtype=jnp.int32)
    (last, _), later = jax.lax.scan(step, (sampler.init(x), memory), steps)
    if not trajectory:
        return last.x
    levels = jnp.concatenate([x[None], later["x"]])
    if trajectory != "x0":
        return levels
    return jnp.stack([levels, jnp.concatenate([later["x0"], last.x[None]])])


def make_noise(keys, shape, num_steps):
    """noise_at(i) -> (N, *shape) for step i, from `keys` (N,); noise_at(-1) is for level 0.

    Each example has its own key, so that a sample does not depend on its batch.
    """

    def noise_at(i):
        def normal(key):
            # Counted from the data, so that the last steps have the same noise in every spacing.
            key = jax.random.fold_in(key, num_steps - 1 - i)
            return jax.random.normal(key, shape, jnp.float32)

        return jax.vmap(normal)(keys)

    return noise_at
