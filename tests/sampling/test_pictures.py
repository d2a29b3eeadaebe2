import numpy as np
from PIL import Image

from dit_jax.sampling import pictures


def test_a_grid_shows_every_image_in_order():
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    picture = np.asarray(pictures.grid(images, columns=2, scale=2))
    assert picture.shape == (3 * 4 + 2 * 2, 2 * 6 + 2)  # three rows of two, lines of 2 between
    assert picture[0, 0] == 1 and picture[0, 8] == 2 and picture[6, 0] == 3 and picture[12, 0] == 5
    assert picture[4, 0] == picture[12, 8] == pictures.GREY  # a line; no sixth image
    assert np.asarray(pictures.grid(np.zeros((4, 8, 8, 3), np.uint8))).shape == (18, 18, 3)
    assert np.asarray(pictures.grid(images, columns=9)).shape == (2, 5 * 3 + 4 * 2)  # one full row


def test_every_image_is_written_to_a_file_of_its_own(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1)).astype(np.uint8)
    pictures.write_all(images, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("00000.png", "00001.png", "00002.png")
    ]
    for i, image in enumerate(images):
        with Image.open(tmp_path / "new" / f"{i:05d}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image[..., 0])


def test_tiny_images_are_enlarged():
    assert [pictures.grid_scale(size) for size in ((8, 8), (28, 20), (256, 256))] == [8, 2, 1]
