"""The processes by name, and the pairs that do not exist."""

import pytest

from dit_jax.diffusion import ddpm, fields, flow, losses, processes, times
from dit_jax.errors import UserError
from dit_jax.settings import SIT, Diffusion


def test_the_default_process_predicts_noise():
    process = processes.make(Diffusion(num_steps=100))
    assert isinstance(process, ddpm.DDPM) and process.last_time == 99
    assert process[1:] == ("noise", losses.Weight("constant", None), False)


def test_a_path_by_its_name_predicts_velocity():
    process = processes.make(Diffusion(process="linear"))
    assert process == flow.Flow("linear") and process.last_time == 1
    assert process.prediction == "velocity"


def test_every_field_reaches_the_process():
    diffusion = Diffusion(
        process="gvp",
        prediction="x0",
        time="logit_normal",
        time_mean=-0.5,
        time_std=2.0,
        stratified=True,
        shift=3.0,
        weight="p2",
        weight_gamma=0.5,
    )
    process = processes.make(diffusion)
    draw = times.Draw("logit_normal", -0.5, 2.0, stratified=True)
    assert process == flow.Flow("gvp", "x0", draw, 3.0, weight=losses.Weight("p2", 0.5))
    process = processes.make(Diffusion(prediction="v", weight="min_snr", stratified=True))
    assert process[1:] == ("v", losses.Weight("min_snr", None), True)
    process = processes.make(Diffusion(**SIT))
    assert process == flow.Flow("linear", time_scale=1.0, reverse_time=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"prediction": "velocity"},
            "^prediction must be one of noise, v, x0 for process ddpm, got velocity$",
        ),
        ({"shift": 3.0}, "^shift must be 1.0 for process ddpm, which counts steps, got 3.0$"),
        ({"time_scale": 1.0}, "^time_scale must be 1000.0 for process ddpm"),
        ({"reverse_time": True}, "^reverse_time must be False for process ddpm"),
        ({"time": "logit_normal"}, "^time must be uniform for process ddpm, got logit_normal$"),
        (
            {"time_mean": 1.0},
            "^time_mean must be left at 0.0 for time uniform, which does not use it, got 1.0$",
        ),
        (
            {"weight_gamma": 2.0},
            "^weight_gamma must be left at 0.0 for weight constant, which does not use it",
        ),
        ({"schedule": "cubic"}, "^schedule must be one of linear, squared_cosine, got 'cubic'$"),
    ],
)
def test_pairs_that_do_not_exist_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        processes.make(Diffusion(**options))


@pytest.mark.parametrize("num_steps", ["0", "1", "ddim1", "100001", "x", "", "-3"])
@pytest.mark.parametrize("process", ["linear", "ddpm"])
def test_numbers_of_steps_that_do_not_exist(process, num_steps):
    with pytest.raises(UserError, match="^num_steps must be .*, got "):
        fields.check_num_steps(Diffusion(process=process), num_steps)


def test_both_spellings_of_a_number_of_steps_are_equal_steps_of_a_path():
    process = processes.make(Diffusion(process="linear"))
    assert process.levels("ddim25").time.tolist() == process.levels(25).time.tolist()
    fields.check_num_steps(Diffusion(process="linear"), "ddim33")
