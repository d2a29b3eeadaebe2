"""Pictures of uint8 images (N, H, W, C), C 1 or 3: grids, animations, or one PNG file each."""

import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.sampling import imagenet

GREY = 96  # of the lines between the images of a grid
WHITE = 255  # of titles
TITLE_HEIGHT = 16  # pixels
TITLE_WIDTH = 160  # pixels, at most, of the titles of rows
MARGIN = 6  # pixels beside the titles of rows
FRAME_MS, LAST_FRAME_MS = 80, 2000  # how long an animation shows a frame
MAX_COLUMNS = 20  # that `grid_of_classes` chooses
CUT = "..."  # ends a title that was too long
NO_CHARACTER = "\uffff"  # fonts draw it as they draw what they lack: as a box, or not at all


def grid(images, *, columns=0, scale=1, titles=()):
    """The images side by side, each pixel repeated `scale` times: a PIL image.

    columns 0 makes the grid about square. Grey lines of max(2, scale) pixels separate the images.
    titles: text above image 0, 1, ..., cut to its width; a row of images without has no space for
    it.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    line = max(2, scale)
    _, height, width, channels = images.shape
    rows = []
    for start in range(0, len(images), columns):
        if above := titles[start : start + columns]:
            rows.append(_title_row(above, columns, width, line, channels))
        rows.append(_image_row(images[start : start + columns], columns, line))
    return to_pil(np.concatenate(rows)[:-line, :-line])


def table(images, *, rows, columns, corner="", scale=1):
    """Images (R, K, H, W, C) as a `grid` with titles of its R rows and K columns: a PIL image.

    corner: a text above the titles of the rows.
    """
    flat = images.reshape(-1, *images.shape[2:])
    right = grid(flat, columns=len(columns), scale=scale, titles=columns)
    step = images.shape[2] * scale + max(2, scale)  # from a row to the next one
    middles = [TITLE_HEIGHT + (i + 0.5) * step for i in range(len(rows))]
    font = fonts()[-1]  # wider, and easier to read
    texts = [_fit(text, font, TITLE_WIDTH) for text in (corner, *rows)]
    left = 2 * MARGIN + max(math.ceil(font.getlength(text)) for text in texts)
    picture = Image.new("L", (left + right.width, right.height), GREY).convert(right.mode)
    picture.paste(right, (left, 0))
    draw = ImageDraw.Draw(picture)
    white = (WHITE,) * len(right.getbands())
    for text, middle in zip(texts, [TITLE_HEIGHT / 2, *middles], strict=True):
        draw.text((MARGIN, middle), text, fill=white, font=font, anchor="lm")
    return picture


def write_gif(frames, path):
    """Writes PIL images of one size as an animation that is repeated; the last one stays longer."""
    shown = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    first, *others = map(_with_palette, frames)
    options = {"save_all": True, "append_images": others, "duration": shown, "loop": 0}
    first.save(path, format="GIF", **options)


def _with_palette(picture):
    """A picture in the 256 colours or greys that a GIF can have; colours are dithered."""
    if picture.mode == "L":
        return picture
    return picture.quantize(palette=picture.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)


def _image_row(images, columns, line):
    """Images (N, H, W, C) side by side with grey lines, (H + line, columns * (W + line), C)."""
    images = np.pad(images, ((0, 0), (0, line), (0, line), (0, 0)), constant_values=GREY)
    _, height, width, channels = images.shape
    row = np.full((columns, height, width, channels), GREY, np.uint8)
    row[: len(images)] = images
    return row.swapaxes(0, 1).reshape(height, columns * width, channels)


def _title_row(titles, columns, width, line, channels):
    """Texts above columns of a width, (TITLE_HEIGHT, columns * (width + line), C)."""
    strip = Image.new("L", (columns * (width + line), TITLE_HEIGHT), GREY)
    draw = ImageDraw.Draw(strip)
    for column, title in enumerate(titles):
        font = _font_for(title) or fonts()[0]
        text = _fit(title, font, width)
        left = column * (width + line) + (width - font.getlength(text)) / 2
        draw.text((left, TITLE_HEIGHT / 2), text, fill=WHITE, font=font, anchor="lm")
    return np.asarray(strip)[..., None].repeat(channels, axis=-1)


@functools.cache
def fonts():
    """The fonts of titles: Pillow's, and one with more of the world's letters, of matplotlib."""
    import matplotlib  # here, since only titles need it

    more = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.load_default(), ImageFont.truetype(more, 10)


def _font_for(text):
    """The first of the fonts that has every character of a text; None if none has."""
    return next((font for font in fonts() if all(_has(font, x) for x in text)), None)


def _has(font, character):
    if not character.isprintable():  # a line break
        return False
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))


def _fit(text, font, width):
    """The text, or as much of its beginning as is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + CUT) > width:
        text = text[:-1]
    return text.rstrip() + CUT if text else ""


def grid_of_classes(images, labels, class_names, *, columns=0, scale=1):
    """The `grid` with the name of each image's class above it, or once above a column of one class.

    columns 0: a column for each class if the labels are a cycle of at most MAX_COLUMNS classes,
    else about square. class_names () draws no names. A name in letters that no font has is drawn as
    its label.
    """
    labels = list(labels)
    longest = min(max(columns, MAX_COLUMNS), len(labels) - 1)
    period = next((i for i in range(1, longest + 1) if labels[i:] == labels[:-i]), 0)
    columns = columns or (period if period > 1 else math.ceil(math.sqrt(len(labels))))
    titles = class_titles(labels, class_names) if class_names else []
    if period and columns % period == 0:
        titles = titles[:columns]
    return grid(images, columns=columns, scale=scale, titles=titles)


def class_titles(labels, class_names):
    """The name of each label's class; the label if it has no name, or one that no font can draw.

    class_names: of label 0, 1, ..., or ImageNet's ids, n01440764 ...; () if there are none.
    """
    class_names = imagenet.named(class_names)
    names = {label: class_names[label] for label in labels} if class_names else {}
    return [
        names[label] if label in names and _font_for(names[label]) else str(label)
        for label in labels
    ]


def grid_scale(size):
    """How often to repeat a pixel so that a tiny image is visible: 8 for (8, 8)."""
    return max(1, 64 // max(size))


def to_pil(image):
    """The PIL image of uint8 (H, W, C), C 1 or 3."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_all(images, folder):
    """Writes the images as 00000.png, 00001.png, ... of a new folder."""
    folder.mkdir()
    for i, image in enumerate(images):
        to_pil(image).save(folder / f"{i:05d}.png")
