"""The optimizers of a DiT, with one learning rate: constant, or one that decays to 0.

Shapes: L layers, D hidden size, F width of the MLP. The kernels of the blocks are stacked.
"""

import optax
from flax import traverse_util

from dit_jax import compat, settings

UPDATE_RMS = 0.2  # of Muon, times the learning rate: about that of AdamW, so that rates carry over


def make(name, *, clip_norm, warmup_steps, decay_steps, learning_rate, **options):
    """An optimizer in OPTIMIZERS; before it gradients are scaled to a norm of at most clip_norm.

    The rate rises linearly over warmup_steps and falls to 0 as a cosine. decay_steps counts from
    the first step; 0 keeps the rate constant, as the paper does. clip_norm 0: no scaling; the norm
    is of all gradients together. options: b1, b2, eps, weight_decay.
    """
    rate = learning_rate_schedule(learning_rate, warmup_steps, decay_steps)
    optimizer = OPTIMIZERS[name](rate, **options)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def muon(rate, *, b1, b2, eps, weight_decay):
    """Muon for the kernels of the blocks, and Adam with Nesterov momentum for everything else.

    Its momentum is orthogonalised, each matrix alone, and scaled to the size of AdamW's updates
    (Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982).
    """
    return compat.muon(
        rate,
        eps=eps,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=UPDATE_RMS,
    )


def _matrices(params):
    """optax's dimension numbers of the parameters that Muon trains, None for the others.

    A kernel (L, D, F) is a matrix (D, F) for each layer, and (L, D, 3, D) one for each of q, k and
    v. Without them optax takes what has two axes: stacked biases, embeddings, but no kernel.
    """
    numbers = {}
    for path, x in traverse_util.flatten_dict(params).items():
        is_matrix = path[0] == "blocks" and path[-1] == "kernel"
        numbers[path] = optax.contrib.MuonDimensionNumbers(1, x.ndim - 1) if is_matrix else None
    return traverse_util.unflatten_dict(numbers)


OPTIMIZERS = {"adamw": optax.adamw, "muon": muon}  # as settings.OPTIMIZERS


def learning_rate_schedule(learning_rate, warmup_steps, decay_steps):
    """step -> learning rate. See `make`."""
    settings.check_decay(warmup_steps, decay_steps)
    if decay_steps:
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, decay_steps)
    if warmup_steps:
        return optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.constant_schedule(learning_rate)
