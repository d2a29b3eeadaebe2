"""Paths, predictions, losses, weights and times against the public reference codes.

testdata/golden_processes.npz holds what SiT (947f95b, MIT), Min-SNR's and P2's authors' codes and
diffusers 0.42.1 (Apache-2.0) computed in float64 for models that are formulas. SiT names noise x0,
data x1, and its time s is 0 for noise: s = 1 - t here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, flow, losses, predictions, schedules, solvers, times
from dit_jax.diffusion.process import Levels, Rates

TESTDATA = Path(__file__).parents[1] / "testdata"
PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
SCHEDULE = schedules.linear()
NAMES = {"eps": "noise", "v": "v", "x0": "x0"}
BOUND = 1e-5  # of the largest value: float32


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTDATA / "golden_processes.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def with_vp(monkeypatch):
    """SiT's third path, which only tests have: any path is a line of the table."""
    monkeypatch.setitem(flow.PATHS, "vp", vp)


def vp(t, xp):
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.05
    rate = -(t * 19.9 / 2 + 0.05)
    alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
    rate_of_sigma = -(alpha**2) * rate / xp.where(sigma == 0, 1, sigma)  # infinite at the data
    return alpha, sigma, alpha * rate, rate_of_sigma


def sit(path, prediction):
    return flow.Flow(PATHS[path], prediction, time_scale=1.0, reverse_time=True)


def flow_model(x, s):
    return jnp.tanh(0.3 * x + 0.1 * s.reshape(-1, 1, 1, 1))


def step_model(x, t):
    return jnp.tanh(0.3 * x + 0.001 * t.reshape(-1, 1, 1, 1).astype(np.float32))


def times_of(golden):
    """The times as float64: alpha is 0.002 at the first, and a float32 near 1 is too coarse."""
    return 1 - np.round(np.float64(golden["sit.t"]), 6)


def velocity_by_s(path, t, x0, noise):
    _, _, d_alpha, d_sigma = (
        np.float32(y).reshape(-1, 1, 1, 1) for y in flow.PATHS[PATHS[path]](t, np)
    )
    return -(d_alpha * x0 + d_sigma * noise)


@pytest.mark.parametrize("path", PATHS)
def test_paths(golden, check_close, path):
    found = flow.PATHS[PATHS[path]](times_of(golden), np)
    for sign, name, values in zip(
        (1, 1, -1, -1), ("alpha", "sigma", "d_alpha", "d_sigma"), found, strict=True
    ):
        check_close(f"sit/{path}/{name}", sign * values, golden[f"sit.{path}.{name}"], BOUND)


@pytest.mark.parametrize("path", PATHS)
def test_corruption_and_target(golden, check_close, path):
    x0, noise, t = golden["sit.x1"], golden["sit.x0"], times_of(golden)
    check_close(
        f"sit/{path}/xt",
        sit(path, "velocity").corrupt(x0, np.float32(t), noise),
        golden[f"sit.{path}.xt"],
        BOUND,
    )
    check_close(
        f"sit/{path}/ut", velocity_by_s(path, t, x0, noise), golden[f"sit.{path}.ut"], BOUND
    )


@pytest.mark.parametrize("path", PATHS)
def test_forms_of_the_noise_of_the_sde(golden, check_close, path):
    t = times_of(golden)
    alpha, sigma, d_alpha, d_sigma = flow.PATHS[PATHS[path]](t, np)
    levels = Levels(alpha, sigma, t, Rates(t, np.ones_like(t), d_alpha, d_sigma))
    names = {"sbdm": "SBDM", "increasing_decreasing": "increasing-decreasing"}
    for form, weight in solvers.WEIGHTS.items():
        key = f"sit.{path}.diffusion.{names.get(form, form)}"
        check_close(key, weight(levels), golden[key], BOUND)
    drift_variance = solvers.WEIGHTS["sbdm"](levels)
    check_close(f"sit.{path}.drift_var", drift_variance, golden[f"sit.{path}.drift_var"], BOUND)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["velocity", "noise", "score"])
def test_readings_and_losses(golden, check_close, path, kind):
    """Losses with SiT's weights of velocity are the velocity's, of the converted output."""
    x0, noise, t = golden["sit.x1"], golden["sit.x0"], times_of(golden)
    process = sit(path, "velocity" if kind == "velocity" else "noise")
    x, sigma = golden[f"sit.{path}.xt"], flow.PATHS[PATHS[path]](t, np)[1].reshape(-1, 1, 1, 1)
    out = flow_model(x, golden["sit.t"])
    np.testing.assert_allclose(process.network_time(np.float32(t)), golden["sit.t"], atol=1e-7)
    if kind == "score":  # no prediction of its own: it is -noise / sigma
        out = np.float32(-sigma) * out
    read = process.reader(process.levels_at(t), clip_x0=False)
    read_x0, read_noise, _ = read(out, x, np.arange(len(t)))
    drift = velocity_by_s(path, t, read_x0, read_noise)
    check_close(f"sit/{path}/{kind}/drift", drift, golden[f"sit.{path}.{kind}.drift"], BOUND)
    check_close(
        f"sit/{path}/{kind}/score", -read_noise / sigma, golden[f"sit.{path}.{kind}.score"], BOUND
    )
    terms = process.losses(lambda x, t: out, x0, np.float32(t), noise)
    check_close(
        f"sit/{path}/{kind}/loss", terms["loss"], golden[f"sit.{path}.{kind}.None.loss"], BOUND
    )
    error = drift - golden[f"sit.{path}.ut"]
    converted = losses.mean_square(error)
    other = "None" if kind == "velocity" else "velocity"
    check_close(
        f"sit/{path}/{kind}/v-loss", converted, golden[f"sit.{path}.{kind}.{other}.loss"], BOUND
    )
    if kind == "velocity":
        expected = golden[f"sit.{path}.noise_from_velocity"]
        check_close(f"sit/{path}/noise_from_velocity", read_noise, expected, BOUND)
    if kind == "score":
        check_close(
            f"sit/{path}/velocity_from_score",
            drift,
            golden[f"sit.{path}.velocity_from_score"],
            BOUND,
        )


