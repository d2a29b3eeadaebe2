import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, flow, losses, predictions, processes, samplers, schedules
from dit_jax.diffusion.process import predictor, timed
from dit_jax.errors import UserError
from dit_jax.settings import SIT, Diffusion

SHAPE = (5, 2, 3, 2)
PATHS = ("linear", "gvp")
PREDICTIONS = ("velocity", "noise", "v", "x0")
ALL = [
    *(Diffusion(process=path, prediction=each) for path in PATHS for each in PREDICTIONS),
    *(Diffusion(prediction=each) for each in ("noise", "v", "x0")),
    Diffusion(**SIT),
    Diffusion(process="linear", prediction="velocity", noise_scale=2.0),
    Diffusion(process="gvp", prediction="x0", noise_scale=3.0),
]


def name(diffusion):
    sit = "-sit" * diffusion.reverse_time
    scale = f"-{diffusion.noise_scale:g}" * (diffusion.noise_scale != 1)
    return f"{diffusion.process}-{diffusion.prediction}{sit}{scale}"


every = pytest.mark.parametrize("diffusion", ALL, ids=name)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inner_times(process):
    """Five times from almost the data to almost the noise."""
    if isinstance(process, ddpm.DDPM):
        return np.array([0, 3, 400, 700, 999])
    return np.float32([0.01, 0.2, 0.5, 0.9, 0.99])


def known_at(process, t):
    """The coefficients of what a process predicts, of its formula."""
    if isinstance(process, ddpm.DDPM):
        return predictions.coefficients(process.prediction, *process.alpha_sigma(t))
    sign = -1 if process.reverse_time else 1
    alpha, sigma, d_alpha, d_sigma = flow.PATHS[process.path](np.float64(t), np)
    sigma, rates = sigma * process.noise_scale, (d_alpha, d_sigma * process.noise_scale)
    rates = dict(zip(("d_alpha", "d_sigma"), (sign * x for x in rates), strict=True))
    return predictions.coefficients(process.prediction, alpha, sigma, **rates)


def target(process, t, x0, noise):
    known = known_at(process, t)
    p, q = (np.float32(x).reshape(-1, *(1,) * (x0.ndim - 1)) for x in (known.p, known.q))
    return p * x0 + q * noise


@every
@pytest.mark.parametrize("shape", [SHAPE, (5, 4, 1), (5, 2, 2, 2, 3)])
def test_what_is_predicted_reads_back_as_x0_and_noise(diffusion, shape):
    """On grids of any number of axes, and with a second half that nothing reads."""
    process = processes.make(diffusion)
    x0, noise, t = normal(0, shape), normal(1, shape), inner_times(process)
    x, out = process.corrupt(x0, t, noise), target(process, t, x0, noise)
    out = np.concatenate([out, np.full_like(out, np.nan)], axis=-1)
    found = process.read(out, x, t)
    # An error of float32 in x grows by 1 / alpha or 1 / sigma, about 157 at most.
    np.testing.assert_allclose(found[0], x0, atol=5e-4)
    np.testing.assert_allclose(found[1], noise, atol=5e-4)


@every
def test_a_perfect_network_has_no_loss_and_an_error_of_1_has_a_loss_of_1(diffusion):
    process = processes.make(diffusion)
    x0, noise, t = normal(0), normal(1), inner_times(process)

    def network(x, t, off=0.0):
        np.testing.assert_array_equal(x, process.corrupt(x0, t, noise))
        return target(process, t, x0, noise) + off

    np.testing.assert_allclose(process.losses(network, x0, t, noise)["loss"], 0, atol=1e-10)
    terms = process.losses(lambda x, t: network(x, t, 1.0), x0, t, noise)
    assert terms.keys() == {"loss", "mse"}
    np.testing.assert_allclose(terms["loss"], 1, rtol=1e-5)
    np.testing.assert_array_equal(terms["loss"], terms["mse"])


@pytest.mark.parametrize("weight", losses.GAMMAS)
@pytest.mark.parametrize("path", ["ddpm", *PATHS])
def test_one_guess_of_x0_has_one_loss_whatever_is_predicted(path, weight):
    """With every weight: Hang et al. 2023, sec. 3.4."""
    all_losses, x0, noise, guess = [], normal(0), normal(1), normal(2)
    plain = [each for each in ALL if not each.reverse_time and each.noise_scale == 1]
    for diffusion in (each for each in plain if each.process == path):
        process = processes.make(dataclasses.replace(diffusion, weight=weight))
        t = inner_times(process)[1:]
        x = process.corrupt(x0[1:], t, noise[1:])
        alpha, sigma = (np.float32(a).reshape(-1, 1, 1, 1) for a in process.alpha_sigma(t))
        implied = (x - alpha * guess[1:]) / sigma
        out = target(process, t, guess[1:], implied)
        terms = process.losses(lambda x, t, out=out: out, x0[1:], t, noise[1:])
        assert not np.allclose(terms["loss"], terms["mse"])
        all_losses.append(terms["loss"])
    assert len(all_losses) == len(PREDICTIONS) - (path == "ddpm")
    for other in all_losses[1:]:
        np.testing.assert_allclose(other, all_losses[0], rtol=1e-3)


