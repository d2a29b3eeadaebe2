"""MeanFlow, improved and pixel MeanFlow against the authors' codes, for networks that are formulas.

testdata/golden_mean_flow.npz holds what the codes of MeanFlow (d70cb55, MIT), improved MeanFlow
(bf60cd7, MIT) and pixel MeanFlow (75f6073, MIT) compute in float64 for the network of `analytic`.
Labels are numbers here, and 10 is the null label.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import flow, guidance, mean_flow, samplers, solvers, times
from dit_jax.diffusion.process import Network, predictor, timed

TESTDATA = Path(__file__).parents[1] / "testdata"
OPTIONS = {  # of the cases of MeanFlow
    "none": {},
    "w2_k0": {"omega": 2.0},
    "w1_k0.5": {"kappa": 0.5},
    "w0.2_k0.92_to0.75": {"omega": 0.2, "kappa": 0.92, "omega_interval": (0.0, 0.75)},
    "none_p0.75_eps1e-3": {"adaptive_power": 0.75, "adaptive_eps": 1e-3},
    "none_p0": {"adaptive_power": 0.0},
}
HEADS = {  # processes of two heads by the prefix of their arrays; pmf: by the scale of the noise
    "imf": mean_flow.ImprovedMeanFlow(),
    "pmf/s1": mean_flow.ImprovedMeanFlow(prediction="x0"),
    "pmf/s2": mean_flow.ImprovedMeanFlow(prediction="x0", noise_scale=2.0),
}
SAMPLED = {"imf": HEADS["imf"], "pmf": HEADS["pmf/s2"]}
IMF = {"omega": 7.5, "t_min": 0.4, "t_max": 0.65}  # of its samples


@pytest.fixture(scope="module")
def golden():
    """float32, but the whole numbers and bools as they are."""
    with np.load(TESTDATA / "golden_mean_flow.npz") as file:
        return {
            name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in file.items()
        }


def assert_near(actual, expected):
    """Equal to 1e-5 of the largest value: float32 after divisions by the smallest times."""
    assert np.shape(actual) == np.shape(expected)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=5e-6)  # float32


def analytic(theta, z, *numbers):
    """tanh(c0 z + c1 roll(z) + c2 a_1 + ...) with a number a_j of each example."""
    terms = [theta[0] * z, theta[1] * jnp.roll(z, 1, axis=2)]
    terms += [
        factor * jnp.reshape(each, (-1, 1, 1, 1))
        for factor, each in zip(theta[2:], numbers, strict=True)
    ]
    return jnp.tanh(sum(terms))


def mean_net(theta, x, *, t, h, y):
    return analytic(theta, x, t, h, y)


def two_heads(theta, x, *, t, h, omega, t_min, t_max, y):
    numbers = (h, 1 - 1 / omega, t_min, t_max, y)
    return jnp.concatenate([analytic(row, x, *numbers) for row in theta], axis=-1)


def network(golden, process, model, theta):
    def apply(x, **given):
        return timed(model, process)(theta, x, **given)

    y = golden["in/y"].astype(np.float32)
    return Network(apply, {"y": y}, {"y": np.float32(10)}, golden["in/drop"])


@pytest.fixture(scope="module")
def inputs(golden):
    def examples(*names):
        drawn = {name: golden[f"in/{name}"] for name in names}
        return golden["in/x"], drawn, golden["in/e"]

    return examples


@pytest.mark.parametrize("case", OPTIONS)
def test_losses_and_gradients_of_mean_flow(case, golden, inputs):
    process, (x0, drawn, noise) = mean_flow.MeanFlow(**OPTIONS[case]), inputs("t", "r")

    def mean_loss(theta):
        terms = process.losses(network(golden, process, mean_net, theta), x0, drawn, noise)
        return terms["loss"].mean(), terms

    grad, terms = jax.grad(mean_loss, has_aux=True)(golden["in/theta_mf"])
    assert_close(grad, golden[f"mf/{case}/grad"])
    assert_close(terms["loss"], golden[f"mf/{case}/loss"])
    assert_close(terms["loss"].mean(), golden[f"mf/{case}/mean_loss"])
    assert_close(terms["mse"] * 48, golden[f"mf/{case}/squared_error"])  # 4 x 4 x 3


@pytest.mark.parametrize("case", OPTIONS)
def test_velocities_of_mean_flow(case, golden, inputs):
    process, (x0, drawn, noise) = mean_flow.MeanFlow(**OPTIONS[case]), inputs("t", "r")
    t, r, v = drawn["t"], drawn["r"], noise - x0
    net, x_t = (
        network(golden, process, mean_net, golden["in/theta_mf"]),
        process.corrupt(x0, t, noise),
    )
    guided = process.guide(net, x_t, t, v)
    u, change = process.differentiate(net, x_t, t, r, guided)
    found = {"z": x_t, "v": v, "v_target": guided, "u": u, "du_dt": change}
    found["v_guided"] = process.guide(net._replace(dropped=False), x_t, t, v)
    for name, array in found.items():
        assert_close(array, golden[f"mf/{case}/{name}"])


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients_of_two_heads(case, golden, inputs):
    process = HEADS[case]
    x0, drawn, noise = inputs("t", "r", "omega", "t_min", "t_max")
    is_same = golden["in/fm"]
    drawn |= {"t_min": np.where(is_same, np.float32(0), drawn["t_min"])}
    drawn |= {"t_max": np.where(is_same, np.float32(1), drawn["t_max"])}

    def mean_loss(theta):
        terms = process.losses(network(golden, process, two_heads, theta), x0, drawn, noise)
        return terms["loss"].mean(), terms

    grad, terms = jax.grad(mean_loss, has_aux=True)(golden["in/theta_two"])
    assert_near(grad, golden[f"{case}/grad"])
    assert_near(terms["loss"], golden[f"{case}/loss"])
    assert_near(terms["loss"].mean(), golden[f"{case}/mean_loss"])
    assert_near(terms["mse"] * 48, golden[f"{case}/squared_error_u"])


@pytest.mark.parametrize("case", HEADS)
def test_velocities_of_two_heads(case, golden, inputs):
    process, (x0, drawn, noise) = HEADS[case], inputs("t", "r", "omega")
    t, r = drawn["t"], drawn["r"]
    net = network(golden, process, two_heads, golden["in/theta_two"])
    x_t, v = process.noisy(x0, t, noise)
    given = {name: golden[f"{case}/{name}_used"] for name in ("omega", "t_min", "t_max")}
    kept, target = process.guide(net, x_t, t, v, given["omega"])
    given["omega"] = drawn["omega"]
    out, change = process.differentiate(net, x_t, t, r, kept, **given)
    u, head, change = out[..., :3], out[..., 3:], change[..., :3]
    h = (t - r).reshape(-1, 1, 1, 1)
    null = process.velocity(net._replace(dropped=True), x_t, t)[..., 3:]
    found = {"z": x_t, "v_t": v, "v_cond": kept, "v_uncond": null, "v_target": target}
    found |= {"u": u, "du_dt": change, "v_head": head, "V": u + h * change}
    found |= {"x_from_u": x_t - t.reshape(-1, 1, 1, 1) * u}
    for name, array in found.items():
        assert_near(array, golden[f"{case}/{name}"])
    assert_near(jnp.square(head - target).sum((1, 2, 3)), golden[f"{case}/squared_error_v"])
    assert (t < flow.CLIP).any()  # where a velocity of pixel MeanFlow has another divisor


@pytest.mark.parametrize("case", HEADS)
def test_outputs_of_two_heads_are_read_as_the_loss_has_them(case, golden, inputs):
    process, (x0, drawn, noise) = HEADS[case], inputs("t", "r")
    net = network(golden, process, two_heads, golden["in/theta_two"])
    x_t, _ = process.noisy(x0, drawn["t"], noise)
    u = process.velocity(net, x_t, drawn["t"])[..., :3]
    data, of_noise = process.read(net(x_t, drawn["t"]), x_t, drawn["t"])
    assert_near(process.noise_scale * of_noise - data, u)


@pytest.mark.parametrize("count", ["1", "2", "4"])
@pytest.mark.parametrize("name", ["mf", "imf", "pmf"])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_samples(sampler, name, count, golden):
    if name == "mf":
        process, model, theta = mean_flow.MeanFlow(), mean_net, golden["in/theta_mf"]
    else:
        process, model, theta = SAMPLED[name], two_heads, golden["in/theta_two"]
    given = {"y": golden["in/y"].astype(np.float32)}
    given |= {} if name == "mf" else {k: np.full(8, v, np.float32) for k, v in IMF.items()}

    def apply(x, **conditions):
        return timed(model, process)(theta, x, **conditions)[..., :3]

    levels = process.levels(count)
    predict = predictor(guidance.condition(apply, given), process, levels)
    x = process.noise_scale * jnp.asarray(golden["in/z1"])
    x = samplers.run(solvers.SAMPLERS[sampler](levels), predict, x)
    assert_close(x, golden[f"sample/{name}/{count}"])


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_draws_of_times(share, golden):
    process = mean_flow.MeanFlow(same_times=share)
    one, two = (times.logit_normal(each, -0.4, 1.0) for each in golden["in/normals"])
    drawn = process.pair(one, two)
    assert_close(jnp.stack([drawn["t"], drawn["r"]]), golden[f"draw/t_r_{share}"])


def test_times_of_pixel_mean_flow(golden):
    """The examples with r = t have the first of the two times, not the larger one."""
    process = mean_flow.ImprovedMeanFlow(prediction="x0", same_times=0.5)
    one, two = (times.logit_normal(each, 0.8, 0.8) for each in golden["in/normals"])
    assert_close(one, golden["draw/t_pmf"])
    drawn = process.pair(one, two)
    first = golden["draw/t_pmf"][:4]
    assert_close(jnp.stack([drawn["t"], drawn["r"]])[:, :4], [first, first])
    assert (two[:4] > one[:4]).any()  # where improved MeanFlow would take the other
    np.testing.assert_array_equal(drawn["t"][4:], np.maximum(one, two)[4:])
    np.testing.assert_array_equal(drawn["r"][4:], np.minimum(one, two)[4:])


@pytest.mark.parametrize("decay", [1, 2])
def test_draws_of_scales(decay, golden):
    process = mean_flow.ImprovedMeanFlow(omega_decay=float(decay))
    assert_close(process.scale(golden["in/uniforms"]), golden[f"draw/omega_beta{decay}"])
