"""Inception-v3 of 2015-12-05, the network behind FID, sFID and the Inception Score.

Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, as TensorFlow's graph has it: not the
networks of torchvision and Keras. Modules have the names of pytorch-fid's weights file. Batch norms
are part of the convolutions: `convert/torch_inception.py` folds them.
Shapes: N batch, H W grid, C channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.machine import prng

SIZE = 299  # height and width of the network's input
NUM_FEATURES = 2048  # of pool_3
NUM_SPATIAL = 17 * 17 * 7  # features of sFID
NUM_LOGITS = 1008  # 1000 classes of ImageNet and 8 that are never right
STAGES = (  # in order; a max pool comes before those in POOLED
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
    *("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
POOLED = ("Conv2d_3b_1x1", "Mixed_5b")


def average_pool(x):
    """TensorFlow's: the mean of the pixels inside the image."""
    window = {"window_shape": (3, 3), "strides": (1, 1), "padding": "SAME"}
    return nnx.avg_pool(x, count_include_pad=False, **window)


def max_pool(x):
    return nnx.max_pool(x, window_shape=(3, 3), strides=(1, 1), padding="SAME")


def halving_pool(x):
    return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class Features(NamedTuple):
    """What the scores need of N images, float32."""

    pool: jax.Array  # (N, 2048): pool_3, of FID, KID, precision and recall
    spatial: jax.Array  # (N, 2023): 7 channels of a 17 x 17 grid, channel fastest, of sFID
    logits: jax.Array  # (N, 1008): without bias, of the Inception Score


class ConvReLU(nnx.Conv):
    """A convolution and ReLU in float32, whatever the default precision is."""

    def __init__(self, in_channels, out_channels, kernel, *, rngs, strides=1, padding="SAME"):
        super().__init__(
            *(in_channels, out_channels),
            kernel_size=kernel if isinstance(kernel, tuple) else (kernel, kernel),
            strides=strides,
            padding=padding,
            dtype=jnp.float32,
            # At its default precision a TPU multiplies in bfloat16, which moves pool_3 by 6 %.
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, x):
        return nnx.relu(super().__call__(x))


