"""Properties of all samplers: orders, Gaussian data, constants, guidance, batches and counts."""

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import settings
from dit_jax.diffusion import (
    ddpm,
    flow,
    guidance,
    inversion,
    samplers,
    schedules,
    solvers,
    spacings,
)
from dit_jax.diffusion.process import Levels, Prediction, Rates, at, predictor
from dit_jax.errors import UserError

DDPM, LINEAR, GVP = ddpm.DDPM(schedules.linear()), flow.Flow("linear"), flow.Flow("gvp")
PROCESSES = {"ddpm": DDPM, "linear": LINEAR, "gvp": GVP}
DETERMINISTIC = ("ddim", "euler", "heun", "dpm2m", "unipc")
STOCHASTIC = ("ddpm", "sde")


FEW_STEPS = [  # the table of the README
    ("ddim", "linspace", 0.046),
    ("ddim", "trailing", 0.045),
    ("ddim", "log_snr", 0.055),
    ("ddim", "path", 0.026),
    ("heun", "linspace", 0.089),
    ("heun", "trailing", 0.070),
    ("heun", "log_snr", 0.049),
    ("heun", "path", 0.026),
    ("dpm2m", "linspace", 0.124),
    ("dpm2m", "trailing", 0.038),
    ("dpm2m", "log_snr", 0.008),
    ("dpm2m", "path", 0.016),
    ("unipc", "linspace", 0.126),
    ("unipc", "trailing", 0.039),
    ("unipc", "log_snr", 0.003),
    ("unipc", "path", 0.016),
]


def few(cases, *, fast):
    """pytest's parameters of the cases, of which all but those in `fast` are slow."""
    return [
        pytest.param(*case, marks=() if case in fast else pytest.mark.slow, id="-".join(case[:2]))
        for case in cases
    ]


def levels_of(process, num_steps, sampler):
    last_step = 0.04 if sampler == "sde" else 0.0
    return spacings.levels(process, num_steps, last_step=last_step)


def gaussian(mean, std, levels, look_up=at):
    """predict of data N(mean, std^2), exact."""

    def predict(x, i, step=None):
        alpha, sigma = look_up(levels.alpha, i, x), look_up(levels.sigma, i, x)
        marginal = alpha**2 * std**2 + sigma**2
        centred = x - alpha * mean
        return Prediction(mean + alpha * std**2 / marginal * centred, sigma / marginal * centred)

    return predict


def end_of_gaussian(mean, std, levels, x, last=-1):
    """Where the exact solution of the differential equation is at a level, from x at level 0."""
    first, end = (levels.alpha[i] ** 2 * std**2 + levels.sigma[i] ** 2 for i in (0, last))
    return levels.alpha[last] * mean + np.sqrt(end / first) * (x - levels.alpha[0] * mean)


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def run(sampler, predict, x, seed=0):
    noise_at = samplers.make_noise(jax.random.split(jax.random.key(seed), len(x)), x.shape[1:], 999)
    return jax.jit(lambda x: samplers.run(sampler, predict, x, noise_at=noise_at))(x)


def test_the_names_are_those_of_the_settings():
    assert tuple(solvers.SAMPLERS) == settings.SAMPLERS
    assert tuple(solvers.WEIGHTS) == settings.SDE_NOISES
    assert tuple(guidance.SCHEDULES) == settings.CFG_SCHEDULES


def evenly_in_log_snr(count):
    """Levels from log(alpha / sigma) = -3 to 3 in `count` steps, and one step further."""
    half = -3 + 6 / count * np.arange(count + 2)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * half)), 1 / np.sqrt(1 + np.exp(2 * half))
    ratio = sigma / alpha
    return Levels(alpha, sigma, half, Rates(ratio, alpha, 0 * ratio, 1 + 0 * ratio))


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm2m", 2), ("unipc", 3)])
def test_the_order_of_convergence(name, order, monkeypatch):
    """In float64, and without the step to the data, which is of order 1."""

    def look_up(table, i, x):
        return jnp.asarray(table, jnp.float64)[i]

    def error(count):
        levels = evenly_in_log_snr(count)
        sampler = solvers.SAMPLERS[name](levels)._replace(num_steps=count)
        predict, x = gaussian(0.4, 0.3, levels, look_up), np.linspace(-1, 1, 7)
        found = jax.jit(lambda x: samplers.run(sampler, predict, x))(x)
        return np.abs(found - end_of_gaussian(0.4, 0.3, levels, x, count)).max()

    monkeypatch.setattr(solvers, "at", look_up)
    jax.config.update("jax_enable_x64", True)
    try:
        errors = [error(count) for count in (80, 160)]
    finally:
        jax.config.update("jax_enable_x64", False)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_data_that_are_gaussian(name, process):
    """Samples are those of the exact differential equation; float32, and errors of the method."""
    levels, x = PROCESSES[process].levels("250"), normal(0, (50, 3))
    actual = run(solvers.SAMPLERS[name](levels), gaussian(0.4, 0.3, levels), x)
    np.testing.assert_allclose(actual, end_of_gaussian(0.4, 0.3, levels, x), atol=0.02)


