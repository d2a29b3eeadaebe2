"""JiT's loss, gradient and samples (Li & He 2025) for a network that is a formula.

testdata/golden_jit.npz holds what its formulas gave in float64. In it t is 1 for data: 1 - t here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import processes, samplers, solvers, times
from dit_jax.diffusion.process import predictor
from dit_jax.settings import Diffusion

NULL = 10
TOLERANCE = {"rtol": 2e-5, "atol": 5e-6}  # float32
JIT = {"process": "linear", "prediction": "x0", "weight": "velocity"}
JIT |= {"time": "logit_normal", "time_mean": 0.8, "time_std": 0.8}
JIT |= {"time_scale": 1.0, "reverse_time": True}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "testdata" / "golden_jit.npz") as file:
        return {name: np.float32(x) for name, x in file.items()}


def formula(theta, x, *given):
    """tanh of x, of its neighbour and of one number for each example, each times a parameter."""
    total = theta[0] * x + theta[1] * jnp.roll(x, 1, axis=2)
    for weight, each in zip(theta[2:], given, strict=True):
        total += weight * jnp.reshape(each, (-1, 1, 1, 1))
    return jnp.tanh(total)


@pytest.mark.parametrize("scale", [1, 2])
def test_loss_and_gradient(golden, scale):
    process = processes.make(Diffusion(**JIT, noise_scale=float(scale)))
    x0, noise = golden["in/x"], golden["in/e"]
    y = np.where(golden["in/drop"], NULL, golden["in/y"])
    t = 1 - golden["in/t_jit"]
    assert t.min() < 0.05  # beyond the clip
    expected = {name.split("/")[2]: x for name, x in golden.items() if f"jit/s{scale}/" in name}
    x = process.corrupt(x0, t, noise)
    np.testing.assert_allclose(x, expected["z"], **TOLERANCE)
    out = formula(golden["in/theta_jit"], x, process.network_time(t), y)
    np.testing.assert_allclose(out, expected["x_pred"], **TOLERANCE)
    found, of_noise = process.read(out, x, t)
    # The velocity from data to noise is the negative one of JiT, which counts the other way.
    np.testing.assert_allclose(found - scale * of_noise, expected["v_pred"], rtol=1e-4, atol=2e-5)

    def loss(theta):
        def network(x, t):
            return formula(theta, x, process.network_time(t), y)

        each = process.losses(network, x0, t, noise)["loss"]
        return each.mean(), each

    (mean, each), grad = jax.value_and_grad(loss, has_aux=True)(golden["in/theta_jit"])
    np.testing.assert_allclose(each, expected["loss"], **TOLERANCE)
    np.testing.assert_allclose(mean, expected["mean_loss"], **TOLERANCE)
    np.testing.assert_allclose(grad, expected["grad"], **TOLERANCE)


@pytest.mark.parametrize(
    "name", ["euler/1", "euler/2", "euler/4", *(f"heun/{i}" for i in (1, 2, 4, 50))]
)
def test_samples(golden, name):
    """Guided by 2.9 where a network call has 0 < t < 0.9; the last of 50 steps are clipped."""
    process = processes.make(Diffusion(**JIT))
    sampler, count = name.split("/")
    levels = process.levels_at(np.linspace(1, 0, int(count) + 1)[:-1])
    y = golden["in/y"]

    def network(x, t):
        out, null = (
            formula(
                golden["in/theta_jit"], x, process.network_time(jnp.broadcast_to(t, (8,))), label
            )
            for label in (y, jnp.full_like(y, NULL))
        )
        scale = jnp.where((t < 0.9) & (t > 0), 2.9, 1.0)
        return null + scale * (out - null)

    predict = predictor(network, process, levels)
    x = samplers.run(solvers.SAMPLERS[sampler](levels), predict, golden["in/z1"])
    np.testing.assert_allclose(x, golden[f"sample/jit_{name}"], **TOLERANCE)


def test_times(golden):
    """The logit of 1 - t has the negative mean."""
    t = times.logit_normal(-golden["in/normals"][0], JIT["time_mean"], JIT["time_std"])
    np.testing.assert_allclose(1 - t, golden["draw/t_jit"], **TOLERANCE)
