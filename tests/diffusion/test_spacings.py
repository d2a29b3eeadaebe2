import numpy as np
import pytest

from dit_jax import settings
from dit_jax.diffusion import ddpm, flow, schedules, spacings
from dit_jax.errors import UserError

DDPM = ddpm.DDPM(schedules.linear())
LINEAR, GVP = flow.Flow("linear"), flow.Flow("gvp", "noise")
SHIFTED = flow.Flow("linear", shift=3.0)


def times(process, num_steps, **options):
    levels = spacings.levels(process, num_steps, **options)
    assert levels.alpha[-1] == 1 and levels.sigma[-1] == 0
    return levels.time[:-1].tolist()


@pytest.mark.parametrize(
    "num_steps, spacing, expected",
    [
        ("10", "linspace", list(range(999, -1, -111))),
        ("ddim10", "linspace", list(range(900, -1, -100))),
        ("10", "leading", list(range(900, -1, -100))),
        ("10", "trailing", list(range(999, 0, -100))),
        # The numbers of diffusers' DDIMScheduler; halves are rounded to even ones.
        ("7", "trailing", [999, 856, 713, 570, 428, 285, 142]),
        ("16", "trailing", [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249]),
        ("3", "leading", [666, 333, 0]),
        ("5", "log_snr", [999, 722, 302, 30, 0]),
        ("999,600.0,31,0", "linspace", [999, 600, 31, 0]),
    ],
)
def test_steps_of_ddpm(num_steps, spacing, expected):
    found = times(DDPM, num_steps, spacing=spacing)
    assert found[: len(expected)] == expected
    assert np.diff(found).max() < 0


@pytest.mark.parametrize("spacing, first", [("trailing", 995), ("log_snr", 995), ("linspace", 999)])
def test_trailing_and_log_snr_begin_where_a_predicted_noise_says_something_of_x0(spacing, first):
    """alpha is 5e-5 at the last step of the squared cosine."""
    cosine = ddpm.DDPM(schedules.squared_cosine())
    levels = spacings.levels(cosine, "10", spacing=spacing)
    assert levels.time[0] == first
    assert (levels.alpha[0] > 0.005) == (spacing != "linspace")


def test_each_step_keeps_its_noise():
    levels = spacings.levels(DDPM, "20", spacing="trailing")
    alpha_bar = DDPM.schedule.alpha_bar[levels.time[:-1].astype(int)]
    np.testing.assert_allclose(levels.alpha[:-1], np.sqrt(alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(levels.sigma[:-1], np.sqrt(1 - alpha_bar), rtol=1e-12)


@pytest.mark.parametrize("count", [2, 20, 250, 999, 1000])
@pytest.mark.parametrize("spacing", settings.SPACINGS[1:])
def test_every_number_of_steps_has_so_many_different_ones(count, spacing):
    found = times(DDPM, str(count), spacing=spacing)
    assert len(found) == count
    assert np.diff(found).max() < 0 and found[0] <= 999 and found[-1] >= 0


def test_steps_evenly_in_log_snr():
    """As even as whole steps can be: the first ones have few steps between them."""
    levels = spacings.levels(DDPM, "12", spacing="log_snr")
    width = np.diff(np.log(levels.alpha[:-1] / levels.sigma[:-1]))
    np.testing.assert_allclose(width[:8], 0.88, atol=0.01)
    np.testing.assert_allclose(width, 0.88, atol=0.07)


@pytest.mark.parametrize(
    "process, options, expected",
    [
        (LINEAR, {}, [1, 0.75, 0.5, 0.25]),
        (LINEAR, {"spacing": "trailing"}, [1, 0.75, 0.5, 0.25]),
        (LINEAR, {"shift": 3.0}, [1, 0.9, 0.75, 0.5]),
        (SHIFTED, {}, [1, 0.9, 0.75, 0.5]),
        (SHIFTED, {"spacing": "trailing"}, [1, 0.9, 0.75, 0.5]),
        (SHIFTED, {"shift": 1.0}, [1, 0.75, 0.5, 0.25]),
        (LINEAR, {"last_step": 0.04}, [1, 0.68, 0.36, 0.04]),
        (GVP, {}, [0.999, 0.74925, 0.4995, 0.24975]),
        (LINEAR, {"spacing": "log_snr"}, [0.999, 0.909063, 0.090937, 0.001]),
        (SHIFTED, {"spacing": "log_snr"}, [0.999, 0.909063, 0.090937, 0.001]),
        (LINEAR, {"spacing": "log_snr", "shift": 3.0}, [0.999666, 0.967731, 0.230829, 0.002994]),
    ],
)
def test_times_of_a_path(process, options, expected):
    np.testing.assert_allclose(times(process, "4", **options), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"last_step": 0.04}])
