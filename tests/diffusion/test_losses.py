import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import gaussian, losses, schedules
from dit_jax.models import dit

SCHEDULE = schedules.linear()
STEPS = np.array([0, 1, 500, 999])


def normal(seed, channels):
    return np.random.default_rng(seed).standard_normal((4, 2, 2, channels), np.float32)


def example():
    x0, noise = np.clip(0.5 * normal(0, 3), -1, 1), normal(1, 3)
    x_t = gaussian.q_sample(SCHEDULE, x0, STEPS, noise)
    return {"x0": x0, "x_t": x_t, "t": STEPS, "noise": noise}


def test_golden_loss(golden, golden_batch, make_model, check_close):
    x0, t, noise, y = (golden_batch[name] for name in ("x0", "t", "noise", "y"))
    model = make_model(dit.configure("S", 4))
    x_t = gaussian.q_sample(SCHEDULE, x0, t, noise)
    out = model.apply(model.params, x_t, t=t, y=y)
    terms = losses.objective(SCHEDULE, out, x0=x0, x_t=x_t, t=t, noise=noise)
    for name in ("mse", "vb", "loss"):
        # At each of the sixteen steps, relative to its own value, which spans five decades.
        expected = golden[f"loss/{name}"]
        check_close(f"loss/{name}", terms[name] / expected, np.ones(16), 1e-4)


def test_noise_is_detached_from_the_bound():
    out = jnp.asarray(normal(2, 6))

    def total(out, name):
        return losses.objective(SCHEDULE, out, **example())[name].sum()

    vb, mse, loss = (jax.grad(total)(out, name) for name in ("vb", "mse", "loss"))
    np.testing.assert_array_equal(vb[..., :3], np.zeros((4, 2, 2, 3)))
    assert (np.abs(vb[..., 3:]).max(axis=(1, 2, 3)) > 0).all()
    np.testing.assert_array_equal(mse[..., 3:], np.zeros((4, 2, 2, 3)))
    np.testing.assert_array_equal(loss[..., :3], mse[..., :3])
    np.testing.assert_array_equal(loss[..., 3:], vb[..., 3:])


def test_without_learned_variance_the_loss_is_the_mse():
    out = normal(2, 3)
    terms = losses.objective(SCHEDULE, jnp.asarray(out), **example())
    assert terms.keys() == {"loss", "mse"}
    expected = ((out - example()["noise"]) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["mse"], expected, rtol=1e-5)
    np.testing.assert_array_equal(terms["loss"], terms["mse"])


def test_bound_is_0_where_the_model_is_the_posterior():
    """The true noise and the posterior's variance, -1, leave no divergence; t > 0."""
    batch = example()
    out = jnp.concatenate([batch["noise"], -jnp.ones((4, 2, 2, 3))], axis=-1)
    terms = losses.objective(SCHEDULE, out, **batch)
    np.testing.assert_array_equal(terms["mse"], np.zeros(4))
    np.testing.assert_allclose(terms["vb"][1:], np.zeros(3), atol=1e-6)
    assert terms["vb"][0] > 0


def test_bound_is_in_bits_and_a_mean():
    """With the true noise it is the divergence of two variances alone."""
    batch = example()
    out = jnp.concatenate([batch["noise"], jnp.ones((4, 2, 2, 3))], axis=-1)
    terms = losses.objective(SCHEDULE, out, **batch)
    ratio = SCHEDULE.posterior_variance[STEPS[1:]] / SCHEDULE.beta[STEPS[1:]]
    nats = 0.5 * (ratio - 1 - np.log(ratio))
    np.testing.assert_allclose(terms["vb"][1:], nats / np.log(2), rtol=1e-3, atol=1e-6)


def test_bound_at_step_0_is_the_negative_log_likelihood_in_bits():
    batch = {name: x[:1] for name, x in example().items()}
    code = jnp.zeros((1, 2, 2, 3))
    terms = losses.objective(SCHEDULE, jnp.concatenate([batch["noise"], code], -1), **batch)
    log_variance = gaussian.reverse_log_variance(SCHEDULE, batch["x_t"], batch["t"], code)
    # At step 0 the mean of the reverse step is the x0 that the noise implies.
    log_likelihood = gaussian.discretized_log_likelihood(batch["x0"], batch["x0"], log_variance)
    expected = -float(log_likelihood.mean()) / np.log(2)
    assert float(terms["vb"][0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("channels, has_code", [(4, False), (8, True)])
def test_split_output(channels, has_code):
    out = normal(0, channels)
    noise, code = losses.split_output(out, 4)
    np.testing.assert_array_equal(noise, out[..., :4])
    assert (code is not None) == has_code
    if has_code:
        np.testing.assert_array_equal(code, out[..., 4:])
