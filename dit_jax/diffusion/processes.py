"""The processes by name: `settings.Diffusion` -> `process.Process`."""

from dit_jax.diffusion import ddpm, schedules


def make(diffusion):
    """The Process of a `settings.Diffusion`; UserError for a value that does not exist."""
    schedules.check(diffusion)
    return ddpm.DDPM(schedules.make(diffusion.schedule, diffusion.num_steps))
