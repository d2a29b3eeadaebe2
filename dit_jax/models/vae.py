"""Stable Diffusion's autoencoder (Rombach et al. 2022), with the layers of AutoencoderKL.

Images x (N, H, W, 3) in [-1, 1] <-> z (N, H/8, W/8, 4) in VAE units <-> x0 in model units.
Shapes: N batch, H W grid, C channels, T = H W positions. `moments`: mean and log variance of z.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.errors import UserError
from dit_jax.machine import prng
from dit_jax.models import fields
from dit_jax.models.layers import DTYPES

LATENT_SCALE = 0.18215  # brings Stable Diffusion's latents to a standard deviation of about 1


class VAEConfig(NamedTuple):
    """The architecture, and the model units of a DiT: x0 = (z - shift) * scale."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # per level; each halves the resolution
    num_resnets: int = 2  # per encoder level; decoder levels have one more
    num_groups: int = 32  # of each GroupNorm
    quant_conv: bool = True  # 1x1 convolutions before and after the latents
    scale: tuple[float, ...] = (LATENT_SCALE,)  # one number, or one per latent channel
    shift: tuple[float, ...] = (0.0,)

    @classmethod
    def from_json(cls, fields):
        """The config from its `_asdict()` after a round trip through JSON, which has no tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    @property
    def downsampling(self):
        """The factor by which latents are smaller than images in height and width."""
        return fields.vae_downsampling(self.channels)


class GroupNorm(nnx.GroupNorm):
    """Computes and returns float32; the next convolution casts back to its dtype."""

    def __call__(self, x):
        return super().__call__(x.astype(jnp.float32))


class Parts(NamedTuple):
    """Constructors of layers: norm(channels), conv(in, out), linear(in, out)."""

    norm: Callable
    conv: Callable  # 3x3 by default
    linear: Callable


def make_parts(config, dtype, rngs):
    # At the default precision a TPU multiplies float32 in bfloat16.
    exact = {"precision": jax.lax.Precision.HIGHEST, "dtype": dtype, "rngs": rngs}
    groups = {"num_groups": config.num_groups, "epsilon": 1e-6, "use_fast_variance": False}
    return Parts(
        functools.partial(GroupNorm, **groups, rngs=rngs),
        functools.partial(nnx.Conv, kernel_size=(3, 3), **exact),
        functools.partial(nnx.Linear, **exact),
    )


class ResNet(nnx.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, in_channels, out_channels, parts):
        self.norm1, self.norm2 = parts.norm(in_channels), parts.norm(out_channels)
        self.conv1 = parts.conv(in_channels, out_channels)
        self.conv2 = parts.conv(out_channels, out_channels)
        self.widens = in_channels != out_channels
        if self.widens:
            self.conv_shortcut = parts.conv(in_channels, out_channels, kernel_size=(1, 1))

    def __call__(self, x):
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if self.widens else x)  # (N, H, W, out)


class Attention(nnx.Module):
    """Self-attention over the grid, one head."""

    def __init__(self, channels, parts):
        self.norm = parts.norm(channels)
        self.q, self.k, self.v, self.proj = (parts.linear(channels, channels) for _ in range(4))

    def __call__(self, x):
        n, h, w, c = x.shape
        y = self.norm(x).reshape(n, h * w, 1, c)  # (N, T, 1, C)
        q, k, v = (to(y).astype(jnp.float32) for to in (self.q, self.k, self.v))
        with jax.default_matmul_precision("highest"):
            y = jax.nn.dot_product_attention(q, k, v)
        return x + self.proj(y).reshape(n, h, w, c)


class Level(nnx.Module):
    """ResNets at one resolution."""

    def __init__(self, in_channels, out_channels, num_resnets, parts):
        self.num_resnets = num_resnets
        for i in range(num_resnets):
            width = in_channels if i == 0 else out_channels
            setattr(self, f"resnet_{i}", ResNet(width, out_channels, parts))

    def __call__(self, x):
        for i in range(self.num_resnets):
            x = getattr(self, f"resnet_{i}")(x)
        return x


class Middle(nnx.Module):
    """ResNet, attention, ResNet at the coarsest resolution."""

    def __init__(self, channels, parts):
        self.resnet_0, self.resnet_1 = (ResNet(channels, channels, parts) for _ in range(2))
        self.attention = Attention(channels, parts)

    def __call__(self, x):
        return self.resnet_1(self.attention(self.resnet_0(x)))


class Encoder(nnx.Module):
    def __init__(self, config, parts):
        self.num_levels, width = len(config.channels), config.channels[0]
        self.conv_in = parts.conv(config.in_channels, width)
        for i, channels in enumerate(config.channels):
            setattr(self, f"level_{i}", Level(width, channels, config.num_resnets, parts))
            width = channels
            if i < self.num_levels - 1:  # As the official code: padded below and right only.
                conv = parts.conv(width, width, strides=2, padding=((0, 1), (0, 1)))
                setattr(self, f"downsample_{i}", conv)
        self.middle = Middle(width, parts)
        self.norm_out = parts.norm(width)
        self.conv_out = parts.conv(width, 2 * config.latent_channels)

    def __call__(self, x):
        """x (N, H, W, 3) -> (N, H/8, W/8, 2 * latent_channels)."""
        x = self.conv_in(x)
        for i in range(self.num_levels):
            x = getattr(self, f"level_{i}")(x)
            if i < self.num_levels - 1:
                x = getattr(self, f"downsample_{i}")(x)
        return self.conv_out(nnx.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    def __init__(self, config, parts):
        self.num_levels, width = len(config.channels), config.channels[-1]
        self.conv_in = parts.conv(config.latent_channels, width)
        self.middle = Middle(width, parts)
        for i, channels in enumerate(reversed(config.channels)):  # level 0 is the coarsest here
            setattr(self, f"level_{i}", Level(width, channels, config.num_resnets + 1, parts))
            width = channels
            if i < self.num_levels - 1:
                setattr(self, f"upsample_{i}", parts.conv(width, width))
        self.norm_out = parts.norm(width)
        self.conv_out = parts.conv(width, config.in_channels)

    def __call__(self, z):
        """z (N, H/8, W/8, latent_channels) -> (N, H, W, 3)."""
        x = self.middle(self.conv_in(z))
        for i in range(self.num_levels):
            x = getattr(self, f"level_{i}")(x)
            if i < self.num_levels - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # (N, 2H, 2W, C)
                x = getattr(self, f"upsample_{i}")(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class VAE(nnx.Module):
    def __init__(self, config, parts):
        channels, self.has_quant = config.latent_channels, config.quant_conv
        self.encoder, self.decoder = Encoder(config, parts), Decoder(config, parts)
        if self.has_quant:
            self.quant_conv = parts.conv(2 * channels, 2 * channels, kernel_size=(1, 1))
            self.post_quant_conv = parts.conv(channels, channels, kernel_size=(1, 1))

    def encode(self, x):
        x = self.encoder(x)
        return self.quant_conv(x) if self.has_quant else x

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z) if self.has_quant else z)


def init(config, key):
    """Random parameters: a nested dict of float32 arrays."""
    model = VAE(config, make_parts(config, jnp.float32, nnx.Rngs(key)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def make_apply(config, *, dtype="float32"):
    """Returns pure functions (encode, decode); dtype: of their arithmetic.

    encode(params, x (N, H, W, 3)) -> moments (N, H/8, W/8, 2C) float32 in VAE units.
    decode(params, z (N, H/8, W/8, C)) -> x (N, H, W, 3) float32.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    parts = functools.partial(make_parts, config, DTYPES[dtype])
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: VAE(config, parts(nnx.Rngs(prng.key(0))))))

    def encode(params, x):
        moments = nnx.merge(graphdef, params).encode(x).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, log_variance.clip(-30, 20)], axis=-1)

    def decode(params, z):
        return nnx.merge(graphdef, params).decode(z).astype(jnp.float32)

    return encode, decode


def sample(moments, noise):
    """A sample from moments (..., 2C), given its noise (Kingma & Welling 2014)."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * noise  # (..., C)


def mode(moments):
    """The mode of the Gaussian with moments (..., 2C), which is its mean."""
    return jnp.split(moments, 2, axis=-1)[0]  # (..., C)


def to_model_units(z, config):
    """z (..., C) in VAE units -> x0 in model units: mean about 0, deviation about 1."""
    shift, scale = (jnp.broadcast_to(jnp.float32(v), z.shape) for v in (config.shift, config.scale))
    return (z - shift) * scale


def moments_to_model_units(moments, config):
    """Moments of z (..., 2C) in VAE units -> moments of x0 = to_model_units(z)."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_scale = jnp.log(jnp.abs(jnp.broadcast_to(jnp.float32(config.scale), mean.shape)))
    return jnp.concatenate([to_model_units(mean, config), log_variance + 2 * log_scale], axis=-1)


def from_model_units(x, config):
    """x0 (..., C) in model units -> z in VAE units: the inverse of `to_model_units`."""
    shift, scale = (jnp.broadcast_to(jnp.float32(v), x.shape) for v in (config.shift, config.scale))
    return x / scale + shift
