"""Pixels, uint8 at rest, and the [-1, 1] that networks see."""

import jax.numpy as jnp


def to_unit(image):
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, what is beyond clipped: the inverse of `to_unit`.

    As the official code's 127.5 x + 128 without its fraction, but for halves.
    """
    return jnp.clip(jnp.round(x * 127.5 + 127.5), 0, 255).astype(jnp.uint8)
