import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import images
from dit_jax.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def published_crop(image, size):
    """guided-diffusion's center_crop_arr, step by step as published."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    scale = size / min(*image.size)
    new_size = round(image.size[0] * scale), round(image.size[1] * scale)
    array = np.array(image.resize(new_size, resample=Image.BICUBIC))
    crop_y = (array.shape[0] - size) // 2
    crop_x = (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize("width, height", [(60, 40), (64, 64), (200, 131), (33, 500), (32, 32)])
def test_crop_is_identical_to_adms(width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    crop = images.center_crop(image, 32)
    assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, published_crop(image, 32))


def test_small_image_is_enlarged():
    assert images.center_crop(Image.fromarray(RGB), 64).shape == (64, 64, 3)


def test_flip_mirrors_left_and_right():
    np.testing.assert_array_equal(images.flip(RGB), RGB[:, ::-1])
    np.testing.assert_array_equal(images.flip(images.flip(RGB[None])), RGB[None])


def assert_decodes(data, pixels, atol=0):
    image = images.decode(data)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(int), pixels, atol=atol)


def test_rgb_is_unchanged():
    assert_decodes(encode(Image.fromarray(RGB)), RGB)


def test_grey_becomes_three_equal_channels():
    grey = Image.fromarray(RGB[..., 0])
    assert_decodes(encode(grey), RGB[..., :1].repeat(3, axis=-1))
    assert_decodes(encode(grey.convert("1")), np.asarray(grey.convert("1").convert("RGB")))


def test_palette_colours_are_looked_up():
    palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    assert_decodes(encode(palette, "GIF"), np.asarray(palette.convert("RGB")))


def test_cmyk_is_converted():
    image = Image.fromarray(RGB // 32 * 32).resize((120, 80), Image.Resampling.BICUBIC)
    data = encode(image.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    with Image.open(io.BytesIO(data)) as file:
        assert file.mode == "CMYK"
    assert_decodes(data, np.asarray(image), atol=12)  # JPEG is lossy


def test_transparent_pixels_become_white():
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[:20] = 0
    rgba = np.concatenate([RGB, alpha], axis=-1)
    expected = RGB.copy()
    expected[:20] = 255
    assert_decodes(encode(Image.fromarray(rgba)), expected)
    grey = Image.fromarray(rgba[..., [0, 3]])
    assert grey.mode == "LA"
    assert_decodes(
        encode(grey), np.asarray(images.to_rgb(Image.fromarray(rgba[..., [0, 0, 0, 3]])))
    )
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    assert_decodes(encode(palette, transparency=0), [[[255, 255, 255], [9, 8, 7]]])


def test_16_bit_grey_is_scaled_to_8_bits():
    """Pillow's own conversion clips values above 255."""
    wide = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    image = Image.fromarray(wide)
    expected = (wide // 257)[..., None].repeat(3, axis=-1)
    assert_decodes(encode(image), expected)
    assert_decodes(encode(image, "TIFF"), expected)
    assert expected.min() == 0 and expected.max() == 255 and len(np.unique(expected)) == 256


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    turns = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_decodes(encode(Image.fromarray(RGB), exif=exif), turns[orientation](RGB))


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_png(kind, data):
    """RGB as a PNG with a chunk after its header."""
    whole = encode(Image.fromarray(RGB))
    return whole[:33] + png_chunk(kind, data) + whole[33:]


DAMAGED_EXIF = {
    "no TIFF": b"Exif\0\0" + b"\xde\xad\xbe\xef" * 4,
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01",
    "offset past the end": b"Exif\0\0II*\0\xff\xff\0\0",
    "float as MakerNote": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x10\x01\x0c\0\x01\0\0\0\x08\0\0\0"
    + bytes(4),
}


@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_exif_is_ignored(kind, exif):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_decodes(encode(Image.fromarray(RGB), kind, exif=exif, **options), RGB)


@pytest.mark.parametrize(
    "kind, data",
    [
        (b"iCCP", b"name\0\0no profile"),
        (b"zTXt", b"name\0\0no text"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<x tiff:Orientation=''/>"),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 10\nzz")),
    ],
)
def test_damaged_metadata_of_a_png_is_ignored(kind, data):
    assert_decodes(in_png(kind, data), RGB)


def test_a_damaged_profile_of_a_jpeg_is_ignored():
    grey = np.full((40, 60, 3), 90, np.uint8)
    assert_decodes(encode(Image.fromarray(grey), "JPEG", icc_profile=b"no profile"), grey, atol=1)


@pytest.mark.parametrize("dtype, got", [(np.int32, "signed or 32-bit integers"), ("f4", "floats")])
def test_pixels_of_an_unknown_range_are_refused(dtype, got):
    data = encode(Image.fromarray(np.full((4, 4), 200, dtype)), "TIFF")
    with pytest.raises(UserError, match=f"^image must have 8 or 16 bits .*, got {got}$"):
        images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9])
def test_truncated_file_raises(kind, part):
    data = encode(Image.fromarray(RGB.repeat(4, axis=0)), kind)
    with pytest.raises(UserError, match="^image must be a whole image file: [^\n]+$"):
        images.decode(data[: int(part * len(data))])


@pytest.mark.parametrize("data", [b"text", b"\xff\xd8\xff\xe0" + bytes(100)])
def test_file_that_is_not_an_image_raises(data):
    with pytest.raises(UserError, match="image must be a whole image file: "):
        images.decode(data)
