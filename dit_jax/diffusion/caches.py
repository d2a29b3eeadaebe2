"""Caches: a sampling that runs the blocks of a network in some of its steps only.

The blocks add a residual to the tokens. It changes slowly from step to step, so the other steps
forecast it from the last computed ones and pay for the embedders and the final layer alone. Which
steps these are is decided before the first one, so `samplers.run` compiles to one loop, whose
steps choose a branch. Guided steps can also forecast the null pass alone.

Published as FORA (Selvaraju et al. 2024, https://arxiv.org/abs/2407.01425; order 0), TaylorSeer
(Liu et al. 2025, https://arxiv.org/abs/2503.06923) and FasterCache (Lv et al. 2024,
https://arxiv.org/abs/2410.19355; the null pass). Shapes: N batch, S steps, K kept values, T tokens,
D hidden size; x (N, ..., C).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import forecasts, guidance
from dit_jax.diffusion.process import at


class Cache(NamedTuple):
    """What a sampling computes and forecasts.

    guided (S,) bool: the steps with guidance. given: the residual of the pass with conditions.
    null: the residual of the null pass minus that one, which changes less than either.
    """

    guided: np.ndarray
    given: forecasts.Forecast
    null: forecasts.Forecast

    @property
    def num_kept(self):
        """How many residuals (T, D) an image needs memory for."""
        return sum(self.keeps().values())

    def keeps(self):
        """{name: K} of the values that some step forecasts."""
        wanted = {"given": ~self.given.computed, "null": self.guided & ~self.null.computed}
        return {name: getattr(self, name).num_kept for name, steps in wanted.items() if steps.any()}

    def passes(self):
        """How many passes through the blocks a network call of each step takes, (S,)."""
        return self.given.computed.astype(int) + self.null.computed


def make(levels, scales, *, schedule, guidance_schedule="none", order=1, fit="taylor"):
    """The Cache of a sampling along Levels; None if every step computes everything.

    scales: of `guidance.scales`, None without guidance. schedule, guidance_schedule: texts that
    `forecasts.read` reads; the second counts the guided steps that the first computes. order, fit:
    of `forecasts.make`. UserError for a schedule that does not fit the steps.
    """
    num_steps, time = levels.num_steps, levels.time[:-1]
    guided = np.zeros(num_steps, bool) if scales is None else scales != 1
    computed = forecasts.read(schedule, num_steps)
    if guided.any():  # where guidance begins, there are no values of the null pass yet
        computed[np.argmax(guided)] = True
    options = {"name": "cache_guidance", "among": computed & guided}
    null = forecasts.read(guidance_schedule, num_steps, **options)
    if computed.all() and (null == guided).all():
        return None
    make = {"order": order, "fit": fit}
    return Cache(guided, *(forecasts.make(time, steps, **make) for steps in (computed, null)))


class Network(NamedTuple):
    """A network that remembers.

    call(x, t, scale, level, step, memory) -> out, memory: what `guidance.guide` returns for a call
    at a level, for a step. start(x) -> the memory before the first step: {name: (K, N, T, D)}.
    """

    call: Callable
    start: Callable


def network(model, given, cache, *, nulls=None, channels=None):
    """The Network of conditions `given`, {name: (N, ...)}, along a Cache.

    model(x, t=..., blocks=..., **given) is of `models.dit.make_apply`. nulls, channels: of
    `guidance.guide`; unused without guidance.
    """
    absent = guidance.with_nulls(given, nulls) if cache.guided.any() else given
    kept = cache.keeps()

    def make_branch(guided, computed, null_computed):
        def run(x, t, scale, level, memory):
            null_out = None
            if null_computed:
                both = guidance.join(given, absent)
                out, residual = compute(model, jnp.concatenate([x, x]), t, both)
                (out, null_out), (residual, null) = jnp.split(out, 2), jnp.split(residual, 2)
                memory = keep(memory, {"given": residual, "null": null - residual}, level)
            elif computed:
                out, residual = compute(model, x, t, given)
                memory = keep(memory, {"given": residual}, level)
            else:
                residual = forecast(memory, "given", level)
                out = reuse(model, x, t, given, residual)
            if not guided:
                return out, memory
            if null_out is None:
                null_out = reuse(model, x, t, absent, residual + forecast(memory, "null", level))
            return guidance.mix(out, null_out, scale, channels=channels), memory

        return run

    def call(x, t, scale, level, step, memory):
        kinds, which = _kinds(cache)
        branches = [make_branch(*kind) for kind in kinds]
        return jax.lax.switch(jnp.asarray(which)[step], branches, x, t, scale, level, memory)

    def keep(memory, found, level):
        def put(name, values):
            return memory[name].at[jnp.asarray(getattr(cache, name).slot)[level]].set(values)

        return memory | {name: put(name, found[name]) for name in found.keys() & kept.keys()}

    def forecast(memory, name, level):
        values, weights = memory[name], getattr(cache, name).weights
        found = 0.0
        for k in range(len(values)):
            found += at(weights[:, k], level, values[k]) * values[k].astype(jnp.float32)
        return found.astype(values.dtype)  # (N, T, D)

    def start(x):
        time = jnp.zeros((), jnp.float32)
        _, like = jax.eval_shape(lambda x: compute(model, x, time, given), x)
        return {name: jnp.zeros((count, *like.shape), like.dtype) for name, count in kept.items()}

    return Network(call, start)


def _kinds(cache):
    """(the different kinds of steps, a tuple of bool each; which of them each step is, (S,))."""
    columns = np.stack([cache.guided, cache.given.computed, cache.null.computed], axis=1)
    kinds, which = np.unique(columns, axis=0, return_inverse=True)
    return kinds.tolist(), which.reshape(-1)


def compute(model, x, t, given):
    """(the output of a model; what its blocks add to the tokens, (N, T, D))."""
    added = []

    def blocks(run, tokens):
        after = run(tokens)
        added.append(after - tokens)
        return after

    out = guidance.condition(model, {"blocks": blocks, **given})(x, t)
    return out, added[0]


def reuse(model, x, t, given, residual):
    """The output of a model whose blocks are not run, but add a residual (N, T, D)."""

    def blocks(run, tokens):
        return tokens + residual

    return guidance.condition(model, {"blocks": blocks, **given})(x, t)


def predictor(network, process, levels, *, clip_x0=False, scales=None):
    """predict(x, i, step=i, *, memory) -> Prediction, memory: `process.predictor` of a Network.

    Only a call of a step at its own level may keep its memory: the next step calls at the level
    to which a step looks ahead, and two values at one time have no slope.
    """
    read, time = process.reader(levels, clip_x0=clip_x0), jnp.asarray(levels.time, jnp.float32)
    scales = jnp.asarray(np.ones(levels.num_steps) if scales is None else scales, jnp.float32)

    def predict(x, i, step=None, *, memory):
        step = i if step is None else step
        out, memory = network.call(x, time[i], scales[step], i, step, memory)
        return read(out, x, i), memory

    return predict
