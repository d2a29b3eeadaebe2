"""Counts the arithmetic of a DiT from its config.

Only matrix products count, as in table 4 of the paper, whose "Gflops" are multiply-adds: true
FLOPs are twice that, and a forward and backward pass costs three forward passes. The column with
which `attention.attend` sums its weights does not count, as no other sum does.
"""

from dit_jax.models.conditions import FREQUENCIES, count_tokens
from dit_jax.models.fields import mlp_width


def multiply_adds(config):
    """Multiply-adds of one forward pass of one example; with `head_depth`, of one head."""
    return forecast_multiply_adds(config) + _over_blocks(config, _block)


def tangent_multiply_adds(config):
    """Multiply-adds of the derivative of a forward pass along a direction (jvp), beside the pass.

    A product of two activations has two products as its derivative.
    """
    return multiply_adds(config) + _over_blocks(config, _attention)


def forecast_multiply_adds(config):
    """Multiply-adds of a pass whose blocks are forecast: `diffusion.caches`."""
    size, patch = config.hidden_size, config.patch_area * config.in_channels
    embed_patch = config.bottleneck * (patch + size) if config.bottleneck else patch * size
    numbers = len(set(config.conditions) - {"y"})  # a label is looked up
    embedders = (
        config.num_tokens * embed_patch  # x
        + numbers * (FREQUENCIES * size + size**2)  # t and others like it
    )
    return embedders + _final_layer(config)


def second_head_multiply_adds(config):
    """Multiply-adds of the blocks and the final layer that a velocity head has for itself."""
    if not config.head_depth:
        return 0
    return config.head_depth * _block(config, config.num_tokens) + _final_layer(config)


def _final_layer(config):
    size = config.hidden_size
    linear = config.num_tokens * size * config.patch_area * config.head_channels
    return linear + (2 * size**2 if config.adaptive else 0)


def _over_blocks(config, count):
    """The sum over the blocks of count(config, tokens)."""
    early = config.class_tokens_from  # blocks without the class tokens
    late = (config.depth - early) * count(config, config.num_tokens + config.class_tokens)
    return early * count(config, config.num_tokens) + late


def _block(config, tokens):
    size, extra = config.hidden_size, count_tokens(config)
    attention = _attention(config, tokens)
    if config.in_context:
        tokens += extra
    matrices = {"gelu": 2, "swiglu": 3}[config.mlp]
    mlp = matrices * tokens * size * mlp_width(config.mlp, size)
    condition = {
        "in_context": 0,
        "in_context_zero": 0,
        "cross_attention": (2 * tokens + 2 * extra) * size**2,
        "adaln": 4 * size**2,
        "adaln_zero": 6 * size**2,
    }
    return attention + 4 * tokens * size**2 + mlp + condition[config.conditioning]


def _attention(config, tokens):
    """Multiply-adds of the products of queries, keys, weights and values."""
    size, extra = config.hidden_size, count_tokens(config)
    if config.in_context:
        tokens += extra
    crossed = tokens * extra if config.conditioning == "cross_attention" else 0
    return 2 * (tokens**2 + crossed) * size


def forward_flops(config):
    """FLOPs of one forward pass of one example."""
    return 2 * multiply_adds(config)


def forecast_flops(config):
    """FLOPs of one pass of one example whose blocks are forecast."""
    return 2 * forecast_multiply_adds(config)


def train_flops(config, routing=None, *, forwards=0, tangents=0):
    """FLOPs of one example in a training step, without what rematerialisation repeats.

    routing: a `models.routing.Routing` of tokens that skip blocks, or None. forwards, tangents: of
    `diffusion.process.Passes`, beside a forward and backward pass; these need one head only.
    """
    saved = 0
    if routing is not None:
        kept = config.num_tokens - routing.num_skipping
        saved = _block(config, config.num_tokens) - _block(config, kept)
        saved *= routing.last - routing.first + 1
    once = forward_flops(config) - 2 * saved
    both = once + 2 * second_head_multiply_adds(config)
    return 3 * both + forwards * once + tangents * 2 * tangent_multiply_adds(config)