@every
@pytest.mark.parametrize("scale", [2.5])
def test_guidance_before_a_reading_is_guidance_after_it(diffusion, scale):
    process = processes.make(diffusion)
    t, x, given, null = inner_times(process), normal(0), normal(1), normal(2)

    def mix(a, b):
        return b + scale * (a - b)

    mixed = process.read(mix(given, null), x, t)
    apart = [process.read(out, x, t) for out in (given, null)]
    for before, a, b in zip(mixed, *apart, strict=True):
        np.testing.assert_allclose(before, mix(a, b), rtol=1e-3, atol=1e-3)


@every
def test_values_and_gradients_are_finite_at_both_ends(diffusion):
    process = processes.make(dataclasses.replace(diffusion, weight="min_snr"))
    is_ddpm = isinstance(process, ddpm.DDPM)
    t = np.array([0, 0, process.last_time, process.last_time], np.int32 if is_ddpm else np.float32)
    x0, noise = normal(0)[:4], normal(1)[:4]

    def total(out, x0, t):
        x = process.corrupt(x0, t, noise)
        found = process.read(out, x, t)
        loss = process.losses(lambda x, t: out * x, x0, t, noise)["loss"]
        return jnp.sum(found[0]) + jnp.sum(found[1]) + jnp.sum(loss)

    arguments = (0, 1) if is_ddpm else (0, 1, 2)
    value, gradients = jax.value_and_grad(total, arguments)(normal(2)[:4], x0, t)
    assert np.isfinite(value) and all(np.isfinite(each).all() for each in gradients)


