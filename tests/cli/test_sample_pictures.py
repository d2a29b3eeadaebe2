"""The pictures of dit-sample that compare: --trajectory, --grid, --interpolate."""

import numpy as np
import pytest
import random_run
from PIL import Image

import dit_jax
from dit_jax.cli import sample
from dit_jax.models import dit
from dit_jax.sampling import imagenet, pictures

HEIGHT = 64 + 8  # of a row: an image of 8 x 8 pixels, enlarged, and its line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    random_run.save(path, class_names=list("abcdefghij"))
    return path


def width_of(image, columns):
    """The width of the titles of the rows."""
    return image.size[0] - (columns * HEIGHT - 8)


def test_a_trajectory_is_a_strip_or_an_animation(call, tmp_path, checkpoint):
    usual = (checkpoint, "--labels=b,d", "--trajectory", "--num_steps=6")
    assert call(sample, *usual, f"--out={tmp_path}/x.png", "--columns=3")[0] == 0
    with Image.open(tmp_path / "x.png") as image:  # x_t and x0 of two images, three levels
        assert image.size[1] == pictures.TITLE_HEIGHT + 4 * HEIGHT - 8
        assert 20 < width_of(image, 3) < 60
        array = np.asarray(image)
    last = array[pictures.TITLE_HEIGHT :, -64:]
    np.testing.assert_array_equal(last[:64], last[HEIGHT : HEIGHT + 64])  # both are the sample
    images = dit_jax.load(checkpoint).sample([1, 3], same_noise=True, num_steps=6)
    np.testing.assert_array_equal(last[:64:8, ::8], images[0, ..., 0])
    assert call(sample, *usual, f"--out={tmp_path}/x.gif")[0] == 0
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 7
        assert image.size[1] == pictures.TITLE_HEIGHT + 2 * HEIGHT - 8


def test_a_grid_has_a_row_for_each_value_and_a_column_for_each_label(call, tmp_path, checkpoint):
    out = tmp_path / "x.png"
    options = (checkpoint, out, "--labels=0-3", "--grid=cfg_scale=1, 4")
    assert call(sample, *options)[0] == 0
    with Image.open(out) as image:
        assert image.size[1] == pictures.TITLE_HEIGHT + 2 * HEIGHT - 8
        array = np.asarray(image)[pictures.TITLE_HEIGHT :, width_of(image, 4) :]
    images = dit_jax.load(checkpoint).sample([0, 1, 2, 3], same_noise=True, cfg_scale=4.0)
    for i, each in enumerate(images):
        shown = array[HEIGHT::8, i * HEIGHT : i * HEIGHT + 64 : 8]
        np.testing.assert_array_equal(shown, each[..., 0])


def test_interpolation_goes_from_class_to_class_with_the_same_noise(call, tmp_path, checkpoint):
    path = ("--interpolate=b,d,e", "--batch_size=8", f"--out={tmp_path}/x.npz")
    assert call(sample, checkpoint, *path)[0] == 0
    images = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    assert len(images) == 15  # with every class in it
    classes = dit_jax.load(checkpoint).sample([1, 3, 4], same_noise=True, batch_size=8)
    # float32 sums may differ in the last bit, which rounding to a pixel can turn into 1
    assert np.abs(images[[0, 7, -1]] - classes).max() <= 1
    assert len(np.unique(images, axis=0)) > 3
    options = ("--interpolate=b,d", "--batch_size=8", f"--out={tmp_path}/x.png")
    assert call(sample, checkpoint, *options)[0] == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (8 * HEIGHT - 8, pictures.TITLE_HEIGHT + 64)


def test_classes_of_imagenet_are_sampled_by_name_and_other_thousands_are_not(
    call, refuse, tmp_path
):
    model = dit.configure(**random_run.MODEL | {"num_classes": 1000})
    random_run.save(tmp_path, model=model, class_names=imagenet.names())
    out = tmp_path / "x.png"
    assert call(sample, tmp_path, out, "--labels=golden retriever,otter,red panda")[0] == 0
    with Image.open(out) as image:
        assert image.size[1] > HEIGHT  # titles
    line = refuse(sample, tmp_path, out, "--labels=golden retreiver")
    assert "got 'golden retreiver'; did you mean golden retriever" in line
    line = refuse(sample, tmp_path, out, "--labels=panda")
    assert "one class each, got 'panda': lesser panda and giant panda have it" in line
    random_run.save(tmp_path / "unnamed", model=model)
    line = refuse(sample, tmp_path / "unnamed", out, "--labels=otter")
    assert "this checkpoint have no names; dit-convert gives it some with --class_names" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["--trajectory", "--out=x.mp4"], "out must end with .png or .gif for --trajectory, got x"),
        (["--trajectory", "--out=x.mp4"], "MP4 needs an encoder: take a .gif"),
        (["--trajectory", "--out=x.npz"], "out must end with .png or .gif for --trajectory, got x"),
        (["--out=x.gif"], "out must end with .png or .npz, or be a new folder, got x.gif"),
        (["--trajectory", "--grid=seed=1"], "--trajectory must be given without --grid, got both"),
        (["--grid=seed=1", "--out=x.npz"], "out must end with .png for --grid, got x.npz"),
        (["--grid=seed=1", "--columns=2"], "columns must be 0 for --grid, whose columns are the"),
        (["--grid=clip_x0=1"], "grid must be over one of seed, cfg_scale, num_steps, sampler, eta"),
        (["--grid=cfg_scale"], "grid must be OPTION=VALUE,VALUE,..., got 'cfg_scale'"),
        (["--grid=seed=1,"], "seed must be a whole number, got ''"),
        (["--grid=seed=1.5"], "seed must be a whole number, got '1.5'"),
        (["--grid=seed=1", "--seed=2"], "--seed must be left out with --grid=seed=1, got both"),
        (["--grid=num_steps=5,5000"], "num_steps must be in 2 .. 1000, got '5000'"),
        (["--grid=seed=-1"], "seed must be in 0 .. 4294967295, got -1"),
        (["--grid=cfg_scale=-1"], "cfg_scale must be at least 0, got -1.0"),
        (["--grid=sampler=plms"], "sampler must be one of ddpm, ddim, euler, "),
        (
            ["--grid=eta=0,1", "--sampler=ddpm"],
            "eta must be left at 0 for ddpm, which does not use it, got 1",
        ),
        (["--grid=seed=1", "--num_samples=101"], "labels must be at most 100 for --grid, got 101"),
        (["--interpolate=a,b"], "got labels and interpolate"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_one_line(refuse, tmp_path, checkpoint, args, message):
    out = [] if any(arg.startswith("--out") for arg in args) else [f"--out={tmp_path}/x.png"]
    assert message in refuse(sample, checkpoint, "--labels=a", *args, *out)


def test_interpolation_needs_two_classes(refuse, tmp_path, checkpoint):
    line = refuse(sample, checkpoint, tmp_path / "x.png", "--interpolate=a")
    assert "interpolate must be two classes or more, got a" in line


def test_latents_cannot_be_shown_without_an_autoencoder(refuse, tmp_path):
    config = random_run.CONFIG | {"data": {"source": "imagenet", "space": "latents"}}
    random_run.save(tmp_path, config)
    for option in ("--trajectory", "--grid=seed=1"):
        line = refuse(sample, tmp_path, tmp_path / "x.png", "--labels=1", option)
        assert "--vae must be given to show latents with --" in line
