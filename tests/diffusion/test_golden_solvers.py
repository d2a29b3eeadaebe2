"""Samplers beside the numbers of public reference code in `testdata/golden_solvers.npz`.

diffusers 0.42.1 (dpm2, unipc2, euler, heun, ddim), SiT 947f95b (sit), guided-diffusion
(ddim_reverse) and REPA 67f7145 (guided), in float64, with tanh(0.3 x + 0.1 time) in the place of a
network. That is no denoiser, so that x may end near 300: errors are relative to the largest |x|.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import flow, guidance, inversion, process, samplers, solvers
from dit_jax.diffusion.process import Levels, Prediction, Rates, at

BOUND = 1e-5  # float32
SPACINGS = ("linspace", "leading", "trailing")


def few(cases, fast):
    """pytest's parameters of the cases, of which all but those that are `fast(*case)` are slow."""
    return [
        pytest.param(
            *case, marks=() if fast(*case) else pytest.mark.slow, id=".".join(map(str, case))
        )
        for case in cases
    ]


TENS = pytest.mark.parametrize("count", [10, pytest.param(20, marks=pytest.mark.slow)])
ELEVENS = pytest.mark.parametrize("count", [11, pytest.param(21, marks=pytest.mark.slow)])
SOLVERS = {
    "dpm1": solvers.euler,
    "ddim": samplers.ddim,
    "dpm2": solvers.dpm2m,
    "unipc2": solvers.unipc,
    "euler": solvers.euler,
    "heun": solvers.heun,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "testdata" / "golden_solvers.npz") as file:
        return dict(file)


def on_ddpm(sigmas, time):
    """Levels of diffusers, whose sigma is sigma / alpha."""
    alpha = 1 / np.sqrt(1 + sigmas**2)
    rates = Rates(sigmas, alpha, np.zeros_like(alpha), np.ones_like(alpha))
    return Levels(alpha, sigmas * alpha, np.append(time, 0.0)[: len(sigmas)], rates)


def on_linear_path(sigmas, time):
    ones = np.ones_like(sigmas)
    return Levels(1 - sigmas, sigmas, np.append(time, 0.0), Rates(sigmas, ones, -ones, ones))


def predict_of(levels, kind, rate):
    """predict of a network tanh(0.3 x + rate time) that predicts noise, v, x0 or the velocity."""

    def predict(x, i, step=None):
        out = jnp.tanh(np.float32(0.3) * x + at(rate * levels.time, i, x))
        alpha, sigma = at(levels.alpha, i, x), at(levels.sigma, i, x)
        if kind == "epsilon":
            return Prediction((x - sigma * out) / alpha, out)
        if kind == "v_prediction":
            return Prediction(alpha * x - sigma * out, sigma * x + alpha * out)
        if kind == "sample":
            return Prediction(out, (x - alpha * out) / sigma)
        return Prediction(x - sigma * out, x + alpha * out)

    return predict


def run(sampler, predict, x, **options):
    return jax.jit(functools.partial(samplers.run, sampler, predict, **options))(x)


@TENS
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "solver, spacing",
    few(
        [
            *((name, each) for name in ("dpm1", "dpm2", "euler", "heun") for each in SPACINGS),
            *(("unipc2", ""), ("ddim", "")),
        ],
        lambda solver, spacing: spacing in ("trailing", ""),
    ),
)
def test_diffusers(golden, check_close, solver, spacing, kind, count):
    """euler and heun of diffusers begin at x = alpha y, where y is noise of their own scale."""
    place = f"{spacing}.{count}" if spacing else str(count)
    grid = {"dpm1": "dpm", "dpm2": "dpm", "unipc2": "unipc"}.get(solver, solver)
    time, x = golden[f"{grid}.{place}.timesteps"], golden["solver.x"]
    if solver == "heun":
        time = np.append(time[:1], time[1::2])  # it has each twice, but for the first
    if solver == "ddim":
        beta = np.linspace(1e-4, 0.02, 1000)
        alpha_bar = np.cumprod(1 - beta)[time.astype(int)]
        sigmas = np.append(np.sqrt(1 / alpha_bar - 1), 0.0)
    else:
        sigmas = golden[f"{grid}.{place}.sigmas"]
    if solver == "heun":
        sigmas = np.append(sigmas[:1], sigmas[1::2])
    if solver in ("euler", "heun"):
        start = sigmas[0] if spacing != "leading" else np.sqrt(sigmas[0] ** 2 + 1)
        x = x * np.float32(start / np.sqrt(sigmas[0] ** 2 + 1))
    levels = on_ddpm(sigmas, time)
    actual = run(SOLVERS[solver](levels), predict_of(levels, kind, 0.001), x)
    name = f"{solver}.{'bh2.' if solver == 'unipc2' else ''}{kind}.{place}"
    check_close(name, actual, golden[name], BOUND)


