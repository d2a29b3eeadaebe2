"""The processes by name."""

import pytest

from dit_jax.diffusion import ddpm, processes
from dit_jax.errors import UserError
from dit_jax.settings import Diffusion


def test_the_default_process_predicts_noise():
    process = processes.make(Diffusion(num_steps=100))
    assert isinstance(process, ddpm.DDPM) and process.last_time == 99


def test_velocity_has_no_process():
    with pytest.raises(UserError, match="prediction must be noise to train or sample, got velo"):
        processes.make(Diffusion(prediction="velocity"))
