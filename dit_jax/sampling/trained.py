"""A trained DiT, opened from its checkpoint: what `dit_jax.load` returns.

Shapes: N batch, H W grid, C channels.
"""

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dit_jax.checkpoint import steps, store
from dit_jax.diffusion import schedules
from dit_jax.errors import UserError
from dit_jax.machine import devices, sharding
from dit_jax.models import dit
from dit_jax.sampling import autoencoder, generate


def load(path, *, weights="ema", attention="auto", vae=None, vae_dtype="float32"):
    """The LoadedDiT of a training run, of the directory of its steps or of one of these.

    vae: the checkpoint of an autoencoder that decodes its samples.
    """
    if weights not in ("ema", "params"):
        raise UserError(f"weights must be ema or params, got {weights!r}")
    directory, step = steps.locate(path)
    meta = store.read_meta(directory, step, of="model")
    saved, config = meta["config"], dit.DiTConfig.from_json(meta["model"])
    decoder = vae and _load_decoder(vae, vae_dtype, config, saved["data"]["space"])
    digests = meta.get("vae_digests")  # of the autoencoder that the run was trained with
    if vae and digests and not autoencoder.encodes_alike(digests, autoencoder.read_digests(vae)):
        logging.warning("vae %s is not the one that encoded for %s", vae, path)
    mesh = sharding.make_mesh()
    template = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    template = sharding.abstract(template, sharding.of_params(template, mesh))
    params = store.restore(directory, step, {weights: template})[weights]
    attention = devices.resolve_attention(attention, saved["compute"]["dtype"])
    return LoadedDiT(
        config,
        params,
        dit.make_apply(config, **saved["compute"] | {"attention": attention}),
        schedules.make(**saved["diffusion"]),
        mesh,
        step=step,
        weights=weights,
        source=saved["data"]["source"],
        space=saved["data"]["space"],
        sampling=_plain(saved["sampling"]),
        decoder=decoder,
    )


def _load_decoder(path, dtype, config, space):
    decoder = autoencoder.load(path, dtype=dtype)
    channels = decoder.config.latent_channels
    if space != "latents":
        raise UserError(f"vae must be none for a model of {space}, got {path}")
    if channels != config.in_channels:
        raise UserError(f"vae must have {config.in_channels} latent channels, got {channels}")
    return decoder


class LoadedDiT:
    """A trained DiT: its config, its parameters, its forward pass and its samples."""

    def __init__(
        self,
        config,
        params,
        apply,
        schedule,
        mesh,
        *,
        step,
        weights,
        source,
        space,
        sampling,
        decoder=None,
    ):
        self.config, self.params, self.sampling, self.decoder = config, params, sampling, decoder
        self.step, self.weights, self.source, self.space = step, weights, source, space
        self._schedule = schedule
        self._apply = jax.jit(apply)
        self._make = functools.cache(
            lambda options: generate.make_sampler(
                apply, config, schedule, mesh, space=space, **dict(options)
            )
        )

    def __call__(self, x, t, y):
        """x (N, H, W, C) in model units, t (N,) steps, y (N,) labels -> (N, H, W, out) float32.

        The first C channels of the result are the noise, the others the variance code.
        """
        x, t, y = _to_array("x", x), _to_array("t", t), _to_array("y", y)
        image = (*self.config.input_size, self.config.in_channels)
        count = y.size
        if not count or (x.shape, t.shape, y.shape) != ((count, *image), (count,), (count,)):
            shape = ", ".join(map(str, image))
            raise UserError(
                f"x, t and y must have shapes (N, {shape}), (N,) and (N,), N at least 1, "
                f"got {x.shape}, {t.shape} and {y.shape}"
            )
        t = _check_whole("t", t, self._schedule.num_steps)
        y = _check_whole("y", y, self.config.num_classes + self.config.null_label)
        return self._apply(self.params, x, t, y)

    def sample(self, labels, *, seed=0, batch_size=256, progress=False, **sampling):
        """One image for each label: uint8 (N, H, W, C), or latents where there is no decoder.

        Latents are float32, in units of the model.

        `sampling` overrides `self.sampling`, how the run's config wants to be sampled; its names
        are those of `make_sampler`. The same seed gives the same images in any batch_size. progress
        shows a bar on a terminal.
        """
        unknown = sampling.keys() - self.sampling.keys()
        if unknown:
            raise UserError(
                f"a sampling option must be one of {', '.join(self.sampling)}, got {min(unknown)}"
            )
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise UserError(f"seed must be a whole number in 0 .. {2**32 - 1}, got {seed!r}")
        labels = _check_whole("labels", labels, self.config.num_classes)
        options = self.sampling | _plain(sampling)
        generate.check_sampling(self.config, self._schedule, space=self.space, **options)
        draw = self._make(tuple(options.items()))
        images = generate.draw_all(
            draw, self.params, labels, seed=seed, batch_size=batch_size, progress=progress
        )
        return self.decoder.decode(images, progress=progress) if self.decoder else images

    def __repr__(self):
        config = self.config
        shape = (config.depth, config.hidden_size, config.num_heads)
        names = {size: name for name, size in dit.SIZES.items()}
        size = f"{names.get(shape, 'of its own size')}/{config.patch_size}"
        return f"LoadedDiT({size} {config.conditioning}, step {self.step}, {self.weights})"


def _plain(options):
    """Options as plain Python values that can be hashed: arrays as numbers, lists as tuples."""
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}


def _to_array(name, values):
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be an array of numbers, got {values!r}") from None


def _check_whole(name, values, limit):
    """values (N,), each in 0 .. limit - 1, as int32; what is traced inside a jit is let pass."""
    if isinstance(values, jax.core.Tracer):
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        raise UserError(f"{name} must be a list of whole numbers, got {values!r}") from None
    # NumPy keeps whole numbers that no integer of its own can hold as objects.
    whole = array.dtype.kind in "iu" or all(type(value) is int for value in array.flat)
    if array.ndim != 1 or not array.size or not whole:
        raise UserError(f"{name} must be a list of whole numbers, got {array.tolist()!r}")
    wrong = array[(array < 0) | (array >= limit)]
    if wrong.size:
        raise UserError(f"{name} must be in 0 .. {limit - 1}, got {wrong[0]}")
    return array.astype(np.int32)