@pytest.mark.parametrize("row", range(6))
def test_times_end_where_those_of_sit_do(golden, row):
    path, kind = golden["sit.intervals.rows"][row].decode().split(".")
    first, last = sit(path, "velocity" if kind == "velocity" else "noise").edges
    interval = golden["sit.intervals"][row]
    np.testing.assert_allclose(interval[:4], [1 - last, 1 - first] * 2, rtol=1e-6)


@pytest.mark.parametrize("kind", NAMES)
def test_ddpm_conversions(golden, check_close, kind):
    x, t = golden["ddpm.x_t"], golden["ddpm.t"]
    process = ddpm.DDPM(SCHEDULE, NAMES[kind])
    out = step_model(x, t)
    x0, noise = process.read(out, x, t)
    if kind != "x0":
        check_close(f"ddpm/x0_from_{kind}", x0, golden[f"ddpm.x0_from_{kind}"], BOUND)
    if kind == "v":
        check_close("ddpm/eps_from_v", noise, golden["ddpm.eps_from_v"], BOUND)
        known = predictions.coefficients("v", *process.alpha_sigma(t))
        target = predictions.target(
            known._replace(p=known.p.reshape(-1, 1, 1, 1), q=known.q.reshape(-1, 1, 1, 1)),
            *(golden["ddpm.x0"], golden["ddpm.noise"]),
        )
        check_close("ddpm/v_target", target, golden["ddpm.v_target"], BOUND)
    corrupted = process.corrupt(golden["ddpm.x0"], t, golden["ddpm.noise"])
    check_close("ddpm/x_t", corrupted, x, BOUND)
    alpha, sigma = process.alpha_sigma(t)
    check_close("ddpm/alpha_bar", alpha**2, golden["ddpm.alpha_bar"], BOUND)
    check_close("ddpm/snr", (alpha / sigma) ** 2, golden["ddpm.snr"], BOUND)


WEIGHTS = [
    *((kind, f"min_snr_{gamma}", "min_snr", gamma) for kind in ("eps", "x0") for gamma in (1, 5)),
    *(("v", f"vmin_snr_{gamma}", "min_snr", gamma) for gamma in (1, 5)),
    *(("eps", f"soft_min_snr_{gamma}", "soft_min_snr", gamma) for gamma in (1, 5)),
    ("eps", "p2_0.5_1", "p2", 0.5),
    ("eps", "p2_1_1", "p2", 1),
]


@pytest.mark.parametrize("kind, key, name, gamma", WEIGHTS)
def test_ddpm_weights_and_losses(golden, check_close, kind, key, name, gamma):
    x0, noise, t = (golden[f"ddpm.{name}"] for name in ("x0", "noise", "t"))
    process = ddpm.DDPM(SCHEDULE, NAMES[kind], losses.Weight(name, float(gamma)))
    known = predictions.coefficients(NAMES[kind], *process.alpha_sigma(t))
    weight = losses.loss_weight(process.weight, known)
    np.testing.assert_allclose(weight, golden[f"ddpm.{kind}.weight.{key}"], rtol=1e-6)
    terms = process.losses(step_model, x0, t, noise)
    check_close(f"ddpm/{kind}/mse", terms["mse"], golden[f"ddpm.{kind}.mse"], BOUND)
    if (expected := golden.get(f"ddpm.{kind}.loss.{key}")) is not None:
        check_close(f"ddpm/{kind}/{key}", terms["loss"], expected, BOUND)


def test_logit_normal_times(golden, check_close):
    normal = jax.scipy.special.ndtri(golden["time.u"])
    for i, (mean, std) in enumerate(golden["time.logit_normal.mean_std"]):
        quantile = times.logit_normal(normal, mean, std)
        check_close(f"time/quantile{i}", quantile, golden["time.logit_normal.quantile"][i], BOUND)
        # The density is that of the normal number, by the slope of the map.
        t = golden["time.t"].astype(np.float64)
        inside = (t > 0) & (t < 1)
        z = np.float32((np.log(t[inside] / (1 - t[inside])) - mean) / std)
        slope = jax.vmap(jax.grad(lambda z, m=mean, s=std: times.logit_normal(z, m, s)))(z)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / slope
        expected = golden["time.logit_normal.density"][i][inside]
        check_close(f"time/density{i}", density, expected, BOUND)
    for key in (key for key in golden if key.startswith("time.sd3.logit_normal.")):
        parts = key.removeprefix("time.sd3.logit_normal.").split(".")
        mean, std = float(".".join(parts[:2])), float(".".join(parts[2:]))
        found = times.logit_normal(golden["time.sd3.normal"], mean, std)
        check_close(key, found, golden[key], BOUND)


def test_shifted_times(golden, check_close):
    t = golden["time.t"]
    for i, factor in enumerate(golden["time.shifts"]):
        check_close(f"time/shift{i}", times.shift(t, factor), golden["time.shifted"][i], BOUND)
    for i, mu in enumerate(golden["time.dynamic_mus"]):  # FLUX's form of the same
        expected = golden["time.dynamic_shifted"][i]
        check_close(f"time/dynamic{i}", times.shift(t, np.exp(mu)), expected, BOUND)
