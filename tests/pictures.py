"""Draws folders of images for tests: coloured noise of any number of classes, or three shapes."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

MODES = ("RGB", "L", "CMYK", "RGB")


def draw(root, *, num_classes=3, per_class=6, low=24, high=60):
    """Writes root/c0/000.jpg, ... with sides in [low, high) and returns {class/file: bytes}.

    Each class has a colour; sizes and colour modes vary.
    """
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


SHAPES = {"blue square": 0.6, "green star": 0.33, "red circle": 0.0}  # hue


def draw_shapes(root, *, per_class=200):
    """Writes root/CLASS/000.png, ...: centred shapes on a light ground; size and shade vary."""
    rng = np.random.default_rng(0)
    for name, hue in SHAPES.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            draw_shape(rng, name, hue).save(root / name / f"{i:03d}.png")


def draw_shape(rng, name, hue):
    """One picture of a class, with sides of 40 to 64 pixels."""
    width, height = (int(side) for side in rng.integers(40, 65, 2))
    ground = tuple(int(x) for x in rng.integers(200, 256, 3))
    image = Image.new("RGB", (4 * width, 4 * height), ground)  # 4 times as large, for smooth edges
    shade = (hue + rng.uniform(-0.06, 0.06)) % 1, rng.uniform(0.7, 1), rng.uniform(0.45, 0.9)
    colour = tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*shade))
    side = min(width, height)
    radius = 4 * side * rng.uniform(0.28, 0.4)
    shift = 4 * side * 0.06  # the centre square is what a model sees
    x, y = (2 * extent + rng.uniform(-shift, shift) for extent in (width, height))
    shape = ImageDraw.Draw(image)
    if name.endswith("circle"):
        shape.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    elif name.endswith("square"):
        shape.rectangle((x - radius, y - radius, x + radius, y + radius), colour)
    else:
        angles = np.pi * np.arange(10) / 5 - np.pi / 2
        length = radius * np.tile([1, 0.42], 5)
        corners = zip(x + length * np.cos(angles), y + length * np.sin(angles), strict=True)
        shape.polygon([(float(a), float(b)) for a, b in corners], colour)
    return image.resize((width, height), Image.Resampling.LANCZOS)