@pytest.mark.parametrize(
    "name, process",
    few(
        [(name, process) for name in STOCHASTIC for process in PROCESSES],
        fast=[("ddpm", "ddpm"), ("sde", "linear")],
    ),
)
def test_samples_of_data_that_are_gaussian(name, process):
    """Its posterior's variance is that of ddpm without a learned one, a little too small."""
    levels = levels_of(PROCESSES[process], "400", name)
    predict = gaussian(0.4, 0.3, levels)
    x = run(solvers.SAMPLERS[name](levels), predict, normal(0, (64, 256)))
    assert float(x.mean()) == pytest.approx(0.4, abs=4 * 0.3 / 128)
    # SiT's last step is too wide: 0.2915 at any number of steps.
    assert float(x.std()) == pytest.approx(0.3, rel=4 / (128 * np.sqrt(2)) + 0.04)


@pytest.mark.parametrize("name", settings.SAMPLERS)
def test_a_velocity_that_is_constant(name):
    """The network is always off by the same: the mean is, and the differential equation's std."""
    levels = levels_of(LINEAR, "30", name)
    constant = np.float32([0.5, -2.0])  # by 1 - t: from noise to data

    def network(x, t):
        return jnp.broadcast_to(-constant, x.shape)

    x = normal(0, (4096, 2))
    actual = run(solvers.SAMPLERS[name](levels), predictor(network, LINEAR, levels), x)
    if name in DETERMINISTIC:
        np.testing.assert_allclose(actual, x + constant, atol=1e-5)  # mean c and variance 1
    else:  # no score has this velocity: only the mean is right
        np.testing.assert_allclose(actual.mean(axis=0), constant, atol=4 / 64)


MEANS, STD = np.float32([[-0.9, -0.2, 0.7]]), np.float32(0.08)  # of a mixture of three Gaussians
SHARES = np.float32([[0.5, 0.2, 0.3]])


def predict_mixture(levels):
    """predict of the mixture, exact. x (N, 1)."""

    def predict(x, i, step=None):
        alpha, sigma = at(levels.alpha, i, x), at(levels.sigma, i, x)
        variance = alpha**2 * STD**2 + sigma**2
        away = x - alpha * MEANS  # (N, 3)
        log_weight = np.log(SHARES) - away**2 / (2 * variance)
        log_weight = log_weight - log_weight.max(axis=1, keepdims=True)
        weight = jnp.exp(jnp.maximum(log_weight, -60.0))
        weight = weight / weight.sum(axis=1, keepdims=True)
        x0 = (weight * (MEANS + alpha * STD**2 / variance * away)).sum(axis=1, keepdims=True)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


@functools.cache
def quantiles(count=1000):
    """The middle quantiles of a standard normal, and of the mixture: (count, 1), (count,)."""
    parts, normal = (np.arange(count) + 0.5) / count, NormalDist()
    grid = np.linspace(-2, 2, 4001)
    below = sum(
        share * np.array([normal.cdf((x - mean) / STD) for x in grid])
        for share, mean in zip(SHARES[0].tolist(), MEANS[0].tolist(), strict=True)
    )
    start = np.float32([normal.inv_cdf(x) for x in parts])
    return start[:, None], np.interp(parts, below, grid)


@pytest.mark.parametrize("name, spacing, expected", few(FEW_STEPS, fast=FEW_STEPS[::5]))
def test_few_steps_on_a_mixture(name, spacing, expected):
    """The 1-Wasserstein distance after 20 network calls: the table of the README."""
    process, spacing = (LINEAR, "linspace") if spacing == "path" else (DDPM, spacing)
    levels = spacings.levels(process, "10" if name == "heun" else "20", spacing=spacing)
    start, exact = quantiles()
    found = run(solvers.SAMPLERS[name](levels), predict_mixture(levels), start)
    distance = np.abs(np.sort(np.asarray(found)[:, 0]) - exact).mean()
    assert distance == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("process", ["ddpm", "linear"])
def test_euler_is_ddim(process):
    levels, x = PROCESSES[process].levels("10"), normal(0, (5, 3))
    predict = gaussian(0.4, 0.3, levels)
    expected = run(samplers.ddim(levels), predict, x)
    np.testing.assert_allclose(run(solvers.euler(levels), predict, x), expected, atol=1e-6)


