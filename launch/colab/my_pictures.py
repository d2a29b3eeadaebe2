"""Finds the pictures that train.ipynb trains on, or draws some: a folder for each class."""

import colorsys
import hashlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
from PIL import Image, ImageDraw

from launch.colab import start
from launch.colab.install import Failed

DRAWN, UPLOAD = "drawn here", "upload a zip"
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.33, "blue": 0.6, "purple": 0.8}
SHAPES = {  # the distance of each corner from the centre
    "circle": [1] * 60,
    "square": [0.71, 1] * 4,
    "triangle": [1] * 3,
    "star": [1, 0.42] * 5,
}
SETS = {  # what is drawn
    "shapes": ("blue square", "green star", "red circle"),
    "new_shapes": ("purple triangle", "red circle", "yellow star"),
}
SIDE = 64  # pixels of a drawn picture


def find(source, folder, *, drawn, count):
    """The folder of pictures that a form names, with a folder for each class; Failed without one.

    source: DRAWN, UPLOAD, a folder, a .zip or gs://BUCKET/FOLDER. folder: where pictures are
    written that are not on this machine yet. drawn: a name in SETS, of which `count` pictures a
    class are drawn.
    """
    if source == DRAWN:
        return draw(folder / "drawn" / drawn, SETS[drawn], count)
    if source.startswith("gs://"):
        return _copy(source, folder / source.rstrip("/").rpartition("/")[2])
    path = _upload(folder) if source == UPLOAD else start.find(source)
    if path.suffix == ".zip" and path.is_file():
        return _unpack(path, folder / path.stem)
    if not source.strip() or not path.is_dir():
        raise Failed(f"PICTURES must be a folder or a .zip that exists, got {source!r}: {path}")
    return path


def draw(folder, classes, count):
    """Draws `count` pictures of each class, such as "red circle", unless they are there.

    The size, the shade, the angle and the place differ. Returns the folder.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    for name in classes:
        colour, shape = name.split()
        rng = np.random.default_rng(list(name.encode()))
        (partial / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            _draw_one(rng, HUES[colour], SHAPES[shape]).save(partial / name / f"{i:03d}.png")
    return partial.rename(folder)


def _draw_one(rng, hue, distances):
    shade = (hue + rng.uniform(-0.03, 0.03)) % 1, rng.uniform(0.7, 1), rng.uniform(0.5, 0.9)
    colour = tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*shade))
    large = 4 * SIDE  # smaller later, for smooth edges
    image = Image.new("RGB", (large, large), tuple(rng.integers(200, 256, 3).tolist()))
    centre = large * rng.uniform(0.44, 0.56, 2)
    angles = 2 * np.pi * np.arange(len(distances)) / len(distances) + rng.uniform(-0.2, 0.2)
    lengths = large * rng.uniform(0.28, 0.42) * np.array(distances)
    corners = centre + lengths[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _upload(folder):
    """The .zip that the reader chooses in the browser, on this machine."""
    if "google.colab" not in sys.modules:
        raise Failed(f"PICTURES = {UPLOAD!r} needs Colab: name a folder or a .zip instead")
    from google.colab import files

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.upload().items():
        (folder / name).write_bytes(content)
        return folder / name
    raise Failed("PICTURES: no file was chosen")


def _unpack(path, folder):
    """The folder of classes in a .zip, unpacked unless it is there; anew if the .zip changed."""
    mark = folder.with_name(f"{folder.name}.sha256")
    try:
        with zipfile.ZipFile(path) as file:
            content = sorted((each.filename, each.CRC) for each in file.infolist())
            sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
            if not content:
                raise Failed(f"PICTURES must hold a folder for each class, got the empty {path}")
            if not folder.exists() or not mark.exists() or mark.read_text() != sha256:
                shutil.rmtree(folder, ignore_errors=True)
                file.extractall(folder)
                _without_wrapping(folder)
                mark.write_text(sha256)
    except zipfile.BadZipFile as error:
        raise Failed(f"PICTURES must be a whole .zip, got {path}: {error}") from None
    return folder


def _without_wrapping(folder):
    """Takes the folders of classes out of a folder that is around all of them, as archivers add."""
    inside = [x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(("__", "."))]
    if len(inside) == 1 and any(x.is_dir() for x in inside[0].iterdir()):
        apart = folder.with_name(f"{folder.name}.unwrapped")
        shutil.rmtree(apart, ignore_errors=True)  # of an unpacking that was stopped
        inside[0].rename(apart)
        shutil.rmtree(folder)
        apart.rename(folder)


def _copy(source, folder):
    """A copy of a folder in a bucket; a second call copies only what is missing."""
    if "google.colab" in sys.modules:
        from google.colab import auth

        auth.authenticate_user()
    if not shutil.which("gcloud"):
        raise Failed(f"gcloud, which Colab has, must be installed to read {source}")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcloud", "storage", "rsync", "--recursive", source, folder]
    if subprocess.run(command).returncode:
        raise Failed(f"{source} cannot be copied; the lines above say why")
    return folder
