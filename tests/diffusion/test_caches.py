"""Caches with a model of tokens that counts how often its blocks are really run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import caches, ddpm, guidance, process, samplers, schedules, solvers
from dit_jax.models import dit, flops

PROCESS = ddpm.DDPM(schedules.linear())
LEVELS = PROCESS.levels("12")
GIVEN, NULLS = {"y": jnp.array([1.0, 2.0])}, {"y": 0.0}
X = jax.random.normal(jax.random.key(0), (2, 3, 1))
GUIDED = guidance.scales(LEVELS, scale=3.0, interval=(0, 800))  # not in the first steps


class Counted:
    """A model like a DiT: its blocks depend on tokens, time and condition; `runs` counts them."""

    def __init__(self, dtype=jnp.float32):
        self.runs, self.dtype = 0, dtype

    def __call__(self, x, *, t, y, blocks=None):
        def run(tokens):
            jax.debug.callback(self.count, jnp.float32(len(tokens) / len(X)))
            condition = (t / 1000 + y)[:, None, None].astype(self.dtype)
            return tokens + jnp.sin(0.3 * tokens + condition)

        tokens = x.astype(self.dtype)
        return 0.5 * (blocks(run, tokens) if blocks else run(tokens)).astype(jnp.float32)

    def count(self, passes):
        self.runs += float(passes)


def sample(cache, scales=None, sampler="ddim", model=None, levels=LEVELS):
    """The samples along a Cache; None: without one."""
    model = model or Counted()
    options = {} if scales is None else {"nulls": NULLS, "channels": 1}
    if cache is None:
        network = guidance.condition(model, GIVEN)
        network = network if scales is None else guidance.guide(model, GIVEN, **options)
        predict, memory = process.predictor(network, PROCESS, levels, scales=scales), None
    else:
        network = caches.network(model, GIVEN, cache, **options)
        predict = caches.predictor(network, PROCESS, levels, scales=scales)
        memory = network.start(X)
    keys = jax.random.split(jax.random.key(1), len(X))
    noise_at = samplers.make_noise(keys, X.shape[1:], levels.num_steps)
    sampler = solvers.SAMPLERS[sampler](levels)
    x = samplers.run(sampler, predict, X, noise_at=noise_at, memory=memory)
    jax.effects_barrier()
    return np.asarray(x)


@pytest.mark.parametrize("sampler", sorted(solvers.SAMPLERS))
def test_blocks_run_as_often_as_the_schedule_says(sampler):
    """Of heun, each step calls twice, but the last."""
    model = Counted()
    cache = caches.make(LEVELS, GUIDED, schedule="every:4", guidance_schedule="every:2")
    sample(cache, GUIDED, sampler, model)
    passes = solvers.SAMPLERS[sampler](LEVELS).passes
    assert model.runs == (passes * cache.passes()).sum()
    assert model.runs < 0.5 * (passes * (1 + (GUIDED != 1))).sum()


def test_steps_compute_and_forecast_what_the_schedules_say():
    cache = caches.make(LEVELS, GUIDED, schedule="every:4", guidance_schedule="every:2")
    assert (GUIDED != 1).tolist() == 3 * [False] + 9 * [True]
    computed = [0, 3, 4, 8, 11]  # step 3 too: guidance begins, and the null pass has no values
    assert np.flatnonzero(cache.given.computed).tolist() == computed
    assert np.flatnonzero(cache.null.computed).tolist() == [3, 8, 11]
    assert cache.passes().sum() == 8


@pytest.mark.parametrize("scales", [None, GUIDED], ids=["plain", "guided"])
def test_a_schedule_of_all_steps_is_no_cache(scales):
    whole = {"schedule": "steps:0-11", "guidance_schedule": "every:1"}
    assert caches.make(LEVELS, scales, **whole) is None
    forced = caches.make(LEVELS, scales, schedule="every:2")
    everything = np.ones(12, bool) if scales is None else GUIDED != 1
    forced = forced._replace(
        given=forced.given._replace(computed=np.ones(12, bool)),
        null=forced.null._replace(computed=everything if scales is not None else ~everything),
    )
    np.testing.assert_allclose(sample(forced, scales), sample(None, scales), rtol=1e-6, atol=1e-6)


def by_hand(computed, null_computed, scales):
    """DDIM whose forecasts repeat the last residual, and the last difference to the null pass."""
    model, sampler, state = Counted(), samplers.ddim(LEVELS), samplers.State(X)
    absent, kept = {"y": jnp.zeros(2)}, {}
    for i in range(LEVELS.num_steps):

        def network(x, t, i=i):
            if computed[i]:
                kept["given"] = caches.compute(model, x, t, GIVEN)[1]
            out = caches.reuse(model, x, t, GIVEN, kept["given"])
            if scales[i] == 1:
                return out
            if null_computed[i]:
                kept["null"] = caches.compute(model, x, t, absent)[1] - kept["given"]
            null_out = caches.reuse(model, x, t, absent, kept["given"] + kept["null"])
            return null_out + jnp.float32(scales[i]) * (out - null_out)

        state = sampler.step(process.predictor(network, PROCESS, LEVELS), state, i, None)
    return np.asarray(state.x)


@pytest.mark.parametrize("scales", [np.ones(12), GUIDED], ids=["plain", "guided"])
def test_order_0_repeats_what_was_computed_last(scales):
    options = {"schedule": "every:3", "guidance_schedule": "every:2", "order": 0}
    cache = caches.make(LEVELS, scales, **options)
    expected = by_hand(cache.given.computed, cache.null.computed, scales)
    np.testing.assert_allclose(sample(cache, scales), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_more_computed_steps_and_higher_orders_come_closer(sampler):
    levels = PROCESS.levels("40")
    exact = sample(None, None, sampler, levels=levels)

    def error(schedule, order):
        cache = caches.make(levels, None, schedule=schedule, order=order)
        return np.abs(sample(cache, None, sampler, levels=levels) - exact).mean()

    errors = [error(f"every:{n}", 1) for n in (8, 2)]
    assert errors[0] > 4 * errors[1] > 0
    assert error("every:8", 0) > 1.3 * errors[0]


def test_the_null_pass_alone_can_be_forecast():
    errors, passes, exact = [], [], sample(None, GUIDED)
    for every in (6, 3, 2):
        cache = caches.make(
            LEVELS, GUIDED, schedule="none", guidance_schedule=f"every:{every}", order=1
        )
        assert cache.given.computed.all() and cache.keeps() == {"null": 2}
        errors.append(np.abs(sample(cache, GUIDED) - exact).mean())
        passes.append(int(cache.passes().sum()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert passes == [15, 16, 17]


def test_a_cache_holds_what_is_forecast_only():
    options = {"schedule": "every:3", "order": 2}
    assert caches.make(LEVELS, None, **options).keeps() == {"given": 3}
    cache = caches.make(LEVELS, GUIDED, **options)
    assert cache.keeps() == {"given": 3, "null": 3} and cache.num_kept == 6
    model = Counted(jnp.bfloat16)
    memory = caches.network(model, GIVEN, cache, nulls=NULLS, channels=1).start(X)
    assert [each.shape for each in memory.values()] == 2 * [(3, 2, 3, 1)]
    assert {each.dtype for each in memory.values()} == {jnp.dtype("bfloat16")}
    rough, exact = sample(cache, GUIDED, model=model), sample(cache, GUIDED)
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())  # bf16 has 8 bits


@pytest.mark.slow
def test_what_the_compiler_counts_for_xl2():
    """A forecast call runs no block: its FLOPs and bytes are those of embedders and final layer."""
    config = dit.configure("XL", 2)
    apply = dit.make_apply(config, dtype="bfloat16", unroll=True)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    residual = jax.ShapeDtypeStruct((8, config.num_tokens, config.hidden_size), jnp.bfloat16)
    x, time, given = jnp.zeros((8, 32, 32, 4)), jnp.zeros(()), {"y": jnp.zeros(8, jnp.int32)}

    def computed(params):
        return caches.compute(functools.partial(apply, params), x, time, given)

    def forecast(params, residual):
        return caches.reuse(functools.partial(apply, params), x, time, given, residual)

    counts = []
    for run, args, work in (
        (computed, (params,), flops.forward_flops(config)),
        (forecast, (params, residual), flops.forecast_flops(config)),
    ):
        counts.append(jax.jit(run).lower(*args).compile().cost_analysis())
        per_image = counts[-1]["flops"] / 8
        print(f"{per_image:.4g} FLOPs for an image, {counts[-1]['bytes accessed']:.4g} bytes")
        assert work <= per_image < 1.3 * work  # and elementwise work
    assert counts[1]["bytes accessed"] < 0.005 * counts[0]["bytes accessed"]
