"""The optimizer of DiT: AdamW, at a constant learning rate or one that decays to 0."""

import optax

from dit_jax import settings


def adamw(*, learning_rate, b1, b2, eps, weight_decay, warmup_steps, decay_steps):
    """AdamW whose rate rises linearly over warmup_steps and falls to 0 as a cosine.

    decay_steps counts from the first step; 0 keeps the rate constant, as the paper does.
    """
    return optax.adamw(
        learning_rate_schedule(learning_rate, warmup_steps, decay_steps),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )


def learning_rate_schedule(learning_rate, warmup_steps, decay_steps):
    """step -> learning rate. See `adamw`."""
    settings.check_decay(warmup_steps, decay_steps)
    if decay_steps:
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, decay_steps)
    if warmup_steps:
        return optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.constant_schedule(learning_rate)
