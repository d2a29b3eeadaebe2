"""The processes by name: `settings.Diffusion` -> `process.Process`."""

from dit_jax.diffusion import ddpm, fields, flow, losses, mean_flow, schedules, times


def make(diffusion):
    """The Process of a `settings.Diffusion`; UserError if there is none."""
    fields.check(diffusion)
    weight = losses.Weight(diffusion.weight, diffusion.weight_gamma or None)
    if not fields.is_path(diffusion):
        schedule = schedules.make(diffusion.schedule, diffusion.num_steps)
        return ddpm.DDPM(schedule, diffusion.prediction, weight, diffusion.stratified)
    draw = times.Draw(diffusion.time, diffusion.time_mean, diffusion.time_std, diffusion.stratified)
    if fields.is_mean_flow(diffusion):
        return _mean_flow(diffusion, draw)
    return flow.Flow(
        *(diffusion.process, diffusion.prediction, draw, diffusion.shift),
        time_scale=diffusion.time_scale,
        reverse_time=diffusion.reverse_time,
        weight=weight,
        noise_scale=diffusion.noise_scale,
    )


def _mean_flow(diffusion, draw):
    kind = mean_flow.MeanFlow
    names = ("prediction", "noise_scale", "time_scale", "reverse_time")
    names += ("same_times", "uniform_times", "adaptive_power", "adaptive_eps")
    if diffusion.process == "improved_mean_flow":
        kind, names = mean_flow.ImprovedMeanFlow, (*names, "omega_max", "omega_decay")
    else:
        names = (*names, "omega", "kappa", "omega_interval")
    return kind(draw=draw, **{name: getattr(diffusion, name) for name in names})
