import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, gaussian, losses, samplers, schedules, solvers
from dit_jax.diffusion.process import predictor
from dit_jax.errors import UserError

SCHEDULE = schedules.linear()
PROCESS = ddpm.DDPM(SCHEDULE)
SHAPE = (4, 2, 3, 2)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def step_of(levels, t):
    """The level of a time."""
    return levels.num_steps - jnp.searchsorted(jnp.float32(levels.time[-2::-1]), t) - 1


def network_of(x0, levels, code=None):
    """network(x, t) -> out of a model that knows x0."""

    def network(x, t):
        i = step_of(levels, t)
        alpha, sigma = jnp.float32(levels.alpha)[i], jnp.float32(levels.sigma)[i]
        noise = (x - alpha * x0) / sigma
        if code is None:
            return noise
        return jnp.concatenate([noise, jnp.full_like(noise, code)], axis=-1)

    return network


@pytest.mark.parametrize("spacing", ["10", "ddim50", "1000"])
def test_levels_are_the_kept_steps_from_noise_to_data(spacing):
    levels, short = PROCESS.levels(spacing), schedules.respace(SCHEDULE, spacing)
    assert levels.num_steps == short.num_steps
    np.testing.assert_array_equal(levels.time[:-1], short.timestep[::-1])
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1, rtol=1e-14)
    assert (np.diff(levels.alpha) > 0).all()
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)


