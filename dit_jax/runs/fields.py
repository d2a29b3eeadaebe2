"""Checks whether the fields of Settings fit together that need no jax, hence no devices.

`runs.build` repeats them and adds what depends on the devices.
"""

from dit_jax import settings as settings_lib
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError, of_topic
from dit_jax.models import fields as model_fields
from dit_jax.sampling import fields as sampling_fields


def has_images(settings):
    """Whether examples and samples can be drawn: grey or coloured pixels, or latents with a vae."""
    model, data = settings.model, settings.data
    is_image = data.space == "pixels" and model.in_channels in (1, 3)
    return len(model.input_size) == 2 and (is_image or bool(data.vae))


def check(settings):
    """UserError that names a field of Settings that does not fit the others."""
    model, compute = settings.model, settings.compute
    with of_topic("model"):
        model_fields.check(model)
    axes = {name: getattr(settings.mesh, name) for name in ("data", "fsdp", "tensor")}
    settings_lib.check_mesh(**axes)
    if axes["tensor"] != -1:
        model_fields.check_tensor(model, axes["tensor"])
    with of_topic("compute"):
        model_fields.check_arithmetic(
            dtype=compute.dtype,
            attention=compute.attention,
            remat=compute.remat,
            automatic=("attention",),
        )
    with of_topic("diffusion"):
        diffusion_fields.check(settings.diffusion)
        _check_null(settings)
    if diffusion_fields.is_mean_flow(settings.diffusion):
        with of_topic("compute"):
            model_fields.check_forward(compute.attention)
    if model.velocity_head and settings.diffusion.process != "improved_mean_flow":
        raise UserError("model.velocity_head must be false without improved_mean_flow, got true")
    with of_topic("train"):
        settings_lib.check_decay(settings.train.warmup_steps, settings.train.decay_steps)
    with of_topic("sampling"):
        sampling_fields.check_process(settings.sampling, model, settings.diffusion)


def _check_null(settings):
    """UserError if a loss guides by the null label and the model does not learn it."""
    if diffusion_fields.needs_null(settings.diffusion) and not settings.train.class_dropout_prob:
        process = settings.diffusion.process
        hint = " unless omega is 1 and kappa 0" if process == "mean_flow" else ""
        raise UserError(
            f"process must be another if train.class_dropout_prob is 0{hint}: {process} guides by "
            "the null label"
        )
