"""A trained DiT, opened from its checkpoint: what `dit_jax.load` returns.

Shapes: N batch, H W grid, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import checkpoint, devices, generate, sharding
from dit_jax.diffusion import schedules
from dit_jax.models import dit


def load(path, *, weights="ema", attention="auto"):
    """The LoadedDiT of a training run's directory or of a directory of checkpoints."""
    if weights not in ("ema", "params"):
        raise ValueError(f"weights must be ema or params, got {weights!r}")
    directory, step = checkpoint.locate(path)
    meta = checkpoint.read_meta(directory, step)
    saved, config = meta["config"], dit.DiTConfig.from_json(meta["model"])
    mesh = sharding.make_mesh()
    template = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    template = sharding.abstract(template, sharding.of_state(template, mesh))
    params = checkpoint.restore(directory, step, {weights: template})[weights]
    attention = devices.resolve_attention(attention, saved["compute"]["dtype"])
    return LoadedDiT(
        config,
        params,
        dit.make_apply(config, **saved["compute"] | {"attention": attention}),
        schedules.make(**saved["diffusion"]),
        mesh,
        step=step,
        **saved["data"],
        sampling=_hashable(saved["sampling"]),
    )


class LoadedDiT:
    """A trained DiT: its config, its parameters, its forward pass and its samples."""

    def __init__(self, config, params, apply, schedule, mesh, *, step, source, space, sampling):
        self.config, self.params, self.sampling = config, params, sampling
        self.step, self.source, self.space = step, source, space
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
        x, t, y = jnp.asarray(x), jnp.asarray(t), jnp.asarray(y)
        shape = (len(y), *self.config.input_size, self.config.in_channels)
        if x.shape != shape or t.shape != y.shape:
            raise ValueError(
                f"x, t and y must have shapes {shape}, {shape[:1]} and {shape[:1]}, "
                f"got {x.shape}, {t.shape} and {y.shape}"
            )
        if not isinstance(y, jax.core.Tracer):  # inside a jit there is no label to look at
            y = _check_labels(y, self.config.num_classes + self.config.null_label)
        return self._apply(self.params, x, t, y)

    def sample(self, labels, *, seed=0, batch_size=256, progress=False, **sampling):
        """One image for each label: uint8 (N, H, W, C), or latents where there is no decoder.

        `sampling` overrides `self.sampling`, how the run's config wants to be sampled; its names
        are those of `make_sampler`. The same seed gives the same images in any batch_size. progress
        shows a bar on a terminal.
        """
        unknown = sampling.keys() - self.sampling.keys()
        if unknown:
            raise ValueError(
                f"a sampling option must be one of {', '.join(self.sampling)}, got {min(unknown)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        draw = self._make(tuple((self.sampling | _hashable(sampling)).items()))
        labels = _check_labels(labels, self.config.num_classes)
        return generate.draw_all(
            draw, self.params, labels, seed=seed, batch_size=batch_size, progress=progress
        )


def _hashable(options):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _check_labels(labels, num_labels):
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be a list of whole numbers, got {labels.tolist()}")
    wrong = labels[(labels < 0) | (labels >= num_labels)]
    if wrong.size:
        raise ValueError(f"labels must be in 0 .. {num_labels - 1}, got {wrong[0]}")
    return labels.astype(np.int32)
