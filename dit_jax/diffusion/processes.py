"""The processes by name: `settings.Diffusion` -> `process.Process`."""

from dit_jax.diffusion import ddpm, schedules
from dit_jax.errors import UserError


def make(diffusion):
    """The Process of a `settings.Diffusion`; UserError for a value that does not exist."""
    if diffusion.prediction != "noise":
        raise UserError(
            f"diffusion.prediction must be noise to train or sample, got {diffusion.prediction}, "
            "which SiT's checkpoints predict: their process does not exist here yet"
        )
    return ddpm.DDPM(schedules.make(diffusion.schedule, diffusion.num_steps))