@pytest.mark.parametrize("spacing", ["10", "250", "1000"])
def test_levels_read_as_the_respaced_schedule_to_the_last_bit_of_float32(spacing):
    """So that samples of a run are what they were when a schedule was sampled."""
    short, levels = schedules.respace(SCHEDULE, spacing), PROCESS.levels(spacing)
    x, out = normal(0), normal(1, (*SHAPE[:-1], 4))
    read = PROCESS.reader(levels, clip_x0=False)
    for i in {0, 1, levels.num_steps // 2, levels.num_steps - 1}:
        t = np.full(len(x), levels.num_steps - 1 - i)
        noise, code = losses.split_output(jnp.asarray(out), 2)
        x0, read_noise, log_variance = read(jnp.asarray(out), jnp.asarray(x), i)
        np.testing.assert_array_equal(x0, gaussian.x0_from_noise(short, x, t, noise))
        np.testing.assert_array_equal(read_noise, noise)
        expected = gaussian.reverse_log_variance(short, x, t, code)
        np.testing.assert_array_equal(log_variance, expected)


@pytest.mark.parametrize("name, eta", [("ddpm", None), ("ddim", 0.0), ("ddim", 0.7)])
def test_clip_x0_is_a_model_of_the_clipped_x0(name, eta):
    levels = PROCESS.levels("10")
    sampler = solvers.SAMPLERS[name](levels, **({} if eta is None else {"eta": eta}))
    noise = jnp.asarray(normal(2, (levels.num_steps, *SHAPE)))

    def run(x0, clip_x0=False):
        predict = predictor(network_of(x0, levels, 0.0), PROCESS, levels, clip_x0=clip_x0)
        return samplers.run(sampler, predict, normal(1), noise_at=lambda i: noise[i])

    x0 = 2 * normal(0)
    assert np.abs(x0).max() > 1
    np.testing.assert_allclose(run(x0, clip_x0=True), run(np.clip(x0, -1, 1)), atol=1e-5)
    np.testing.assert_allclose(run(x0), x0, atol=1e-5)


def test_ddpm_with_a_fixed_variance_samples_a_gaussian():
    """beta is the right variance of many small steps towards data of variance 1."""
    levels, mean = PROCESS.levels("1000"), 0.5

    def network(x, t):  # the expected noise of data N(mean, 1)
        i = step_of(levels, t)
        return jnp.float32(levels.sigma)[i] * (x - jnp.float32(levels.alpha)[i] * mean)

    keys = jax.random.split(jax.random.key(0), 256)
    noise_at = samplers.make_noise(keys, (4, 4, 4), levels.num_steps)
    predict = predictor(network, PROCESS, levels)
    x = samplers.run(samplers.ddpm(levels), predict, noise_at(-1), noise_at=noise_at)
    assert float(x.mean()) == pytest.approx(mean, abs=4 / 128)
    assert float(x.std()) == pytest.approx(1, rel=4 / (128 * np.sqrt(2)))


def test_the_network_is_asked_at_the_steps_that_it_was_trained_on():
    seen = []

    def network(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return jnp.zeros_like(x)

    levels = PROCESS.levels("10")
    samplers.run(samplers.ddim(levels), predictor(network, PROCESS, levels), jnp.ones(SHAPE))
    jax.effects_barrier()
    assert sorted(seen) == schedules.respace(SCHEDULE, "10").timestep.tolist()


def test_times_are_uniform_steps():
    t = PROCESS.draw_time(jax.random.key(0), (20_000,))
    assert (int(t.min()), int(t.max())) == (0, PROCESS.last_time)
    assert float(t.mean()) == pytest.approx(499.5, abs=10)


@pytest.mark.parametrize("shape", [SHAPE, (4, 6, 1), (4, 2, 2, 2, 1)])
def test_losses_are_of_the_corrupted_x0_on_any_grid(shape):
    x0, noise, t = normal(0, shape), normal(1, shape), np.array([0, 10, 500, 999])

    def network(x_t, t):
        np.testing.assert_array_equal(x_t, gaussian.q_sample(SCHEDULE, x0, t, noise))
        return jnp.concatenate([noise + 2, jnp.zeros(shape)], axis=-1)

    terms = PROCESS.losses(network, x0, t, noise)
    np.testing.assert_allclose(terms["mse"], np.full(4, 4.0), rtol=1e-5)
    np.testing.assert_allclose(terms["loss"], terms["mse"] + terms["vb"], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_learned_variance_has_one_bound_whatever_is_predicted(prediction):
    """And the bound trains the code only."""
    x0, noise, guess, t = normal(0), normal(1), normal(2), np.array([0, 10, 500, 999])
    alpha, sigma = (np.float32(a).reshape(-1, 1, 1, 1) for a in PROCESS.alpha_sigma(t))
    x = gaussian.q_sample(SCHEDULE, x0, t, noise)
    implied = (x - alpha * guess) / sigma
    outs = {"noise": implied, "v": alpha * implied - sigma * guess, "x0": guess}

    def bound(out, name):
        out = jnp.concatenate([out, 0.3 * normal(3)], axis=-1)
        return ddpm.DDPM(SCHEDULE, name).losses(lambda x, t: out, x0, t, noise)["vb"]

    expected = bound(outs["noise"], "noise")
    # Step 0 has the logarithm of a probability, whose float32 tails are coarse.
    np.testing.assert_allclose(bound(outs[prediction], prediction), expected, rtol=2e-3)
    gradient = jax.grad(lambda out: bound(out, prediction).sum())(jnp.asarray(outs[prediction]))
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_samplers_get_the_variance_code_of_every_prediction(prediction):
    levels, code = PROCESS.levels("10"), 0.3 * normal(1)
    out, x = jnp.concatenate([normal(0), code], axis=-1), jnp.asarray(normal(2))
    read = ddpm.DDPM(SCHEDULE, prediction).reader(levels, clip_x0=False)
    expected = PROCESS.reader(levels, clip_x0=False)(out, x, 3).log_variance
    np.testing.assert_array_equal(read(out, x, 3).log_variance, expected)


@pytest.mark.parametrize(
    "steps, message",
    [
        ([999], r"steps must be at least two different whole numbers, descending, got \[999\]"),
        ([5, 5], "steps must be at least two different"),
        ([5.5, 1], "steps must be at least two different whole numbers"),
        ([1000, 3], r"steps must be in 0 .. 999, got \[1000, 3\]"),
        ([3, -1], "steps must be in 0 .. 999"),
    ],
)
def test_steps_that_are_no_levels(steps, message):
    with pytest.raises(UserError, match=message):
        PROCESS.levels_at(steps)