@pytest.mark.parametrize("name", settings.SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    levels = levels_of(LINEAR, "4", name)
    sampler, predict = solvers.SAMPLERS[name](levels), gaussian(0.0, 0.5, levels)
    keys, x = jax.random.split(jax.random.key(0), 4), normal(1, (4, 2, 3))

    @jax.jit
    def draw(x, keys):
        noise_at = samplers.make_noise(keys, (2, 3), levels.num_steps)
        return samplers.run(sampler, predict, x, noise_at=noise_at)

    np.testing.assert_allclose(draw(x, keys)[2:3], draw(x[2:3], keys[2:3]), atol=1e-6)
    assert sampler.stochastic == (name in STOCHASTIC)
    same_start = draw(np.repeat(x[:1], 4, axis=0), keys)
    assert (np.abs(same_start[:1] - same_start[1:]).max() > 0.01) == sampler.stochastic


@pytest.mark.parametrize("name", settings.SAMPLERS)
def test_a_sampler_calls_the_network_as_often_as_it_says(name):
    """And first for the state's x, from which a trajectory has its x0."""
    levels, seen = levels_of(LINEAR, "5", name), []
    sampler, exact = solvers.SAMPLERS[name](levels), gaussian(0.4, 0.3, levels)

    def predict(x, i, step=None):
        step = i if step is None else step
        jax.debug.callback(lambda i, step: seen.append((int(i), int(step))), i, step)
        return exact(x, i)

    jax.block_until_ready(run(sampler, predict, normal(0, (2, 3))))
    jax.effects_barrier()
    expected = [(i + k, i) for i, calls in enumerate(sampler.passes) for k in range(calls)]
    assert sorted(seen) == sorted(expected)
    assert len(seen) == sampler.passes.sum() == (9 if name == "heun" else 5)


@pytest.mark.parametrize("name", ["dpm2m", "unipc"])
def test_a_restart_forgets_the_steps_before(name):
    """What is sampled from a restart on is what a sampler makes that begins there."""
    levels = DDPM.levels("8")
    restarts = np.arange(8) == 3
    predict, x = gaussian(0.4, 0.3, levels), jnp.asarray(normal(0, (2, 3)))
    sampler = solvers.SAMPLERS[name](levels, restarts=restarts)
    state = jax.lax.fori_loop(
        0, 3, lambda i, state: sampler.step(predict, state, i, None), sampler.init(x)
    )
    whole = run(sampler, predict, x)
    part = Levels(*(table[3:] for table in levels[:3]), Rates(*(t[3:] for t in levels.rates)))
    rest = run(solvers.SAMPLERS[name](part), gaussian(0.4, 0.3, part), state.x)
    np.testing.assert_allclose(whole, rest, atol=1e-6)
    assert np.abs(whole - run(solvers.SAMPLERS[name](levels), predict, x)).max() > 1e-4


@pytest.mark.parametrize("process", ["ddpm", "linear"])
@pytest.mark.parametrize("name", ["dpm2m", "unipc", "sde"])
def test_tables_are_finite(name, process):
    """Where alpha or sigma is 0 the logarithm of their ratio is not."""
    for count in ("2", "3"):
        levels = levels_of(PROCESSES[process], count, name)
        x = run(solvers.SAMPLERS[name](levels), gaussian(0.4, 0.3, levels), normal(0, (2, 3)))
        assert np.isfinite(x).all()


@pytest.mark.parametrize(
    "process, form, message",
    [
        (DDPM, "constant", "sde_noise must be sigma or sbdm for a process without a path, got co"),
        (LINEAR, "sbdm", "sde_noise must be finite where sampling begins, got sbdm at alpha 0"),
    ],
)
def test_forms_of_noise_that_do_not_exist(process, form, message):
    with pytest.raises(UserError, match=message):
        solvers.sde(process.levels("10"), form=form)


@pytest.mark.parametrize("process", PROCESSES)
def test_an_inversion_is_undone_by_ddim(process):
    """The more iterations, the closer."""
    levels = PROCESSES[process].levels("20")
    predict, x0 = gaussian(0.4, 0.3, levels), normal(0, (5, 3))
    errors = []
    for iterations in (1, 3, 12):
        noise = jax.jit(
            functools.partial(inversion.run, predict, levels=levels, iterations=iterations)
        )(x0)
        errors.append(np.abs(run(samplers.ddim(levels), predict, noise) - x0).max())
    assert errors[2] < 2e-4 and errors[2] < errors[1] < errors[0]
    assert errors[0] > 0.01