@every
@pytest.mark.parametrize("clip_x0", [False, True])
def test_levels_start_at_noise_and_are_read_as_the_process_is(diffusion, clip_x0):
    process = processes.make(diffusion)
    levels = process.levels("7")
    assert levels.num_steps == 7 and (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    assert (np.diff(levels.time[:-1]) < 0).all() and levels.time[-1] == 0
    assert levels.alpha[0] < 0.01 and levels.sigma[0] > 0.99
    x, out = normal(0), normal(1)
    read = process.reader(levels, clip_x0=clip_x0)
    for i in range(levels.num_steps):
        t = np.full(len(x), levels.time[i])
        t = t.astype(int) if isinstance(process, ddpm.DDPM) else np.float32(t)
        x0, noise = process.read(out, x, t)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
            noise = (x - levels.alpha[i] * x0) / levels.sigma[i]
        found = read(jnp.asarray(out), jnp.asarray(x), i)
        for a, b in ((found.x0, x0), (found.noise, noise)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@every
def test_rates_are_the_velocity_of_the_levels(diffusion):
    """In the limit of small steps, with one x0 and one noise for all levels."""
    process = processes.make(diffusion)
    levels = process.levels("1000")
    rates, x0, noise = levels.rates, 0.7, -1.3
    y = (levels.alpha * x0 + levels.sigma * noise) / rates.scale
    rate = rates.d_alpha * x0 + rates.d_sigma * noise
    middle = (rate[1:] + rate[:-1]) / 2
    np.testing.assert_allclose(np.diff(y), middle * np.diff(rates.coordinate), rtol=1e-5, atol=1e-9)
    assert rates.coordinate[-1] == 0 and (np.diff(rates.coordinate) < 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_samples_a_gaussian_with_its_exact_network(path, prediction):
    """Also from the very end of the path, where alpha is 0."""
    process, mean, std = flow.Flow(path, prediction), 0.5, 0.3

    def network(x, t):
        t = jnp.full((1, 1), t)
        alpha, sigma, d_alpha, d_sigma = flow.PATHS[path](t, jnp)
        centred = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0, noise = mean + alpha * std**2 * centred, sigma * centred
        known = predictions.coefficients(prediction, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
        return known.p * x0 + known.q * noise

    levels = process.levels("200")
    x = samplers.run(
        samplers.ddim(levels), predictor(network, process, levels), normal(0, (128, 128))
    )
    # Four standard errors, and the first order of so many steps.
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / 128)
    assert float(x.std()) == pytest.approx(std, rel=4 / (128 * np.sqrt(2)) + 0.01)


@pytest.mark.parametrize("path", PATHS)
def test_a_constant_velocity_moves_noise_by_it(path):
    """Of the linear path: x(0) = x(1) - c. A SiT's c points the other way."""
    x, c = normal(0), 0.75
    for sign, process in ((-1, flow.Flow("linear")), (1, processes.make(Diffusion(**SIT)))):
        levels = process.levels("13")
        predict = predictor(lambda x, t: jnp.full_like(x, c), process, levels)
        moved = samplers.run(samplers.ddim(levels), predict, x)
        np.testing.assert_allclose(moved, x + sign * c, atol=1e-5)


@every
def test_the_network_gets_its_own_time(diffusion):
    process = processes.make(diffusion)
    seen = timed(lambda params, x, t, y: (params, x, t, y), process)(1, 2, t=np.float32(0.25), y=3)
    expected = 0.25 if diffusion.process == "ddpm" else 250
    assert seen == (1, 2, 0.75 if diffusion.reverse_time else expected, 3)


def test_the_time_of_a_ratio_is_where_the_path_has_it():
    for path, t, scale in itertools.product(PATHS, (0.01, 0.5, 0.98), (1.0, 2.0)):
        process = flow.Flow(path, noise_scale=scale)
        alpha, sigma = process.alpha_sigma(t)
        assert process.time_at(np.log(alpha / sigma)) == pytest.approx(t, rel=1e-12)
    process = ddpm.DDPM(schedules.linear())
    alpha, sigma = process.alpha_sigma(np.array([0, 130, 258, 999]))
    ratios = np.append(np.log(alpha / sigma) + 1e-4, [50.0, -50.0])
    assert process.time_at(ratios).tolist() == [0, 130, 258, 999, 0, 999]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t, smaller", [(0.3, None), (0.01, "x0"), (0.99, "noise")])
def test_one_guess_of_the_velocity_has_one_loss_with_its_weight(path, t, smaller):
    """Its own squared error; beyond CLIP the losses of x0 and noise are smaller at their ends."""
    found, same = {}, np.full(5, t, np.float32)
    x0, noise, guess, scale = normal(0), normal(1), normal(2), 2.0
    for kind in PREDICTIONS:
        weight = losses.Weight("constant" if kind == "velocity" else "velocity")
        process = flow.Flow(path, kind, weight=weight, noise_scale=scale)
        x = process.corrupt(x0, same, noise)
        alpha, sigma = (np.float32(each) for each in process.alpha_sigma(t))
        out = target(process, same, guess, (x - alpha * guess) / sigma)
        terms = process.losses(lambda x, t, out=out: out, x0, same, noise)
        found[kind] = terms["loss"]
    for kind in set(PREDICTIONS) - {"velocity", smaller}:
        np.testing.assert_allclose(found[kind], found["velocity"], rtol=1e-3)
    if smaller:
        share = float(
            np.divide(*(flow.PATHS[path](np.array(each), np)[1] for each in (0.01, 0.05)))
        )
        np.testing.assert_allclose(found[smaller], share**2 * found["velocity"], rtol=1e-3)


@pytest.mark.parametrize("prediction", ["x0", "noise"])
def test_a_velocity_that_is_clipped_is_what_every_sampler_sees(prediction):
    """Of an x0: (x - x0) / max(t, CLIP) on the linear path; of a noise: (noise - x) / (1 - t)."""
    process = flow.Flow("linear", prediction, weight=losses.Weight("velocity"), noise_scale=2.0)
    levels, x, out = process.levels_at([1.0, 0.98, 0.5, 0.04, 0.02]), normal(0), normal(1)
    read = process.reader(levels, clip_x0=False)
    for i, t in enumerate(levels.time[:-1]):
        found = read(jnp.asarray(out), jnp.asarray(x), i)
        if prediction == "x0":
            velocity = (x - out) / max(t, flow.CLIP)
        else:
            velocity = (2 * out - x) / max(1 - t, flow.CLIP)
        np.testing.assert_allclose(2 * found.noise - found.x0, velocity, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            (1 - t) * found.x0 + 2 * t * found.noise, x, rtol=1e-4, atol=1e-4
        )


def test_a_shift_moves_training_and_sampling_to_more_noise():
    plain, shifted = flow.Flow("linear"), flow.Flow("linear", shift=3.0)
    t = plain.draw_time(jax.random.key(0), (1000,))
    expected = 3 * t / (1 + 2 * t)
    np.testing.assert_allclose(shifted.draw_time(jax.random.key(0), (1000,)), expected, rtol=1e-6)
    time = plain.levels("8").time
    np.testing.assert_allclose(shifted.levels("8").time, 3 * time / (1 + 2 * time), rtol=1e-12)
    ratio = np.log(np.divide(*plain.alpha_sigma(time[1:-1])))
    np.testing.assert_allclose(
        np.log(np.divide(*shifted.alpha_sigma(shifted.levels("8").time[1:-1]))),
        ratio - np.log(3),
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    "time, message",
    [
        ([0.5, 0.5], r"times must be numbers, descending, got \[0.5, 0.5\]"),
        ([], "times must be numbers, descending"),
        ([0.5, 0.0], "must be above 0 and at most 1 for a prediction of velocity, got 0.5 to 0"),
        ([1.5, 0.5], "got 1.5 to 0.5"),
        ([float("nan")], "times must be"),
    ],
)
def test_times_that_are_no_levels(time, message):
    with pytest.raises(UserError, match=message):
        flow.Flow("linear").levels_at(time)


def test_the_noise_is_not_asked_where_there_is_no_data():
    with pytest.raises(UserError, match="at most 0.999 for a prediction of noise, got 1 to 0.5"):
        flow.Flow("linear", "noise").levels_at([1.0, 0.5])
