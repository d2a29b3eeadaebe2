"""Converts between uint8 pixels, as stored, and the [-1, 1] of networks."""

import jax.numpy as jnp


def to_unit(image):
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, clipped: the inverse of `to_unit`.

    It equals the official code's floor(127.5 x + 128), except at exact halves.
    """
    return jnp.clip(jnp.round(x * 127.5 + 127.5), 0, 255).astype(jnp.uint8)