@pytest.mark.parametrize(
    "name, kind, grid",
    [
        ("dpm2.sigma_min.full_order.10", "epsilon", "dpm2.sigma_min.10"),
        ("dpm2.sigma_min.full_order.20", "epsilon", "dpm2.sigma_min.20"),
        ("dpm2.sigma_min.20", "epsilon", "dpm2.sigma_min.20"),
        ("dpm2.karras.10", "epsilon", "dpm2.karras.10"),
        ("dpm2.karras.20", "epsilon", "dpm2.karras.20"),
        ("dpm2.cosine.10", "epsilon", "dpm2.cosine.10"),
        ("dpm2.cosine.20", "epsilon", "dpm2.cosine.20"),
        ("dpm2.sample.10", "sample", "dpm.trailing.10"),
        ("dpm2.sample.20", "sample", "dpm.trailing.20"),
        ("dpm2.euler_at_final.10", "epsilon", "dpm.trailing.10"),
        ("dpm2.euler_at_final.20", "epsilon", "dpm.trailing.20"),
    ],
)
def test_other_grids_and_predictions(golden, check_close, name, kind, grid):
    """A last sigma above 0, Karras's grid, the cosine schedule, and a network that predicts x0."""
    levels = on_ddpm(golden[f"{grid}.sigmas"], golden[f"{grid}.timesteps"])
    actual = run(solvers.dpm2m(levels), predict_of(levels, kind, 0.001), golden["solver.x"])
    check_close(name, actual, golden[name], BOUND)


@TENS
@pytest.mark.parametrize("shift", ["1.0", "3.0"])
@pytest.mark.parametrize("solver, grid", [("dpm2", "dpm"), ("unipc2", "unipc")])
def test_multistep_solvers_on_the_linear_path(golden, check_close, solver, grid, shift, count):
    place, name = f"{grid}.flow{shift}.{count}", f"{solver}.flow{shift}.{count}"
    levels = on_linear_path(golden[f"{place}.sigmas"], golden[f"{place}.timesteps"])
    predict = predict_of(levels, "velocity", 0.0001)
    check_close(
        name, run(SOLVERS[solver](levels), predict, golden["solver.x"]), golden[name], BOUND
    )


@TENS
def test_one_iteration_of_the_inversion_is_that_of_diffusers(golden, check_close, count):
    """For noise; what predicts v is read there at the step's end, though asked at its start."""
    time = golden[f"ddim.{count}.timesteps"]
    np.testing.assert_array_equal(golden[f"ddim_inverse.{count}.timesteps"], time[::-1])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[time.astype(int)]
    levels = on_ddpm(np.append(np.sqrt(1 / alpha_bar - 1), 0.0), time)
    predict = predict_of(levels, "epsilon", 0.001)
    invert = jax.jit(lambda x: inversion.run(predict, x, levels, iterations=1))
    name = f"ddim_inverse.epsilon.{count}"
    check_close(name, invert(golden["solver.x"]), golden[name], BOUND)


@pytest.mark.parametrize("spacing", ["10", "ddim20"])
def test_euler_along_rising_levels_is_the_reversed_ddim_of_guided_diffusion(
    golden, check_close, spacing
):
    name = f"ddim_reverse.{spacing}"
    time = golden[f"{name}.timesteps"]
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[time]
    sigmas = np.sqrt(1 / alpha_bar - 1)
    levels = on_ddpm(sigmas, time)
    up = run(solvers.euler(levels), predict_of(levels, "epsilon", 0.001), golden[f"{name}.x"])
    check_close(name, up, golden[name], BOUND)
    levels = on_ddpm(sigmas[::-1], time[::-1])
    back = run(samplers.ddim(levels), predict_of(levels, "epsilon", 0.001), golden[name])
    check_close(f"{name}.and_back", back, golden[f"{name}.and_back"], BOUND)


def sit(path, prediction, times):
    """(levels, predict) of SiT's networks, which get 1 - t, and give the velocity by it.

    The levels go beyond the times, so that no step between these is the last one.
    """
    made = flow.Flow(path, prediction, time_scale=1.0, reverse_time=True)
    time = np.append(times, times[-1] - 0.1)
    alpha, sigma, d_alpha, d_sigma = flow.PATHS[path](time, np)
    levels = Levels(alpha, sigma, time, Rates(time, np.ones_like(time), d_alpha, d_sigma))

    def network(x, t):
        return jnp.tanh(np.float32(0.3) * x + np.float32(0.1) * made.network_time(t))

    return levels, process.predictor(network, made, levels)


def first_and_last(prediction):
    return (1.0, 0.0) if prediction == "velocity" else (0.999, 0.001)


@ELEVENS
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("method, solver", [("euler", solvers.euler), ("heun2", solvers.heun)])
def test_the_ode_of_sit(golden, check_close, path, prediction, method, solver, count):
    times = np.linspace(*first_and_last(prediction), count)
    levels, predict = sit(path, prediction, times)
    name = f"sit.{ {'linear': 'Linear', 'gvp': 'GVP'}[path] }.{prediction}.ode{count}.{method}"
    sampler = solver(levels)._replace(num_steps=count - 1)
    way = run(sampler, predict, golden[f"sit.ode{count}.x"], trajectory=True)
    check_close(name, way[-1], golden[name], BOUND)
    if prediction == "velocity":
        check_close(f"{name}.trajectory", way, golden[f"{name}.trajectory"], BOUND)


