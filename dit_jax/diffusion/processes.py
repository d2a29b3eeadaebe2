"""The processes by name: `settings.Diffusion` -> `process.Process`."""

from dit_jax.diffusion import ddpm, fields, flow, losses, schedules, times


def make(diffusion):
    """The Process of a `settings.Diffusion`; UserError if there is none."""
    fields.check(diffusion)
    weight = losses.Weight(diffusion.weight, diffusion.weight_gamma or None)
    if not fields.is_path(diffusion):
        schedule = schedules.make(diffusion.schedule, diffusion.num_steps)
        return ddpm.DDPM(schedule, diffusion.prediction, weight, diffusion.stratified)
    draw = times.Draw(diffusion.time, diffusion.time_mean, diffusion.time_std, diffusion.stratified)
    return flow.Flow(
        *(diffusion.process, diffusion.prediction, draw, diffusion.shift),
        time_scale=diffusion.time_scale,
        reverse_time=diffusion.reverse_time,
        weight=weight,
        noise_scale=diffusion.noise_scale,
    )
