import numpy as np

from dit_jax.models import pixels


def test_pixels_are_rounded_and_clipped():
    x = np.float32([-2, -1, 0, 1, 2])
    np.testing.assert_array_equal(pixels.to_uint8(x), [0, 0, 128, 255, 255])


def test_every_pixel_comes_back():
    image = np.arange(256, dtype=np.uint8)
    unit = pixels.to_unit(image)
    assert unit.dtype == np.float32 and unit.min() == -1 and unit.max() == 1
    np.testing.assert_array_equal(pixels.to_uint8(unit), image)
