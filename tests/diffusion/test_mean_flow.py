"""MeanFlow on data with known velocities, its draws, and the shape of its derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import guidance, mean_flow, samplers, solvers, times
from dit_jax.diffusion.process import Network, predictor

DRAW = times.Draw("logit_normal", -0.4, 1.0)
BOTH = (mean_flow.MeanFlow, mean_flow.ImprovedMeanFlow)


def beside(values):
    return jnp.reshape(values, (-1, 1, 1, 1))


def exact(x, *, t, h, **_):
    """The average velocity to the data point 0.5, from which x differs by t (noise - 0.5)."""
    return (x - 0.5) / beside(t)


def network(apply, dropped=False):
    return Network(apply, {"y": jnp.zeros(6, jnp.int32)}, {"y": 3}, dropped)


def examples(process, seed=0):
    key = jax.random.key(seed)
    noise = jax.random.normal(key, (6, 2, 2, 1))
    return jnp.full_like(noise, 0.5), process.draw_time(key, (6,)), noise


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("options", [{}, {"reverse_time": True}, {"noise_scale": 2.0}])
def test_the_exact_average_velocity_has_no_loss(make, options):
    process = make(draw=DRAW, same_times=0.5, **options)

    def apply(x, *, t, **given):
        given = process.inputs(t, t) | given
        return (-1 if process.reverse_time else 1) * exact(x, t=t, **given)

    terms = process.losses(network(apply), *examples(process))
    np.testing.assert_allclose(terms["mse"], 0, atol=1e-10)
    np.testing.assert_allclose(terms["loss"], 0, atol=1e-6)


@pytest.mark.parametrize("reverse_time", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_exact_x0_has_no_loss(heads, reverse_time):
    options = {"same_times": 0.5, "noise_scale": 2.0, "reverse_time": reverse_time}
    process = mean_flow.ImprovedMeanFlow(draw=DRAW, prediction="x0", **options)
    x0, drawn, noise = examples(process)
    assert (drawn["t"] > 0.05).all()  # below, the velocity changes along the path

    def apply(x, *, t, **given):
        return jnp.full((*x.shape[:-1], heads), 0.5)

    terms = process.losses(network(apply), x0, drawn, noise)
    np.testing.assert_allclose(terms["mse"], 0, atol=1e-10)
    np.testing.assert_allclose(terms["loss"], 0, atol=1e-6)
    np.testing.assert_array_less(1, process.losses(network(apply), x0 + 1, drawn, noise)["mse"])


@pytest.mark.parametrize("make", BOTH)
def test_a_network_that_ignores_the_step_has_a_loss_where_the_velocity_changes(make):
    """tanh is no average velocity of itself: only the examples with r = t do not see it."""
    process = make(draw=DRAW, same_times=0.5)
    x0, drawn, _ = examples(process)
    noise = jnp.zeros_like(x0)

    def apply(x, *, t, **given):
        return jnp.broadcast_to(-0.5 * beside(1 + jnp.tanh(4 * t)), x.shape)

    still = process.losses(network(apply), x0, drawn, noise)["mse"]
    without_step = drawn | {"r": drawn["t"]}
    plain = process.losses(network(apply), x0, without_step, noise)["mse"]
    np.testing.assert_allclose(still[:3], plain[:3], rtol=1e-6)
    assert (np.abs(still[3:] - plain[3:]) > 1e-4).all()


def test_the_weight_makes_all_losses_alike():
    process = mean_flow.MeanFlow(draw=DRAW)
    error = jnp.array([0.1, 10.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 4, 4, 1))
    np.testing.assert_allclose(process.adaptive(error), [0.16 / 0.17, 1], rtol=1e-4)


@pytest.mark.parametrize("make", BOTH)
def test_times_are_ordered_and_equal_on_the_first_rows(make):
    process = make(draw=DRAW, same_times=0.25)
    drawn = process.draw_time(jax.random.key(1), (4000,))
    again = process.draw_time(jax.random.key(1), (4000,))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    t, r = drawn["t"], drawn["r"]
    assert (r[:1000] == t[:1000]).all() and (r[1000:] < t[1000:]).all()
    assert all(x.dtype == np.float32 and x.shape == (4000,) for x in drawn.values())
    logits = np.log(r[1000:] / (1 - r[1000:])), np.log(t[1000:] / (1 - t[1000:]))
    both = np.concatenate(logits)
    np.testing.assert_allclose([both.mean(), both.std()], [-0.4, 1], atol=0.06)  # 4 sigma


@pytest.mark.parametrize("make", BOTH)
def test_a_share_of_the_times_is_uniform_and_the_others_are_as_before(make):
    process = make(draw=DRAW, same_times=0.0)
    before = process.draw_time(jax.random.key(1), (4000,))
    process = dataclasses.replace(process, uniform_times=0.25)
    drawn = process.draw_time(jax.random.key(1), (4000,))
    is_other = np.asarray(drawn["t"] != before["t"])
    assert is_other.mean() == pytest.approx(0.25, abs=0.03)  # 4 sigma
    assert (is_other == np.asarray(drawn["r"] != before["r"])).all()
    t, r = np.sort(drawn["t"][is_other]), np.asarray(drawn["r"][is_other])
    assert (t.mean(), r.mean()) == pytest.approx((2 / 3, 1 / 3), abs=0.03)


def test_scales_and_intervals_are_drawn_in_their_ranges():
    process = mean_flow.ImprovedMeanFlow(draw=DRAW, same_times=0.5)
    drawn = process.draw_time(jax.random.key(2), (4000,))
    omega, t_min, t_max = (drawn[name] for name in ("omega", "t_min", "t_max"))
    assert 1 <= omega.min() < 1.01 and 7.9 < omega.max() <= 8
    assert np.log(omega).mean() == pytest.approx(np.log(8) / 2, abs=0.04)  # 4 sigma
    assert (t_min[:2000] == 0).all() and (t_max[:2000] == 1).all()
    assert 0 <= t_min[2000:].min() < t_min[2000:].max() <= 0.5 <= t_max[2000:].min()
    assert t_max[2000:].max() <= 1


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("count", ["1", "3"])
def test_a_step_moves_by_the_average_velocity(count, sampler):
    process, seen = mean_flow.MeanFlow(), []
    levels = process.levels(count)

    def apply(x, *, t, h, y):
        seen.append((t, h))
        return x * beside(h)

    predict = predictor(guidance.condition(apply, {"y": 0}), process, levels)
    x, step = jnp.arange(4.0).reshape(2, 2, 1, 1), solvers.SAMPLERS[sampler](levels).step
    for i in range(int(count)):
        expected = (1 - 1 / int(count) ** 2) * x
        x = step(predict, samplers.State(x), i, None).x
        np.testing.assert_allclose(x, expected, rtol=1e-6)
        t, h = seen[-1]
        np.testing.assert_allclose(t, 1 - i / int(count), rtol=1e-6)
        np.testing.assert_allclose(h, 1 / int(count), rtol=1e-6)


def test_guidance_is_not_for_examples_without_a_label_nor_outside_its_times():
    process = mean_flow.MeanFlow(draw=DRAW, omega=3.0, omega_interval=(0.2, 0.6))
    t = jnp.array([0.1, 0.3, 0.6, 0.7, 0.3, 0.3])
    dropped, v = jnp.arange(6) == 4, jnp.ones((6, 2, 2, 1))

    def apply(x, *, t, y):
        assert (y == 3).all()
        return jnp.full_like(x, 0.25)

    guided = process.guide(network(apply, dropped), v, t, v)
    np.testing.assert_allclose(guided[:, 0, 0, 0], [1, 2.5, 2.5, 1, 1, 2.5])


def test_a_loss_stops_what_it_learns_from():
    """The loss has the same gradient as a squared error whose target and weight are constants."""
    process = mean_flow.MeanFlow(draw=DRAW, kappa=0.5, adaptive_power=0.0)
    x0, drawn, noise = examples(process)

    def apply(factor):
        def call(x, *, t, **given):
            return factor * jnp.sin(x + beside(t + given.get("h", 0 * t)))

        return call

    def loss(factor):
        return process.losses(network(apply(factor)), x0, drawn, noise)["loss"].sum()

    t, r = drawn["t"], drawn["r"]
    x_t, v = process.corrupt(x0, t, noise), noise - x0
    net = network(apply(0.7))
    guided = process.guide(net, x_t, t, v)
    u, change = process.differentiate(net, x_t, t, r, guided)
    error = u - (guided - beside(t - r) * change)
    expected = (2 * error * u / 0.7).sum()
    np.testing.assert_allclose(jax.grad(loss)(0.7), expected, rtol=1e-4)
