import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import gaussian, guidance, samplers, schedules
from dit_jax.models import dit

LONG = schedules.linear()
SHORT = schedules.respace(LONG, "10")
SHAPE = (4, 2, 3, 2)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def step_of(schedule, t):
    """The place of a step of the long diffusion in a respaced one."""
    return jnp.searchsorted(jnp.asarray(schedule.timestep, jnp.int32), t)


def denoiser_of(x0, schedule, code=None):
    """denoise of a model that knows x0."""

    def denoise(x, t):
        step = jnp.full(len(x), step_of(schedule, t))
        noise = gaussian.noise_from_x0(schedule, x, step, x0)
        return noise, None if code is None else jnp.full(x.shape, code)

    return denoise


def keys_of(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def test_golden_guided_ddim(golden, golden_images, make_model, check_close):
    net = make_model(dit.configure("S", 8))
    short = schedules.respace(LONG, "25")
    options = {"null_label": 1000, "scale": 4.0, "channels": 3, "interval": (0, 999)}

    @jax.jit
    def sample(params, z):
        model = functools.partial(net.apply, params)
        denoise = guidance.guide(model, np.array([207, 360], np.int32), **options)
        return samplers.ddim(denoise, z, short)

    x = sample(net.params, golden_images("z", 2))
    check_close("cfg/ddim25", x, golden["cfg/ddim25"], 1e-3)


@pytest.mark.parametrize("schedule", [LONG, SHORT, schedules.squared_cosine(50)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_recovers_x0_from_exact_noise(schedule, eta):
    x0 = normal(0)
    x = samplers.ddim(
        denoiser_of(x0, schedule), normal(1), schedule, eta=eta, keys=keys_of(0, len(x0))
    )
    np.testing.assert_allclose(x, x0, atol=1e-5)


def test_ddim_without_noise_is_on_the_path_of_its_noise():
    """Where x_T = q_sample(x0, noise), every step in between is q_sample of the same noise."""
    x0, noise, seen = normal(0), normal(1), []
    exact = denoiser_of(x0, SHORT)

    def denoise(x, t):
        jax.debug.callback(lambda x, t: seen.append((int(t), np.array(x))), x, t)
        return exact(x, t)

    last = np.full(len(x0), 9)
    samplers.ddim(denoise, gaussian.q_sample(SHORT, x0, last, noise), SHORT)
    jax.effects_barrier()
    # The denoiser is asked at the steps of the long diffusion.
    assert sorted(t for t, _ in seen) == SHORT.timestep.tolist()
    for t, x in seen:
        expected = gaussian.q_sample(LONG, x0, np.full(len(x0), t), noise)
        np.testing.assert_allclose(x, expected, atol=1e-4)


def gaussian_denoiser(mean, std, schedule):
    """denoise of data N(mean, std^2): the expected noise, the exact variance of a reverse step."""
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    marginal = alpha_bar * std**2 + 1 - alpha_bar  # the variance of x_t
    of_x0 = beta * np.sqrt(schedule.alpha_bar_prev) / (1 - alpha_bar)
    variance = schedule.posterior_variance + of_x0**2 * std**2 * (1 - alpha_bar) / marginal
    smallest = schedule.posterior_log_variance
    code = 2 * (np.log(variance) - smallest) / (np.log(beta) - smallest + 1e-30) - 1

    def denoise(x, t):
        step = jnp.full(len(x), step_of(schedule, t))
        centred = x - gaussian.at(np.sqrt(alpha_bar) * mean, step)
        noise = gaussian.at(np.sqrt(1 - alpha_bar) / marginal, step) * centred
        return noise, jnp.broadcast_to(gaussian.at(code, step), x.shape)

    return denoise


@pytest.mark.parametrize(
    "spacing, mean, std", [("20", 0.0, 1.0), ("20", 0.5, 0.3), ("200", -2.0, 0.1)]
)
def test_ddpm_samples_a_gaussian(spacing, mean, std):
    schedule = schedules.respace(LONG, spacing)
    count = 256
    keys = keys_of(0, count)
    x = samplers.draw_noise(keys, schedule.num_steps, (4, 4, 4))  # 16384 numbers
    x = samplers.ddpm(gaussian_denoiser(mean, std, schedule), x, schedule, keys=keys)
    # Four standard errors; the last step adds no noise: 1 % of 0.1 and less of more.
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / 128)
    assert float(x.std()) == pytest.approx(std, rel=4 / (128 * np.sqrt(2)) + 0.006)


def test_ddpm_with_a_fixed_variance_samples_a_gaussian():
    """beta is the right variance of many small steps towards data of variance 1."""
    exact = gaussian_denoiser(0.5, 1.0, LONG)
    keys = keys_of(0, 256)
    x = samplers.draw_noise(keys, LONG.num_steps, (4, 4, 4))
    x = samplers.ddpm(lambda x, t: (exact(x, t)[0], None), x, LONG, keys=keys)
    assert float(x.mean()) == pytest.approx(0.5, abs=4 / 128)
    assert float(x.std()) == pytest.approx(1, rel=4 / (128 * np.sqrt(2)))


SAMPLERS = {"ddpm": samplers.ddpm, "ddim": functools.partial(samplers.ddim, eta=0.7)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_handed_in_is_as_noise_drawn(sampler):
    keys, x = keys_of(0, 4), normal(1)
    steps = range(SHORT.num_steps)
    noise = jnp.stack([samplers.draw_noise(keys, i, SHAPE[1:]) for i in steps])  # (S, N, H, W, C)
    run = functools.partial(SAMPLERS[sampler], gaussian_denoiser(0.0, 0.5, SHORT), x, SHORT)
    drawn, handed_in = run(keys=keys), run(noise=noise)
    np.testing.assert_allclose(drawn, handed_in, atol=1e-6)
    assert np.abs(drawn - run(noise=noise[::-1])).max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    denoise, keys, x = gaussian_denoiser(0.0, 0.5, SHORT), keys_of(0, 4), normal(1)
    batch = SAMPLERS[sampler](denoise, x, SHORT, keys=keys)
    alone = SAMPLERS[sampler](denoise, x[2:3], SHORT, keys=keys[2:3])
    np.testing.assert_allclose(alone, batch[2:3], atol=1e-6)
    same_start = SAMPLERS[sampler](denoise, np.repeat(x[:1], 4, axis=0), SHORT, keys=keys)
    assert np.abs(same_start[:1] - same_start[1:]).max(axis=(1, 2, 3)).min() > 0.01


def test_noise_is_normal_and_of_each_key_and_step_alone():
    keys = keys_of(0, 8)
    noise = samplers.draw_noise(keys, 5, (16, 16, 4))
    assert noise.shape == (8, 16, 16, 4)
    assert noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise[3:4], samplers.draw_noise(keys[3:4], 5, (16, 16, 4)))
    assert abs(float(noise.mean())) < 4 / np.sqrt(noise.size)
    assert float(noise.std()) == pytest.approx(1, rel=4 / np.sqrt(2 * noise.size))
    noise = np.concatenate([noise, samplers.draw_noise(keys, 6, (16, 16, 4))])
    correlation = np.corrcoef(noise.reshape(16, -1))
    assert np.abs(correlation - np.eye(16)).max() < 0.15  # 4.8 / sqrt(1024)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    noise = normal(2, (SHORT.num_steps, *SHAPE))
    denoise = gaussian_denoiser(0.3, 0.5, SHORT)

    def smallest(x, t):
        return denoise(x, t)[0], jnp.full(x.shape, -1.0)

    ddim = samplers.ddim(denoise, normal(1), SHORT, eta=1.0, noise=noise)
    ddpm = samplers.ddpm(smallest, normal(1), SHORT, noise=noise)
    np.testing.assert_allclose(ddim, ddpm, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_x0_is_a_model_of_the_clipped_x0(sampler):
    x0, noise = 2 * normal(0), normal(2, (SHORT.num_steps, *SHAPE))
    assert np.abs(x0).max() > 1
    run = functools.partial(SAMPLERS[sampler], x=normal(1), schedule=SHORT, noise=noise)
    clipped = run(denoiser_of(x0, SHORT, code=0.0), clip_x0=True)
    expected = run(denoiser_of(np.clip(x0, -1, 1), SHORT, code=0.0))
    np.testing.assert_allclose(clipped, expected, atol=1e-5)
    free = run(denoiser_of(x0, SHORT, code=0.0))
    np.testing.assert_allclose(free, x0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("given", [(), ("keys", "noise")])
def test_either_keys_or_noise(sampler, given):
    both = {"keys": keys_of(0, 4), "noise": normal(2, (SHORT.num_steps, *SHAPE))}
    with pytest.raises(ValueError, match="either keys or noise must be given, and not both"):
        SAMPLERS[sampler](
            denoiser_of(0.0, SHORT), normal(1), SHORT, **{name: both[name] for name in given}
        )
