"""Checks the arguments of a LoadedDiT: what does not fit is a UserError of one line.

Values that jit traces are converted but not checked. Shapes: N batch, H W grid, C channels, L
labels with the null label.
"""

import math
import numbers
import reprlib

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.machine import devices

WHOLE = "a list of whole numbers"


def check_whole(name, value, first, last=None):
    """UserError unless value is a whole number in first .. last; last None: no upper bound."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < first or (last is not None and value > last):
        rule = f"of at least {first}" if last is None else f"in {first} .. {last}"
        raise UserError(f"{name} must be a whole number {rule}, got {value!r}")


def check_room(name, count, config):
    """UserError if so many images, with a byte a number, do not fit into the host's memory."""
    needed = count * math.prod(config.input_size) * config.in_channels
    memory = devices.host_memory()
    if needed > memory:
        raise UserError(
            f"{name} must be of images that fit into the memory of this host, {memory / 1e9:.3g} "
            f"GB, got {count}, which take {needed / 1e9:.3g} GB or more"
        )


def of_call(x, t, y, *, config, last_time):
    """(x (N, H, W, C) float32, t (N,) float32, y as of `read_labels`) of a forward pass.

    t may be one number for all. y may be the null label.
    """
    x, t = _in_model_units("x", x), _real("t", _array("t", t))
    y = _array("y", y)
    count, image = y.shape[0] if y.ndim else 0, (*config.input_size, config.in_channels)
    fits = x.shape == (count, *image) and t.shape in ((), (count,)) and y.ndim <= 2
    if not count or not fits:
        shape = ", ".join(map(str, image))
        raise UserError(
            f"x, t and y must have shapes (N, {shape}), (N,) and (N,), or () for t and (N, "
            f"{config.num_classes}) for y, N at least 1, got {x.shape}, {t.shape} and {y.shape}"
        )
    if not _is_traced(t):
        wrong = np.asarray(t)[~((t >= 0) & (t <= last_time))]
        if wrong.size:
            raise UserError(f"t must be in 0 .. {last_time}, got {wrong[0]:g}")
    limit = config.num_classes + config.null_label
    return x, jnp.broadcast_to(t, (count,)), read_labels("y", y, limit, config)


def read_labels(name, values, limit, config):
    """Labels (N,) int32, each in 0 .. limit - 1, or weights that mix labels, (N, L) float32.

    Weights are given as (N, num_classes), and each row sums to 1.
    """
    array = _array(name, values, rule=WHOLE)
    if array.ndim == 2:
        return _read_weights(name, array, config)
    if _is_traced(array):
        return array.astype(jnp.int32)
    array = np.asarray(array)
    # NumPy keeps integers that are too large for its own types as objects.
    is_whole = array.dtype.kind in "iu" or all(type(value) is int for value in array.flat)
    if array.ndim != 1 or not array.size or not is_whole:
        raise UserError(f"{name} must be {WHOLE}, got {_show(array)}")
    wrong = array[(array < 0) | (array >= limit)]
    if wrong.size:
        raise UserError(f"{name} must be in 0 .. {limit - 1}, got {wrong[0]}")
    return array.astype(np.int32)


def _read_weights(name, array, config):
    classes = config.num_classes
    if array.shape[1] != classes or not len(array):
        raise UserError(
            f"{name} must be {WHOLE}, or weights of shape (N, {classes}), got shape {array.shape}"
        )
    weights = _real(name, array)
    if not _is_traced(weights):
        weights = np.asarray(weights)
        wrong = weights[~((weights >= 0) & (weights <= 1))]
        if wrong.size:
            raise UserError(f"{name} must have weights in 0 .. 1, got {wrong[0]:g}")
        sums = weights.sum(axis=1)
        wrong = sums[np.abs(sums - 1) > 1e-3]  # float16 has 10 bits
        if wrong.size:
            raise UserError(f"{name} must have weights that sum to 1 in each row, got {wrong[0]:g}")
    return jnp.pad(weights, ((0, 0), (0, int(config.null_label))))


def read_grid(name, values, shape):
    """Noise or data in model units, of that shape and finite, as NumPy float32."""
    array = np.asarray(_in_model_units(name, values))
    if array.shape != shape:
        raise UserError(f"{name} must have shape {shape}, got {array.shape}")
    wrong = array[~np.isfinite(array)]
    if wrong.size:
        raise UserError(f"{name} must be finite, got {wrong[0]}")
    return array


def read_trajectory(trajectory, levels, num_steps):
    """(False, True or "x0", the levels that are wanted as NumPy) of the arguments of a sampling."""
    if isinstance(trajectory, np.bool_):
        trajectory = bool(trajectory)
    if not isinstance(trajectory, bool) and trajectory != "x0":
        raise UserError(f"trajectory must be true, false or 'x0', got {trajectory!r}")
    if levels is None:
        return trajectory, np.arange(num_steps + 1)
    if not trajectory:
        raise UserError(f"levels must be None without trajectory, got {_show(levels)}")
    array = np.asarray(_array("levels", levels, rule=WHOLE))
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"levels must be {WHOLE}, got {_show(array)}")
    if wrong := [level for level in array.tolist() if not 0 <= level <= num_steps]:
        raise UserError(f"levels must be in 0 .. {num_steps}, got {wrong[0]}")
    return trajectory, array


def plain(options):
    """Options as plain Python values: arrays as numbers or lists."""
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}


def _array(name, values, rule="an array of numbers"):
    """values as an array of NumPy, or as they are if they are an array of jax."""
    try:
        return values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError:  # ragged
        raise UserError(f"{name} must be {rule}, got {_show(values)}") from None


def _in_model_units(name, values):
    """values as an array of float32; UserError for the type of pixels, which have other units."""
    array = _array(name, values)
    if array.dtype == np.uint8:
        raise UserError(f"{name} must be in model units, about -1 .. 1, got pixels in uint8")
    return _real(name, array)


def _real(name, array):
    """A numeric array as float32."""
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
        array.dtype, jnp.integer
    ):
        raise UserError(f"{name} must be an array of numbers, got {_show(array)}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _is_traced(array):
    return isinstance(array, jax.core.Tracer)


def _show(values):
    """The values in one short line."""
    return reprlib.repr(values.tolist() if hasattr(values, "tolist") else values)
