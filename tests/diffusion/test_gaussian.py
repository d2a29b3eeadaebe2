import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import gaussian, losses, schedules
from dit_jax.models import dit

SCHEDULE = schedules.linear()


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_golden_q_sample(golden, golden_batch, check_close):
    x0, t, noise = (golden_batch[name] for name in ("x0", "t", "noise"))
    check_close("q_sample", gaussian.q_sample(SCHEDULE, x0, t, noise), golden["q_sample"], 1e-4)


def test_golden_reverse_step(golden, golden_batch, make_model, check_close):
    """Mean and log variance of p(x_{t-1} | x_t); x0 of the batch stands for x_t."""
    x_t, t, y = (golden_batch[name] for name in ("x0", "t", "y"))
    model = make_model(dit.configure("S", 4))
    noise, code = losses.split_output(model.apply(model.params, x_t, t=t, y=y), 4)
    x0 = gaussian.x0_from_noise(SCHEDULE, x_t, t, noise)
    mean = gaussian.posterior_mean(SCHEDULE, x0, x_t, t)
    check_close("pmv/mean", mean, golden["pmv/mean"], 1e-4)
    log_variance = gaussian.reverse_log_variance(SCHEDULE, x_t, t, code)
    check_close("pmv/log_variance", log_variance, golden["pmv/log_variance"], 1e-4)


def test_q_sample_is_its_chain_of_single_steps():
    """The product of N(sqrt(1 - beta) x, beta) over the steps, in mean and variance."""
    mean, variance = 1.0, 0.0
    for beta in SCHEDULE.beta[:301]:
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    one, zero, t = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.asarray([300])
    assert gaussian.q_sample(SCHEDULE, one, t, zero).item() == pytest.approx(mean, rel=1e-6)
    sigma = gaussian.q_sample(SCHEDULE, zero, t, one).item()
    assert sigma == pytest.approx(np.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 2, 2, 3), (5, 6), (5, 2, 2, 2, 1)])
def test_noise_and_x0_are_inverse_on_any_grid(shape):
    t = np.array([0, 3, 100, 500, 999])
    x_t, noise = normal(0, shape), normal(1, shape)
    x0 = gaussian.x0_from_noise(SCHEDULE, x_t, t, noise)
    # At step 0 the noise is 0.01 of x_t: two digits are lost.
    np.testing.assert_allclose(gaussian.noise_from_x0(SCHEDULE, x_t, t, x0), noise, atol=1e-4)
    np.testing.assert_allclose(gaussian.q_sample(SCHEDULE, x0, t, noise), x_t, atol=1e-4)


@pytest.mark.parametrize("t", [1, 10, 300, 999])
def test_posterior_is_the_product_of_two_gaussians(t):
    """q(x_{t-1} | x_0) q(x_t | x_{t-1}) on a fine line, normalized by brute force."""
    x0, x_t = 0.7, -1.3
    beta, previous = SCHEDULE.beta[t], SCHEDULE.alpha_bar[t - 1]
    mean = gaussian.posterior_mean(
        SCHEDULE, *(jnp.full((1, 1, 1, 1), x) for x in (x0, x_t)), jnp.asarray([t])
    ).item()
    sigma = np.sqrt(SCHEDULE.posterior_variance[t])
    x = mean + sigma * np.linspace(-12, 12, 20_001)
    energy = (x - np.sqrt(previous) * x0) ** 2 / (1 - previous)
    energy += (x_t - np.sqrt(1 - beta) * x) ** 2 / beta
    density = np.exp(-0.5 * (energy - energy.min()))
    density /= density.sum()
    assert mean == pytest.approx((density * x).sum(), abs=1e-5)
    variance = (density * (x - (density * x).sum()) ** 2).sum()
    assert variance == pytest.approx(sigma**2, rel=1e-6)


def test_learned_variance_lies_between_the_posterior_and_beta():
    t = np.array([0, 1, 500])
    code = jnp.asarray([-1.0, 1.0, 0.0, 3.0]).reshape(1, 1, 1, 4).repeat(3, axis=0)
    log_variance = gaussian.reverse_log_variance(SCHEDULE, code, t, code)
    log_variance = np.asarray(log_variance)[:, 0, 0]  # (3, 4)
    low, high = SCHEDULE.posterior_log_variance[t], np.log(SCHEDULE.beta[t])
    expected = np.stack([low, high, (low + high) / 2, 2 * high - low], axis=1)  # 3: not clamped
    np.testing.assert_allclose(log_variance, expected, rtol=1e-5)


def test_fixed_variance_is_beta_but_at_step_0():
    t = np.array([0, 1, 999])
    fixed = gaussian.reverse_log_variance(SCHEDULE, jnp.ones((3, 2, 2, 4)), t, None)
    assert fixed.shape == (3, 1, 1, 1)
    expected = [SCHEDULE.posterior_variance[1], SCHEDULE.beta[1], SCHEDULE.beta[999]]
    np.testing.assert_allclose(np.exp(fixed).ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "one, two",
    [((0.0, 0.0), (0.0, 0.0)), ((0.3, -1.0), (-0.2, 0.5)), ((0.0, 1.0), (2.0, -1.0))],
)
def test_kl_divergence_is_its_integral(one, two):
    def log_density(x, mean, log_variance):
        return -0.5 * (np.log(2 * np.pi) + log_variance + (x - mean) ** 2 / np.exp(log_variance))

    x, step = np.linspace(-30, 30, 200_001, retstep=True)
    p, q = log_density(x, *one), log_density(x, *two)
    expected = (np.exp(p) * (p - q)).sum() * step
    kl = gaussian.kl_divergence(*map(jnp.asarray, one), *map(jnp.asarray, two))
    assert float(kl) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mean, sigma", [(0.0, 0.01), (0.3, 0.2), (-0.99, 0.5), (1.5, 2.0)])
def test_likelihoods_of_the_256_levels_sum_to_1(mean, sigma):
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_variance = jnp.asarray(2 * np.log(sigma), jnp.float32)
    log_likelihood = gaussian.discretized_log_likelihood(levels, mean, log_variance)
    assert float(jnp.exp(log_likelihood).sum()) == pytest.approx(1, abs=1e-4)


def test_likelihood_inside_a_bin_is_the_density_times_its_width():
    x0, mean, sigma = 0.2, 0.1, 0.3
    density = np.exp(-0.5 * ((x0 - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    likelihood = jnp.exp(
        gaussian.discretized_log_likelihood(
            jnp.asarray(x0), mean, jnp.asarray(2 * np.log(sigma), jnp.float32)
        )
    )
    # The distribution function is an approximation to three digits.
    assert float(likelihood) == pytest.approx(density * 2 / 255, rel=2e-3)


def test_likelihood_of_the_impossible_is_finite():
    log_likelihood = gaussian.discretized_log_likelihood(jnp.asarray(0.9), -0.9, jnp.asarray(-9.0))
    assert float(log_likelihood) == pytest.approx(np.log(1e-12))


@pytest.mark.parametrize("mean", [-0.3, 0.2, 0.6])
def test_likelihood_has_the_gradient_of_a_gaussian(mean):
    x0, sigma = jnp.asarray(0.2), 0.3
    log_variance = jnp.asarray(2 * np.log(sigma), jnp.float32)
    slope = jax.grad(gaussian.discretized_log_likelihood, argnums=1)(x0, mean, log_variance)
    # The distribution function is an approximation to three digits, its slope to two.
    assert float(slope) == pytest.approx((0.2 - mean) / sigma**2, rel=0.02, abs=0.02)
