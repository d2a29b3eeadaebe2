"""The samples of runs for a report: few enough and small enough to be inside its file."""

import base64
import functools
import io
import math

from PIL import Image

from dit_jax.machine import disk

MAX_PICTURES = 20  # of all runs together
MAX_BYTES = 35_000  # of a picture; a larger one is scaled and compressed
TRIES = ((230_000, 75), (230_000, 40), (60_000, 40))  # (pixels, quality), until it is small


def choose(paths, limit):
    """At most `limit` of the paths, 2 or more, evenly spaced, with the first and the last."""
    if len(paths) <= limit:
        return paths
    return [paths[round(i * (len(paths) - 1) / (limit - 1))] for i in range(limit)]


def pictures(workdir, limit):
    """([(step, data URI, (width, height) to show)] of the samples of a run, by step, [problem])."""
    found = disk.children(workdir / "samples")
    steps = [path for path in found if path.suffix == ".png" and path.stem.isdecimal()]
    shown, problems = [], []
    for path in choose(sorted(steps, key=lambda path: int(path.stem)), limit):
        try:
            shown.append((int(path.stem), *_encode(path, _version(path))))
        except (OSError, SyntaxError) as error:
            problems.append(f"{path} cannot be shown: {error}")
    return shown, problems


def _version(path):
    """What changes if the file does, so that it is read once while a run trains."""
    return path.stat().st_mtime_ns if disk.is_on_disk(path) else None


@functools.lru_cache(maxsize=4 * MAX_PICTURES)
def _encode(path, version):
    """(data URI, size in pixels at which to show it) of a picture."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if len(data) <= MAX_BYTES:
            return _uri("png", data), image.size
        image = image.convert("RGB")
    for pixels, quality in TRIES:
        factor = min(1, math.sqrt(pixels / (image.width * image.height)))
        size = [max(1, round(factor * side)) for side in image.size]
        smaller, file = image.resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        smaller.save(file, "webp", quality=quality, method=2)
        if file.tell() <= MAX_BYTES:
            break
    return _uri("webp", file.getvalue()), image.size


def _uri(kind, data):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
