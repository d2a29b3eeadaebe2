import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, guidance, samplers, schedules
from dit_jax.diffusion.process import Levels, Prediction, at, predictor
from dit_jax.models import dit

LONG = ddpm.DDPM(schedules.linear())
SHORT = LONG.levels("10")
SHAPE = (4, 2, 3, 2)


def linear(num_steps):
    """Levels of the linear path, as in flow matching."""
    time = np.linspace(1 - 1e-3, 0, num_steps + 1)
    return Levels(1 - time, time, time)


LINEAR = linear(8)
COSINE = ddpm.DDPM(schedules.squared_cosine(50)).levels("50")
SAMPLERS = {"ddpm": samplers.ddpm, "ddim": functools.partial(samplers.ddim, eta=0.7)}


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_noise(seed, count, levels, shape=SHAPE[1:]):
    keys = jax.random.split(jax.random.key(seed), count)
    return samplers.make_noise(keys, shape, levels.num_steps)


def predict_of(x0, levels, log_variance=None):
    """predict(x, i) of a model that knows x0."""

    def predict(x, i):
        noise = (x - at(levels.alpha, i, x) * x0) / at(levels.sigma, i, x)
        return Prediction(jnp.broadcast_to(x0, x.shape), noise, log_variance)

    return predict


def predict_gaussian(mean, std, levels):
    """predict of data N(mean, std^2), with the exact variance of every reverse step."""
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    marginal = alpha**2 * std**2 + sigma**2  # the variance of x
    ratio = alpha / levels.alpha[1:]
    step_variance = sigma**2 - ratio**2 * levels.sigma[1:] ** 2
    posterior = step_variance * levels.sigma[1:] ** 2 / sigma**2
    x0_weight = levels.alpha[1:] * step_variance / sigma**2
    variance = posterior + x0_weight**2 * std**2 * sigma**2 / marginal

    def predict(x, i):
        centred = x - at(alpha * mean, i, x)
        x0 = mean + at(alpha * std**2 / marginal, i, x) * centred
        return Prediction(x0, at(sigma / marginal, i, x) * centred, at(np.log(variance), i, x))

    return predict


def test_golden_guided_ddim(golden, golden_images, make_model, check_close):
    net = make_model(dit.configure("S", 8))
    levels = LONG.levels("25")
    options = {"nulls": {"y": 1000}, "channels": 3}

    @jax.jit
    def sample(params, z):
        model = functools.partial(net.apply, params)
        network = guidance.guide(model, {"y": np.array([207, 360], np.int32)}, **options)
        predict = predictor(network, LONG, levels, scales=np.full(25, 4.0))
        return samplers.run(samplers.ddim(levels), predict, z)

    x = sample(net.params, golden_images("z", 2))
    check_close("cfg/ddim25", x, golden["cfg/ddim25"], 1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_trajectory_goes_from_the_noise_to_the_sample(sampler):
    x, predict = normal(0), predict_gaussian(0.5, 0.3, SHORT)
    options = {"noise_at": make_noise(1, len(x), SHORT)}
    run = functools.partial(samplers.run, sampler(SHORT), predict, **options)
    trajectory = jax.jit(functools.partial(run, trajectory=True))(x)
    assert trajectory.shape == (11, *SHAPE)
    np.testing.assert_array_equal(trajectory[0], x)
    np.testing.assert_array_equal(trajectory[-1], jax.jit(run)(x))
    both = jax.jit(functools.partial(run, trajectory="x0"))(x)
    assert both.shape == (2, 11, *SHAPE)
    np.testing.assert_allclose(both[0], trajectory, rtol=1e-5, atol=1e-5)  # another program
    np.testing.assert_array_equal(both[1, -1], both[0, -1])
    state = sampler(SHORT).init(x)
    for i in range(3):
        state = sampler(SHORT).step(predict, state, jnp.int32(i), options["noise_at"](i))
    np.testing.assert_allclose(trajectory[3], state.x, atol=1e-6)  # float32, not jitted


@pytest.mark.parametrize(
    "levels",
    [LONG.levels("1000"), SHORT, LINEAR, ddpm.DDPM(schedules.squared_cosine(50)).levels("50")],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (4, 6), (4, 2, 2, 2, 1)])
def test_ddim_recovers_x0_from_exact_noise(levels, eta, shape):
    """On every path and on grids of any number of axes."""
    x0, noise_at = normal(0, shape), make_noise(0, 4, levels, shape[1:])
    sampler = samplers.ddim(levels, eta=eta)
    x = samplers.run(sampler, predict_of(x0, levels), normal(1, shape), noise_at=noise_at)
    np.testing.assert_allclose(x, x0, atol=1e-5)