def test_both_spellings_of_a_number_of_steps_are_the_same_steps_of_a_path(options):
    assert times(SHIFTED, "ddim9", **options) == times(SHIFTED, "9", **options)


def test_a_shift_moves_the_log_snr_of_the_linear_path():
    plain, moved = (spacings.levels(LINEAR, "10", shift=shift) for shift in (1.0, 2.0))
    plain, moved = (np.log(x.alpha[1:-1] / x.sigma[1:-1]) for x in (plain, moved))
    np.testing.assert_allclose(moved, plain - np.log(2), rtol=1e-12)


@pytest.mark.parametrize("process", [LINEAR, GVP])
def test_times_of_a_path_evenly_in_log_snr(process):
    levels = spacings.levels(process, "20", spacing="log_snr")
    width = np.diff(np.log(levels.alpha[:-1] / levels.sigma[:-1]))
    np.testing.assert_allclose(width, width[0], rtol=1e-9)


PATH = {"process": "linear"}


@pytest.mark.parametrize(
    "diffusion, num_steps, options, message",
    [
        ({}, "0", {}, "^num_steps must be in 2 .. 1000, got '0'$"),
        ({}, "1", {}, "^num_steps must be in 2 .. 1000, got '1'$"),
        ({}, "1001", {"spacing": "trailing"}, "^num_steps must be in 2 .. 1000, got '1001'$"),
        (PATH, "0", {}, "^num_steps must be in 2 .. 100000, got '0'$"),
        (
            {},
            "ddim50",
            {"spacing": "trailing"},
            "^spacing must be auto for num_steps ddim50, got trailing$",
        ),
        (
            {},
            "9,3,1",
            {"spacing": "log_snr"},
            "^spacing must be auto for num_steps 9,3,1, got log_snr$",
        ),
        (
            PATH,
            "10",
            {"spacing": "leading"},
            "^spacing must be auto, .* for a path, .* leading$",
        ),
        (
            {},
            "10",
            {"shift": 2.0},
            "^shift must be 0 for process ddpm, which counts steps, got 2.0$",
        ),
        (PATH, "1,0.5", {"shift": 2.0}, "^shift must be 0 for a list of times, got 2.0$"),
        ({}, "9,9", {}, "^num_steps must be times that descend, got 9,9$"),
        ({}, "1000,9", {}, "^num_steps must be whole steps in 0 .. 999, got 1000,9$"),
        ({}, "9.5,9", {}, "^num_steps must be whole steps in 0 .. 999, got 9.5,9$"),
        (PATH, "1,0", {}, "^num_steps must be times above 0 and at most 1, got 1,0$"),
        (PATH, "1.5,1", {}, "^num_steps must be times above 0 and at most 1, got 1.5,1$"),
    ],
)
def test_what_a_process_has_not_is_named(diffusion, num_steps, options, message):
    options = {"spacing": "auto", "shift": 0.0} | options
    with pytest.raises(UserError, match=message):
        spacings.check(settings.Diffusion(**diffusion), num_steps, **options)
