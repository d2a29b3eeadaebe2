from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dit_jax.diffusion import processes
from dit_jax.sampling import figures, pictures
from dit_jax.settings import Diffusion

STEP = 64 + 8  # an image of 8 x 8 pixels, enlarged, and its line
TITLE = pictures.TITLE_HEIGHT


class Fake:
    """Stands for a LoadedDiT of 8 x 8 pixels: level i of image m is 10 m + i, its x0 100 more."""

    sampling = {"num_steps": "250"}
    config = SimpleNamespace(input_size=(8, 8), in_channels=1)
    process = processes.make(Diffusion())

    def __init__(self):
        self.calls = []

    def levels(self, *, num_steps="250"):
        return self.process.levels(num_steps)

    def sample(self, labels, *, levels=(), trajectory=False, **options):
        self.calls.append(options)
        shades = 10 * np.arange(len(labels))
        if trajectory:
            shades = shades + np.arange(len(levels))[:, None] + np.array([0, 100]).reshape(2, 1, 1)
        else:
            shades = shades + int(options["cfg_scale"])
        return np.uint8(shades)[..., None, None, None] * np.ones((8, 8, 1), np.uint8)


def shades(picture, rows, columns):
    """The values in the middle of each image of a table."""
    array = np.asarray(picture)
    left = array.shape[1] - (columns * STEP - 8)
    return [
        [int(array[TITLE + i * STEP + 32, left + k * STEP + 32]) for k in range(columns)]
        for i in range(rows)
    ]


def test_titles_are_names_or_labels_or_shares():
    assert pictures.class_titles([2, 0], ("ant", "bee", "cat")) == ["cat", "ant"]
    assert pictures.class_titles([2, 0], ("ant", "bee", "猫")) == ["2", "ant"]
    assert pictures.class_titles([2, 0], ()) == ["2", "0"]
    ids = Path(tfds.__file__).with_name("datasets") / "imagenet2012" / "labels.txt"
    assert pictures.class_titles([360, 1], ids.read_text().split()) == ["otter", "goldfish"]
    assert figures.mixed_titles([0, 2], 5, ("ant", "bee", "cat")) == [
        *("ant", "25%", "50%", "75%", "cat"),
    ]
    assert figures.mixed_titles([2, 0, 1], 4, ()) == ["2", "67%", "33%", "1"]


def test_a_strip_has_two_rows_for_each_image_and_a_column_for_each_level():
    dit = Fake()
    picture = figures.strip(dit, [3, 1], ["three", "one"], columns=5, num_steps=20, seed=4)
    assert shades(picture, 4, 5) == [
        *(list(range(5)), list(range(100, 105)), list(range(10, 15)), list(range(110, 115))),
    ]
    assert dit.calls == [{"same_noise": True, "num_steps": 20, "seed": 4}]


def test_an_animation_goes_over_all_levels_or_some(tmp_path):
    frames = figures.animation(Fake(), [3, 1], ["three", "one"], num_steps=20)
    assert len(frames) == 21
    assert [shades(frame, 2, 2) for frame in frames[:2]] == [
        *([[0, 10], [100, 110]], [[1, 11], [101, 111]]),
    ]
    assert len(figures.animation(Fake(), [3], ["three"])) == figures.NUM_FRAMES
    pictures.write_gif(frames, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 21 and image.size == frames[0].size and image.info["loop"] == 0
        image.seek(20)
        assert image.info["duration"] == pictures.LAST_FRAME_MS


def test_a_grid_has_a_row_for_each_value():
    dit = Fake()
    options = {"option": "cfg_scale", "values": [1.0, 4.0], "seed": 4}
    picture = figures.grid(dit, [3, 1, 4], ["three", "one", "four"], **options)
    assert shades(picture, 2, 3) == [[1, 11, 21], [4, 14, 24]]
    assert dit.calls == [{"same_noise": True, "seed": 4, "cfg_scale": x} for x in (1.0, 4.0)]


def test_rows_of_other_numbers_of_steps_begin_with_the_same_noise():
    """That of a seed depends on the number of steps."""
    dit = Fake()
    options = {"option": "num_steps", "values": ["250", "ddim50"], "cfg_scale": 2, "seed": 4}
    figures.grid(dit, [3, 1], ["three", "one"], **options)
    noises = [call.pop("noise") for call in dit.calls]
    assert dit.calls == [{"cfg_scale": 2, "seed": 4, "num_steps": x} for x in ("250", "ddim50")]
    for noise in noises:
        assert noise.shape == (2, 8, 8, 1) and 0.8 < noise.std() < 1.2
        np.testing.assert_array_equal(noise, np.broadcast_to(noises[0][0], noise.shape))
    other = Fake()
    figures.grid(other, [3, 1], ["three", "one"], **options | {"seed": 5})
    assert not np.array_equal(other.calls[0]["noise"], noises[0])