def concatenate(*branches):
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nnx.Module):
    """35 x 35 -> 35 x 35."""

    def __init__(self, width, pool_width, conv):
        self.branch1x1 = conv(width, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = conv(width, 48, 1), conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(width, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = conv(64, 96, 3), conv(96, 96, 3)
        self.branch_pool = conv(width, pool_width, 1)

    def __call__(self, x):
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(average_pool(x))
        return concatenate(self.branch1x1(x), branch5x5, branch3x3dbl, pooled)


class InceptionB(nnx.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, width, conv):
        halve = {"strides": 2, "padding": "VALID"}
        self.branch3x3 = conv(width, 384, 3, **halve)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(width, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, **halve)

    def __call__(self, x):
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return concatenate(self.branch3x3(x), branch3x3dbl, halving_pool(x))


class InceptionC(nnx.Module):
    """17 x 17 -> 17 x 17; a kernel (1, 7) is 1 high and 7 wide."""

    def __init__(self, c, conv):
        self.branch1x1 = conv(768, 192, 1)
        self.branch7x7_1 = conv(768, c, 1)
        self.branch7x7_2, self.branch7x7_3 = conv(c, c, (1, 7)), conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = conv(768, c, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = conv(c, c, (7, 1)), conv(c, c, (1, 7))
        self.branch7x7dbl_4, self.branch7x7dbl_5 = conv(c, c, (7, 1)), conv(c, 192, (1, 7))
        self.branch_pool = conv(768, 192, 1)

    def __call__(self, x):
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        pooled = self.branch_pool(average_pool(x))
        return concatenate(self.branch1x1(x), branch7x7, branch7x7dbl, pooled)


class InceptionD(nnx.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, conv):
        halve = {"strides": 2, "padding": "VALID"}
        self.branch3x3_1, self.branch3x3_2 = conv(768, 192, 1), conv(192, 320, 3, **halve)
        self.branch7x7x3_1, self.branch7x7x3_2 = conv(768, 192, 1), conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, 3, **halve)

    def __call__(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return concatenate(branch3x3, branch7x7x3, halving_pool(x))


class InceptionE(nnx.Module):
    """8 x 8 -> 8 x 8. pool: of the last branch."""

    def __init__(self, width, pool, conv):
        self.pool = pool
        self.branch1x1, self.branch3x3_1 = conv(width, 320, 1), conv(width, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(width, 448, 1), conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch_pool = conv(width, 192, 1)

    def __call__(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3 = concatenate(self.branch3x3_2a(y), self.branch3x3_2b(y))
        branch3x3dbl = concatenate(self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z))
        pooled = self.branch_pool(self.pool(x))
        return concatenate(self.branch1x1(x), branch3x3, branch3x3dbl, pooled)


class Inception(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(ConvReLU, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(3, 32, 3, strides=2, padding="VALID")
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding="VALID")
        for name, width, pool_width in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            setattr(self, f"Mixed_{name}", InceptionA(width, pool_width, conv))
        self.Mixed_6a = InceptionB(288, conv)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(self, f"Mixed_{name}", InceptionC(c, conv))
        self.Mixed_7a = InceptionD(conv)
        self.Mixed_7b = InceptionE(1280, average_pool, conv)
        self.Mixed_7c = InceptionE(2048, max_pool, conv)  # as in the graph of 2015
        exact = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
        self.fc = nnx.Linear(NUM_FEATURES, NUM_LOGITS, use_bias=False, rngs=rngs, **exact)

    def stages(self, x):
        """Yields (name, output) of every stage; x (N, 299, 299, 3) in 0 .. 255."""
        x = (x - 128) / 128  # -1 .. 0.9922
        for name in STAGES:
            x = getattr(self, name)(halving_pool(x) if name in POOLED else x)
            yield name, x

    def __call__(self, x):
        """x (N, 299, 299, 3) in 0 .. 255 -> Features."""
        outputs = dict(self.stages(x))
        pool = outputs["Mixed_7c"].mean(axis=(1, 2))  # (N, 2048)
        # The graph's mixed_6/conv:0, which is Mixed_6d.branch1x1 after its ReLU.
        spatial = outputs["Mixed_6d"][..., :7].reshape(len(x), NUM_SPATIAL)
        return Features(pool, spatial, self.fc(pool))


def init():
    """Zeros with the shapes of the parameters: a nested dict of float32 arrays.

    The network is not trained here: `dit-convert inception` makes its parameters.
    """
    params = nnx.to_pure_dict(nnx.state(_abstract(), nnx.Param))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def bind(params):
    """The network with these parameters."""
    return nnx.merge(nnx.graphdef(_abstract()), params)


@functools.cache
def _abstract():
    return nnx.eval_shape(lambda: Inception(nnx.Rngs(prng.key(0))))


def apply(params, images):
    """The Features of uint8 images (N, H, W, 3) of any size; compute it in a jit."""
    return bind(params)(resize(images))


def resize(images):
    """uint8 (N, H, W, 3) -> float32 (N, 299, 299, 3) in 0 .. 255, bit for bit as TensorFlow 1.

    Bilinear without antialiasing; pixel i of the output lies at i * H / 299 of the input, not at
    the half-pixel centres of `jax.image.resize`.
    """
    low, high, weight = _neighbours(images.shape[2])
    x = images.astype(jnp.float32)
    x = _interpolate(x[:, :, low], x[:, :, high], weight[None, None, :, None])
    low, high, weight = _neighbours(images.shape[1])
    return _interpolate(x[:, low], x[:, high], weight[None, :, None, None])


def _neighbours(size):
    """Indices (299,) of the pixels below and above each output pixel, and the upper's weight."""
    source = np.arange(SIZE, dtype=np.float32) * (np.float32(size) / np.float32(SIZE))
    low = source.astype(np.int32)  # rounds down
    return low, np.minimum(low + 1, size - 1), source - low.astype(np.float32)


def _interpolate(low, high, weight):
    # The clip changes no value. It stops XLA from fusing product and sum, which rounds once less.
    return low + jnp.clip((high - low) * weight, -256, 256)
