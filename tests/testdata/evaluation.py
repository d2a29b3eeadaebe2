"""Weights, images and features by formula, of which `golden_eval.npz` holds the scores.

Every array depends on its tag and shape alone, so none needs to be stored. `golden_eval.npz` has
what torch-fidelity 0.4.0 and ADM's unchanged evaluator in TensorFlow compute from them.
"""

import zlib

import numpy as np

SIZES = ((32, 32), (64, 64), (256, 256), (256, 192), (299, 299), (512, 512))  # height, width


def make_rng(tag):
    return np.random.default_rng(zlib.crc32(f"golden/{tag}".encode()))


def weights(shapes):
    """The state dict of an Inception with these shapes, {name: float32}."""
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def tensor(name, shape):
    """A tensor of the weights file; activations stay near 0.5 through the network."""
    z = make_rng(name).standard_normal(shape, dtype=np.float32)
    if name == "fc.weight":
        return np.float32(0.12) * z
    if name == "fc.bias":
        return z  # so large that a score with it differs
    if name.endswith("conv.weight"):  # without the mean, activations depend on the image
        fan_in = int(np.prod(shape[1:]))
        z = z - z.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
        return np.float32(np.sqrt(2.5 / fan_in)) * z
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * z
    if name.endswith("running_var"):  # small ones, so that the epsilon shows
        return np.exp(np.float32(0.5) * z)
    return np.float32(0.1) * z


def image(height, width, index, group=""):
    """uint8 (height, width, 3): noise, waves, a checkerboard or blocks, by index % 4."""
    rng = make_rng(f"{group}image/{height}x{width}/{index}")
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    if index % 4 == 0:
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    a, b, d = (int(v) for v in rng.integers(20, 200, 3))
    if index % 4 == 1:
        t = ((x * a) // 16 + (y * b) // 16 + c * d) % 512
        return np.where(t < 256, t, 511 - t).astype(np.uint8)
    noise = rng.integers(0, 64, (height, width, 3))
    if index % 4 == 2:
        side = 1 + a % 7
        board = (x // side + y // side + c) % 2
        return (board * (100 + b // 2) % 192 + noise).astype(np.uint8)
    blocks = rng.integers(0, 128, (height // 8 + 1, width // 8 + 1, 3))
    blocks = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    return (blocks + (x * 127) // max(width - 1, 1)).astype(np.uint8)


def images(height, width, count=4, group=""):
    return np.stack([image(height, width, i, group) for i in range(count)])


def evaluated_images():
    """Images of the statistics, of the reference, and samples, which are darker; 64 x 64."""
    counts = {"stats": 40, "reference": 30, "samples": 36}
    stats, reference, samples = (images(64, 64, n, f"{kind}/") for kind, n in counts.items())
    return stats, reference, (samples * 0.9).astype(np.uint8)


def gauss(tag, n, d):
    """float32 (n, d), correlated, with a mean."""
    rng = make_rng(f"gauss/{tag}")
    mean, scale = rng.standard_normal(d), 0.2 + rng.random(d)
    mix = 0.3 * rng.standard_normal((d, d)) / np.sqrt(d) + np.diag(scale)
    return (rng.standard_normal((n, d)) @ mix + 0.3 * mean).astype(np.float32)


def pool_like(tag, n, d=2048):
    """float32 (n, d), at least 0, with the squared norm of pool_3, about 600."""
    rng = make_rng(f"pool/{tag}")
    shared = make_rng("pool/shared").standard_normal((12, d))
    low = rng.standard_normal((n, 12)) @ shared * 0.2
    noise = 0.35 * rng.standard_normal((n, d))
    return 0.8 * np.maximum(0.25 + low + noise, 0.0).astype(np.float32)


def grid(tag, n, d=12, levels=4):
    """float32 (n, d) of small integers: copies, and exact ties among all distances."""
    return make_rng(f"grid/{tag}").integers(0, levels, (n, d)).astype(np.float32)


def logits(tag, n, d):
    rng = make_rng(f"logits/{tag}")
    return (2.0 * rng.standard_normal((n, d)) + rng.standard_normal(d)).astype(np.float32)


def frechet_sets():
    """{name: (real, fake)}."""
    full, other = gauss("real", 600, 64), gauss("fake", 500, 64)
    flat = other.copy()
    flat[:, 10:20] = 0
    scales = np.logspace(0, -7, 64)
    return {
        "full": (full, other),
        "singular": (full[:40], other[:48]),
        "singular_full": (full[:40], other),
        "same": (full, full),
        "flat": (full, flat),
        "near_singular": ((full * scales).astype(np.float32), (other * scales).astype(np.float32)),
        "shifted": (full, full + np.float32(0.5)),
        "offset": (full + np.float32(1000), other + np.float32(1000)),
    }


def neighbour_sets():
    """{name: (real, fake)}."""
    real, fake = grid("real", 300), grid("fake", 260)
    real[-20:], real[41:45] = real[:20], real[40]  # copies; a radius of 0
    fake[:5], fake[5] = real[:5], real[40]
    pool = pool_like("real", 700), pool_like("fake", 600) * np.float32(0.97)
    return {
        "full": (gauss("real", 600, 64), gauss("fake", 500, 64)),
        "ties": (real, fake),
        "pool": pool,
        "same": (real, real),
    }
