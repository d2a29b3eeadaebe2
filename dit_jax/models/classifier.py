"""A small convolutional classifier of images: its features judge samples of small data.

Strided 3x3 convolutions, a layer of features and one of logits, all in float32.
Shapes: N batch, H W grid, C channels, D features, L classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.machine import prng
from dit_jax.models import pixels

NUM_FEATURES = 96
CHANNELS = (32, 64, 64, 64)  # of the convolutions, each of which halves the grid
COARSEST = 7  # height and width of the last grid, at most
SMALLEST, LARGEST = 16, 64  # pixels of a side; smaller images are enlarged, larger ones averaged


class ClassifierConfig(NamedTuple):
    """The architecture; `resize` brings images of any size to those that the layers see."""

    image_shape: tuple[int, int, int]  # H, W, C
    num_classes: int

    @classmethod
    def from_json(cls, fields):
        """The config from its `_asdict()` after a round trip through JSON, which has no tuples."""
        return cls(tuple(fields["image_shape"]), fields["num_classes"])


class Features(NamedTuple):
    """What the scores need of N images, float32."""

    pool: jax.Array  # (N, D): the layer before the last, after its ReLU
    logits: jax.Array  # (N, L)


def resize(x):
    """x (N, H, W, C) with a longer side of SMALLEST .. LARGEST: pixels repeated or averaged."""
    height, width = x.shape[1:3]
    longest = max(height, width)
    if longest > LARGEST:
        window = 2 * (-(-longest // LARGEST),)
        return nnx.avg_pool(x, window, strides=window, padding="SAME", count_include_pad=False)
    factor = -(-SMALLEST // longest)
    return x.repeat(factor, axis=1).repeat(factor, axis=2)


class Classifier(nnx.Module):
    def __init__(self, config, rngs):
        exact = {
            "dtype": jnp.float32,
            # At its default precision a TPU multiplies in bfloat16.
            "precision": jax.lax.Precision.HIGHEST,
            "rngs": rngs,
        }
        after_relu = {"kernel_init": nnx.initializers.he_normal(), **exact}
        empty = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
        _, height, width, channels = jax.eval_shape(resize, empty).shape
        self.num_convs = 0
        for i, out in enumerate(CHANNELS):
            conv = nnx.Conv(channels, out, (3, 3), strides=2, padding="SAME", **after_relu)
            setattr(self, f"conv_{i}", conv)
            height, width, channels = -(-height // 2), -(-width // 2), out
            self.num_convs += 1
            if max(height, width) <= COARSEST:
                break
        self.features = nnx.Linear(height * width * channels, NUM_FEATURES, **after_relu)
        self.logits = nnx.Linear(NUM_FEATURES, config.num_classes, **exact)

    def __call__(self, images):
        """uint8 images (N, H, W, C) -> Features."""
        x = resize(pixels.to_unit(images))
        for i in range(self.num_convs):
            x = nnx.relu(getattr(self, f"conv_{i}")(x))
        pool = nnx.relu(self.features(x.reshape(len(x), -1)))  # (N, D)
        return Features(pool, self.logits(pool))


def init(config, key):
    """Random parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(Classifier(config, nnx.Rngs(key)), nnx.Param))


def make_apply(config):
    """apply(params, uint8 images (N, H, W, C)) -> Features; compute it in a jit."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Classifier(config, nnx.Rngs(prng.key(0)))))

    def apply(params, images):
        return nnx.merge(graphdef, params)(images)

    return apply
