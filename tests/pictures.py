"""Draws folders of images: each class has a colour; sizes and colour modes vary."""

import numpy as np
from PIL import Image

MODES = ("RGB", "L", "CMYK", "RGB")


def draw(root, *, num_classes=3, per_class=6, low=24, high=60):
    """Writes root/c0/000.jpg, ... with sides in [low, high) and returns {class/file: bytes}."""
    rng = np.random.default_rng(0)
    for label in range(num_classes):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            height, width = rng.integers(low, high, 2)
            colour = np.full((height, width, 3), 255 * label // num_classes, np.float64)
            colour[..., label % 3] += 60 * np.linspace(-1, 1, width)
            noisy = colour + rng.normal(0, 8, colour.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.convert(MODES[i % len(MODES)]).save(folder / f"{i:03d}.jpg")
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}