def test_a_loop_of_steps_is_the_run_and_ddim_stays_on_the_path_of_its_noise():
    """If x is alpha x0 + sigma noise at the first level, it is so at every level."""
    x0, noise = normal(0), normal(1)
    sampler, predict = samplers.ddim(SHORT), predict_of(x0, SHORT)
    start = SHORT.alpha[0] * x0 + SHORT.sigma[0] * noise
    state = sampler.init(jnp.float32(start))
    for i in range(sampler.num_steps):
        np.testing.assert_allclose(state.x, SHORT.alpha[i] * x0 + SHORT.sigma[i] * noise, atol=1e-4)
        state = sampler.step(predict, state, i, None)
    np.testing.assert_allclose(state.x, x0, atol=1e-5)
    run = samplers.run(sampler, predict, jnp.float32(start))
    np.testing.assert_allclose(run, state.x, atol=1e-6)


def test_ddim_on_the_linear_path_is_eulers_method_of_the_velocity():
    predict, x = predict_gaussian(0.4, 0.3, LINEAR), jnp.asarray(normal(1))
    expected = x
    for i in range(LINEAR.num_steps):
        prediction = predict(expected, i)
        velocity = prediction.noise - prediction.x0
        expected = expected + np.float32(LINEAR.time[i + 1] - LINEAR.time[i]) * velocity
    actual = samplers.run(samplers.ddim(LINEAR), predict, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    "levels, mean, std",
    [
        (LONG.levels("20"), 0.0, 1.0),
        (LONG.levels("20"), 0.5, 0.3),
        (LONG.levels("200"), -2.0, 0.1),
        (linear(400), 0.5, 0.3),
    ],
)
@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_samples_a_gaussian(levels, mean, std, learned):
    """With the exact variance, or with the posterior's, which many small steps need."""
    if not learned:
        levels, std = LONG.levels("1000"), max(std, 0.3)
    noise_at = make_noise(0, 256, levels, (4, 4, 4))  # 16384 numbers
    exact = predict_gaussian(mean, std, levels)

    def predict(x, i):
        prediction = exact(x, i)
        return prediction if learned else prediction._replace(log_variance=None)

    x = samplers.run(samplers.ddpm(levels), predict, noise_at(-1), noise_at=noise_at)
    # Four standard errors; the last step adds no noise: 1 % of 0.1 and less of more.
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / 128)
    # The posterior is too small by the uncertainty of x0: 2 % in so many steps.
    slack = 0.006 if learned else 0.025
    assert float(x.std()) == pytest.approx(std, rel=4 / (128 * np.sqrt(2)) + slack)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    predict, x = predict_gaussian(0.0, 0.5, SHORT), normal(1)
    keys = jax.random.split(jax.random.key(0), 4)

    def run(x, keys):
        noise_at = samplers.make_noise(keys, SHAPE[1:], SHORT.num_steps)
        return samplers.run(SAMPLERS[sampler](SHORT), predict, x, noise_at=noise_at)

    batch = run(x, keys)
    np.testing.assert_allclose(run(x[2:3], keys[2:3]), batch[2:3], atol=1e-6)
    same_start = run(np.repeat(x[:1], 4, axis=0), keys)
    assert np.abs(same_start[:1] - same_start[1:]).max(axis=(1, 2, 3)).min() > 0.01


def test_noise_is_normal_and_depends_on_its_key_and_step_only():
    keys = jax.random.split(jax.random.key(0), 8)
    noise = samplers.make_noise(keys, (16, 16, 4), 10)(4)
    assert noise.shape == (8, 16, 16, 4)
    assert noise.dtype == jnp.float32
    alone = samplers.make_noise(keys[3:4], (16, 16, 4), 10)
    np.testing.assert_array_equal(noise[3:4], alone(4))
    shorter = samplers.make_noise(keys, (16, 16, 4), 8)
    np.testing.assert_array_equal(noise, shorter(2))  # five steps from the data in both
    assert abs(float(noise.mean())) < 4 / np.sqrt(noise.size)
    assert float(noise.std()) == pytest.approx(1, rel=4 / np.sqrt(2 * noise.size))
    noise = np.concatenate([noise, shorter(3)])
    correlation = np.corrcoef(noise.reshape(16, -1))
    assert np.abs(correlation - np.eye(16)).max() < 0.15  # 4.8 / sqrt(1024)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    levels, noise = SHORT, normal(2, (SHORT.num_steps, *SHAPE))
    predict = predict_gaussian(0.3, 0.5, levels)
    variance = 1 - (levels.alpha[:-1] / levels.alpha[1:]) ** 2
    posterior = variance * levels.sigma[1:] ** 2 / levels.sigma[:-1] ** 2

    def smallest(x, i):
        return predict(x, i)._replace(log_variance=at(np.log(posterior + 1e-30), i, x))

    run = functools.partial(samplers.run, x=normal(1), noise_at=lambda i: jnp.asarray(noise)[i])
    ddim, ancestral = samplers.ddim(levels, eta=1.0), samplers.ddpm(levels)
    np.testing.assert_allclose(run(ddim, predict), run(ancestral, smallest), atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stochastic_sampler_needs_noise(sampler):
    with pytest.raises(ValueError, match="noise_at must be given for a stochastic sampler"):
        samplers.run(SAMPLERS[sampler](SHORT), predict_of(0.0, SHORT), normal(1))