@ELEVENS
@pytest.mark.parametrize(
    "path, prediction, form",
    few(
        [
            *(
                (path, each, "sigma")
                for path in ("Linear", "GVP")
                for each in ("velocity", "noise")
            ),
            *(("Linear", "noise", "SBDM"), ("GVP", "noise", "SBDM")),
            *(("Linear", "velocity", form) for form in ("constant", "linear", "decreasing")),
            ("Linear", "velocity", "increasing-decreasing"),
        ],
        lambda path, prediction, form: path == "GVP",
    ),
)
def test_the_sde_of_sit(golden, check_close, path, prediction, form, count):
    """With its last step, the mean of one that is 0.04 wide."""
    made = flow.Flow(path.lower(), prediction, time_scale=1.0, reverse_time=True)
    levels = made.levels_at(np.linspace(first_and_last(prediction)[0], 0.04, count))
    sampler = solvers.sde(levels, form=form.lower().replace("-", "_"))
    noise = jnp.asarray(golden[f"sit.sde{count}.noise"])

    def network(x, t):
        return jnp.tanh(np.float32(0.3) * x + np.float32(0.1) * made.network_time(t))

    predict = process.predictor(network, made, levels)
    x = golden[f"sit.ode{count}.x"]
    actual = jax.jit(lambda x: samplers.run(sampler, predict, x, noise_at=lambda i: noise[i]))(x)
    name = f"sit.{path}.{prediction}.sde{count}.Euler.{form}.Mean"
    check_close(name, actual, golden[name], BOUND)


@pytest.mark.parametrize("row", range(3))
def test_the_bias_of_the_sde(golden, row):
    """Mean and deviation of what it makes of data N(0.4, 0.3^2) with the exact score."""
    (count, mean, std), data = golden["weak.em_sigma_mean"][row], golden["weak.mean_std_of_data"]
    data_mean, data_std = data
    levels = flow.Flow("linear").levels_at(np.linspace(1, 0.04, int(count)))
    sampler = solvers.sde(levels)

    def predict(x, i):
        alpha, sigma = at(levels.alpha, i, x), at(levels.sigma, i, x)
        marginal = alpha**2 * np.float32(data_std**2) + sigma**2
        noise = sigma / marginal * (x - alpha * np.float32(data_mean))
        gain = alpha * np.float32(data_std**2) / marginal
        x0 = np.float32(data_mean) + gain * (x - alpha * np.float32(data_mean))
        return process.Prediction(x0, noise)

    @jax.jit
    def step(i):  # is affine in x and the added noise
        x, noise = jnp.array([[0.0], [1.0], [0.0]]), jnp.array([[0.0], [0.0], [1.0]])
        return sampler.step(predict, samplers.State(x), i, noise).x[:, 0]

    found, variance = 0.0, 1.0
    for i in range(sampler.num_steps):
        shift, moved, spread = np.float64(step(i))
        gain, spread = moved - shift, spread - shift
        found, variance = gain * found + shift, gain**2 * variance + spread**2
    np.testing.assert_allclose([found, variance**0.5], [mean, std], atol=2e-6)  # float32


@TENS
@pytest.mark.parametrize(
    "low, high", few([(0.0, 1.0), (0.25, 0.75), (0.0, 0.7)], lambda low, high: low)
)
@pytest.mark.parametrize(
    "name, solver", [("euler", solvers.euler), ("heun", solvers.heun), ("em", solvers.sde)]
)
def test_guidance_in_an_interval(golden, check_close, name, solver, low, high, count):
    """The time at which a step begins decides for both calls of Heun's method."""
    made = flow.Flow("linear", "velocity", time_scale=1.0)
    times = np.linspace(1, 0.04, count) if name == "em" else np.linspace(1, 0, count + 1)[:-1]
    levels = made.levels_at(times)

    def model(x, t, y):
        given, null = (np.float32(0.3), np.float32(0.1)), (np.float32(0.2), np.float32(-0.1))
        t = t.reshape(-1, 1, 1, 1)
        y = y.reshape(-1, 1, 1, 1)
        return jnp.where(y == 0, *(jnp.tanh(of_x * x + of_t * t) for of_x, of_t in (given, null)))

    x, noise = golden["guided.x"], jnp.asarray(golden["guided.noise"])
    given = {"y": np.zeros(len(x), np.int32)}
    network = guidance.guide(model, given, nulls={"y": 1}, channels=x.shape[-1])
    scales = guidance.scales(levels, scale=1.8, interval=(low, high))
    predict = process.predictor(network, made, levels, scales=scales)
    sampler = solver(levels)
    actual = jax.jit(lambda x: samplers.run(sampler, predict, x, noise_at=lambda i: noise[i]))(x)
    key = f"guided.{name}.{low}.{high}.{count}"
    check_close(key, actual, golden[key], BOUND)
