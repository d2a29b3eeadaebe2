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


def is_title(picture, left, right, top=0):
    """Whether there is text between two columns of pixels of a title row that begins at `top`."""
    return bool((picture[top : top + pictures.TITLE_HEIGHT, left:right] > 200).any())


def draw(labels, names, **options):
    """The grid of black images of 30 pixels, as an array; lines are 2 pixels wide."""
    images = np.zeros((len(labels), 30, 30, 1), np.uint8)
    return np.asarray(pictures.grid_of_classes(images, labels, names, **options))


def test_the_name_of_a_class_stands_once_above_its_column():
    title, names = pictures.TITLE_HEIGHT, ("ant", "", "cat")
    picture = draw([0, 1, 2, 0, 1, 2, 0], names)
    assert picture.shape == (title + 3 * 32 - 2, 3 * 32 - 2)
    assert [is_title(picture, 32 * i, 32 * i + 30) for i in range(3)] == [True, False, True]
    assert (picture[title : title + 30, :30] == 0).all()  # no text in an image
    assert draw([0, 1, 2, 0, 1, 2, 0], ()).shape == (3 * 32 - 2, 3 * 32 - 2)
    assert draw([2] * 4, names).shape == (title + 2 * 32 - 2, 2 * 32 - 2)  # one class: a square
    assert draw([0, 1, 2], names, columns=3).shape == (title + 30, 3 * 32 - 2)
    colour = pictures.grid(np.zeros((1, 30, 30, 3), np.uint8), titles=["ant"])
    assert colour.mode == "RGB" and colour.size == (30, title + 30)


def test_names_stand_above_each_image_where_a_column_has_several_classes():
    title, names = pictures.TITLE_HEIGHT, ("ant", "bee", "cat")
    picture = draw([0, 1, 2, 2, 0], names, columns=2)
    assert picture.shape == (3 * (title + 32) - 2, 2 * 32 - 2)
    tops = [0, title + 32, 2 * (title + 32)]
    assert all(is_title(picture, 0, 30, top) for top in tops)
    assert [is_title(picture, 32, 62, top) for top in tops] == [True, True, False]


def test_a_long_name_is_cut_to_its_column():
    picture = draw([0, 1], ("a very long name of a class", "b"), columns=2)
    assert is_title(picture, 0, 30) and not is_title(picture, 30, 32)
    font = pictures.ImageFont.load_default()
    assert pictures._fit("short", font, 60) == "short"
    assert pictures._fit("a very long name", font, 60).endswith(pictures.CUT)
    assert pictures._fit("long", font, 2) == ""  # not even the dots fit


def test_names_in_any_letters_are_drawn_and_as_labels_where_no_font_has_them():
    known = ("ant", "Gänsefüßchen", "Ёж", "λύκος", "قطة")
    unknown = ("猫", "a猫", "cat 🐈", "two\nlines", "\u200b", "\ufdd0", "\ud83d")
    draw(range(len(known + unknown)), known + unknown)  # no crash
    for name in known:
        assert not np.array_equal(draw([1], ("", name)), draw([1], ("", "1"))), name
    for name in unknown:
        np.testing.assert_array_equal(draw([1], ("", name)), draw([1], ("", "1")), name)
    assert not is_title(draw([0], ("",)), 0, 30)


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


def test_a_table_has_titles_above_and_beside_its_images():
    images = np.zeros((2, 3, 30, 30, 3), np.uint8)
    titles = {"rows": ["", "a row"], "columns": ["ant", "", "cat"]}
    picture = pictures.table(images, **titles, corner="t = 9")
    assert picture.mode == "RGB"
    array = np.asarray(picture)[..., 0]
    left, top = array.shape[1] - (3 * 32 - 2), pictures.TITLE_HEIGHT
    assert array.shape[0] == top + 2 * 32 - 2
    assert (array[top : top + 30, left : left + 30] == 0).all()
    beside = [
        (array[a:b, :left] > 200).any() for a, b in ((0, top), (top, top + 32), (top + 32, -1))
    ]
    assert beside == [True, False, True]
    above = [(array[:top, left + 32 * i : left + 32 * i + 30] > 200).any() for i in range(3)]
    assert above == [True, False, True]
    long = pictures.table(images, rows=["a", "a long title " * 9], columns=["", "", ""])
    assert 200 < long.width <= 2 * pictures.MARGIN + pictures.TITLE_WIDTH + 3 * 32 - 2
