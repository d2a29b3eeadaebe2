import json

import numpy as np
import pytest
import random_run
from PIL import Image

from dit_jax.cli import sample
from dit_jax.diffusion import forecasts
from dit_jax.models import vae
from dit_jax.sampling import autoencoder, pictures, trained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    random_run.save(path)
    return path


def test_a_png_is_a_grid_of_the_labels(call, tmp_path, checkpoint):
    out = tmp_path / "grid.png"
    options = (f"--checkpoint={checkpoint}", "--labels=3,1,4,1,5", f"--out={out}", "--columns=9")
    assert call(sample, *options)[0] == 0
    with Image.open(out) as image:
        assert image.mode == "L" and image.size == (5 * 64 + 4 * 8, 64)  # no empty columns


def test_paths_may_start_with_a_tilde_and_a_checkpoint_may_be_one_step(
    call, tmp_path, checkpoint, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(checkpoint)
    options = ("--checkpoint=~/run/checkpoints/30", "--labels=3", "--out=~/x.npz")
    assert call(sample, *options)[0] == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 8, 8, 1)


def test_an_npz_has_every_image_and_the_run_gives_the_defaults(call, tmp_path, checkpoint):
    def draw(*options):
        out = tmp_path / "images.npz"
        usual = (f"--checkpoint={checkpoint}", "--labels=3, 1,4", f"--out={out}")
        assert call(sample, *usual, *options)[0] == 0
        return np.load(out)["arr_0"]

    images = draw()
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    defaults = "--seed=0", "--cfg_scale=2", "--num_steps=4", "--clip_x0", "--cfg_interval=0,999"
    np.testing.assert_array_equal(images, draw(*defaults))
    for option in ("--seed=1", "--weights=params"):  # for others see the next test
        assert not np.array_equal(images, draw(option)), option


def test_sampling_flags_override_the_run(call, tmp_path, checkpoint, monkeypatch):
    given = {}

    def record(self, labels, *, seed, batch_size, progress, same_noise, **sampling):
        assert progress and not same_noise
        given.update(sampling, seed=seed, batch_size=batch_size)
        self.seconds_per_image = 0.1
        return np.zeros((len(labels), 8, 8, 1), np.uint8)

    monkeypatch.setattr(trained.LoadedDiT, "sample", record)
    values = {"sampler": "ddim", "num_steps": "ddim5", "eta": 0.5, "cfg_scale": 3.0}
    values |= {"cfg_channels": 1, "clip_x0": False, "seed": 7, "batch_size": 3}
    values |= {"spacing": "auto", "cfg_schedule": "cosine", "shift": 0.0}
    values |= {"sde_noise": "sigma", "sde_last": 0.04, "cache": "every:2:1-3", "cache_order": 3}
    values |= {"cache_guidance": "steps:3", "cache_fit": "chebyshev"}
    options = [f"--{name}={value}" for name, value in values.items()] + ["--cfg_interval=0, 400.5"]
    usual = (f"--checkpoint={checkpoint}", "--labels=3,1,4", f"--out={tmp_path}/x.npz")
    assert call(sample, *usual, *options)[0] == 0
    assert given == values | {"cfg_interval": [0.0, 400.5]}


def test_network_calls_are_counted(call, caplog, tmp_path, checkpoint):
    """A guided call is two passes; Heun's last step has one call."""
    caplog.set_level("INFO")
    usual = (f"--checkpoint={checkpoint}", "--labels=3", f"--out={tmp_path}/x.npz")
    assert call(sample, *usual, "--sampler=heun", "--num_steps=3")[0] == 0
    assert "an image takes 5 network calls, 10 forward passes" in caplog.messages


def test_rows_of_a_grid_are_counted(call, caplog, tmp_path, checkpoint):
    caplog.set_level("INFO")
    usual = (f"--checkpoint={checkpoint}", "--labels=3", f"--out={tmp_path}/x.png")
    assert call(sample, *usual, "--grid=num_steps=2,4", "--cfg_scale=1")[0] == 0
    for count in (2, 4):
        calls = f"{count} network calls, {count} forward passes"
        assert f"an image with num_steps {count} takes {calls}" in caplog.messages


def test_a_cache_is_counted(call, caplog, tmp_path, checkpoint):
    caplog.set_level("INFO")
    usual = (f"--checkpoint={checkpoint}", "--labels=3", f"--out={tmp_path}/x.npz")
    options = ("--num_steps=9", "--cache=every:4", "--cache_order=2", "--cache_guidance=every:2")
    assert call(sample, *usual, *options)[0] == 0
    assert "an image takes 3 network calls, 5 forward passes" in caplog.messages
    takes = "an image takes 0.03939 GFLOPs, and 12.3 kB for its cache"  # 6 values of 4 x 128
    assert takes in caplog.messages
    (took,) = (line for line in caplog.messages if line.startswith("an image took"))
    assert 0 < float(took.split()[3]) < 60 and took.endswith(" s, without compilation")


def test_a_calibration_prints_a_schedule_that_can_be_given(call, tmp_path, checkpoint):
    steps = (f"--checkpoint={checkpoint}", "--num_steps=8")
    out = tmp_path / "schedule.json"
    code, text, _ = call(sample, *steps, "--calibrate=4", "--num_samples=8", f"--out={out}")
    option = text.splitlines()[-1]
    assert code == 0 and option.startswith("--cache=steps:0")
    found = json.loads(out.read_text())
    assert option == f"--cache={found['cache']}" and len(found["changes"]) == 7
    computed = forecasts.read(found["cache"], 8)
    assert computed[0] and computed[-1] and 2 <= computed.sum() <= 4
    assert call(sample, *steps, option, "--labels=3", f"--out={tmp_path}/x.npz")[0] == 0
    text = call(sample, *steps, "--calibrate=0.001", "--labels=0-7")[1]
    assert text.splitlines()[1:] == ["threshold 0.001", "--cache=steps:0-7"]


def test_a_folder_has_one_png_per_image(call, refuse, tmp_path, checkpoint):
    usual = (f"--checkpoint={checkpoint}", "--labels=3,1,4")
    assert call(sample, *usual, f"--out={tmp_path}/images")[0] == 0
    assert call(sample, *usual, f"--out={tmp_path}/x.npz")[0] == 0
    images = np.load(tmp_path / "x.npz")["arr_0"]
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [
        f"0000{i}.png" for i in range(3)
    ]
    for i, image in enumerate(images):
        with Image.open(tmp_path / "images" / f"0000{i}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image[..., 0])
    line = refuse(sample, *usual, f"--out={tmp_path}/images")
    assert "out must be a new folder, got" in line


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run whose classes have names."""
    path = tmp_path_factory.mktemp("named")
    random_run.save(path, class_names=["a b", "c, d", *"efghijkl"])
    return path


def test_labels_are_numbers_ranges_names_or_lines_of_a_file(call, tmp_path, named):
    def draw(*options):
        usual = (f"--checkpoint={named}", f"--out={tmp_path}/x.npz")
        assert call(sample, *usual, *options)[0] == 0
        return np.load(tmp_path / "x.npz")["arr_0"]

    images = draw("--labels=0,1,2,3,0,1,2,3,0")
    np.testing.assert_array_equal(images, draw("--labels=0-3", "--num_samples=9"))
    np.testing.assert_array_equal(images, draw('--labels=a b,"c, d",e,f', "--num_samples=9"))
    (tmp_path / "labels.txt").write_text("a b\nc, d\n2\nf\n")
    options = (f"--labels_file={tmp_path}/labels.txt", "--num_samples=9")
    np.testing.assert_array_equal(images, draw(*options))
    assert len(draw("--labels=all")) == 10 and len(draw("--labels=all", "--num_samples=3")) == 3


def test_a_grid_shows_the_names_of_the_classes(call, tmp_path, named):
    options = (
        f"--checkpoint={named}",
        "--labels=all",
        "--num_samples=20",
        f"--out={tmp_path}/x.png",
    )
    assert call(sample, *options)[0] == 0
    with Image.open(tmp_path / "x.png") as image:  # a column for each class, once its name
        assert image.size == (10 * 72 - 8, 2 * 72 - 8 + pictures.TITLE_HEIGHT)
        assert np.asarray(image)[: pictures.TITLE_HEIGHT, :64].max() > 200


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A run whose model generates latents, with an autoencoder of as many channels in vae/."""
    path = tmp_path_factory.mktemp("latents")
    random_run.save(path, random_run.CONFIG | {"data": {"source": "imagenet", "space": "latents"}})
    config = vae.VAEConfig(latent_channels=1, channels=(8, 16), num_resnets=1, num_groups=4)
    autoencoder.save(path / "vae", config, random_run.weights(vae.init, config))
    return path


def test_latents_without_an_autoencoder_go_to_npz_only(call, refuse, tmp_path, latents):
    usual = (f"--checkpoint={latents}", "--labels=3")
    line = refuse(sample, *usual, f"--out={tmp_path}/x.png")
    assert "out must end with .npz for latents without a --vae, got" in line
    assert call(sample, *usual, f"--out={tmp_path}/x.npz")[0] == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].dtype == np.float32


def test_an_autoencoder_decodes_latents_and_one_that_does_not_fit_is_refused(
    call, refuse, tmp_path, latents, checkpoint
):
    usual = (f"--checkpoint={latents}", "--labels=3,1", f"--vae={latents}/vae")
    for options in ([], ["--vae_dtype=bfloat16"]):
        assert call(sample, *usual, *options, f"--out={tmp_path}/x.npz")[0] == 0
        images = np.load(tmp_path / "x.npz")["arr_0"]
        assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert call(sample, *usual, f"--out={tmp_path}/x.png")[0] == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "RGB" and image.size == (2 * 64 + 4, 64)
    (tmp_path / "folder").mkdir()
    line = refuse(sample, *usual, f"--out={tmp_path}/folder")
    assert "out must be a new folder, got" in line
    line = refuse(sample, "--labels=3", f"--checkpoint={checkpoint}", f"--vae={latents}/vae")
    assert "vae must be none for a model of pixels, got" in line
    wide = vae.VAEConfig(channels=(8,), num_resnets=1, num_groups=4)
    autoencoder.save(tmp_path / "wide", wide, random_run.weights(vae.init, wide))
    line = refuse(sample, "--labels=3", f"--checkpoint={latents}", f"--vae={tmp_path}/wide")
    assert "vae must have 1 latent channels, got 4" in line
    line = refuse(sample, "--labels=3", f"--checkpoint={latents}", f"--vae={checkpoint}")
    assert f"vae must be a folder that `dit-convert vae` wrote, got {checkpoint}" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["--labels=3,11"], "labels must be in 0 .. 9, got 11"),
        (["--labels=3,x"], "labels must be whole numbers separated by commas, got 'x'"),
        (["--labels=-1"], "labels must be in 0 .. 9, got -1"),
        (
            ["--labels=1,10000000000000000000000"],
            "labels must be in 0 .. 9, got 100000000000000000",
        ),
        (["--labels=--1"], "labels must have a value, got --1"),
        (["--labels="], "labels must not be empty"),
        (["--labels=3", "--checkpoint="], "checkpoint must not be empty"),
        (["--labels=3", "--out="], "out must not be empty"),
        (["--labels=3", "--seed=-1"], "seed must be a whole number in 0 .. 4294967295, got -1"),
        (["--labels=3", "--cfg_scale=nan"], "cfg_scale must be finite, got nan"),
        (["--labels=3", "--eta=inf"], "eta must be finite, got inf"),
        (
            ["--labels=3", "--eta=1", "--sampler=ddpm"],
            "eta must be left at 0 for ddpm, which does not use it",
        ),
        ([], "--labels must be given, or --labels_file or --interpolate instead of it, got none"),
        (
            ["--labels=3", "--labels_file=x"],
            "or --interpolate instead of it, got labels and labels_file",
        ),
        (["--labels_file=nowhere.txt"], "labels_file must be a file that exists, got nowhere.txt"),
        (["--labels_file="], "labels_file must not be empty"),
        (
            ["--labels=3", "--num_samples=0"],
            "num_samples must be a whole number of at least 1, got 0",
        ),
        (
            ["--labels=3", "--num_samples=99999999999999"],
            "num_samples must be of images that fit into the memory of this host, ",
        ),
        (
            ["--labels=3", "--weights", "--seed=1"],
            "--weights must be one of ema, params, got '--seed=1'",
        ),
        (["--vae", "--labels=3"], "vae must have a value, got --labels=3"),
        (["--labels=3", "--vae", "--seed=1"], "vae must have a value, got --seed=1"),
        (
            ["--labels=3", "--out=images.jpg"],
            "out must end with .png or .npz, or be a new folder, got i",
        ),
        (["--labels=3", "--out=no/where.png"], "out must be in a directory that exists, got"),
        (["--labels=3", "--num_steps=0"], "num_steps must be in 2 .. 1000, got '0'"),
        (["--labels=3", "--num_steps=-9"], "num_steps must be a whole number"),
        (["--labels=3", "--cfg_channels=4"], "cfg_channels must be in 0 .. 1, got 4"),
        (["--labels=3", "--cfg_scale=-2"], "cfg_scale must be at least 0, got -2.0"),
        (
            ["--labels=3", "--cfg_interval=5"],
            "cfg_interval must be two numbers, first <= last, got (5.0,)",
        ),
        (["--labels=3", "--cfg_interval=a,b"], "cfg_interval must be two numbers, as 0,500, got"),
        (
            ["--labels=3", "--cfg_interval=9,1000"],
            "cfg_interval must be first <= last in 0 .. 999, got",
        ),
        (["--labels=3", "--clip_x0=maybe"], "clip_x0 must be true or false, got 'maybe'"),
        (["--labels=3", "--cfg_scale=1e38", "--noclip_x0"], "samples must be finite, got NaN"),
        (
            ["--labels=3", "--sampler=plms"],
            "--sampler must be one of ddpm, ddim, euler, heun, sde, dpm2m, unipc, got 'plms'",
        ),
        (["--labels=3", "--num_steps=1"], "num_steps must be in 2 .. 1000, got '1'"),
        (["--labels=3", "--num_steps=9,9"], "num_steps must be times that descend, got 9,9"),
        (["--labels=3", "--num_steps=9,"], "num_steps must be a whole number, as"),
        (
            ["--labels=3", "--num_steps=1000,9"],
            "num_steps must be whole steps in 0 .. 999, got 1000,9",
        ),
        (
            ["--labels=3", "--spacing=leading", "--num_steps=ddim5"],
            "spacing must be auto for num_steps ddim5, got leading",
        ),
        (["--labels=3", "--spacing=even"], "--spacing must be one of auto, linspace, leading, "),
        (
            ["--labels=3", "--shift=2"],
            "shift must be 0 for process ddpm, which counts steps, got 2",
        ),
        (["--labels=3", "--shift=-1"], "shift must be at least 0, got -1.0"),
        (
            ["--labels=3", "--sde_noise=constant", "--sampler=sde"],
            "sde_noise must be sigma or sbdm for process ddpm, which has no path, got constant",
        ),
        (
            ["--labels=3", "--sde_noise=sbdm"],
            "sde_noise must be left at sigma for ddim, which does not use it, got sbdm",
        ),
        (
            ["--labels=3", "--sde_last=0.1", "--sampler=sde"],
            "sde_last must be 0.04 unless a path has equal steps, got 0.1",
        ),
        (["--labels=3", "--sde_last=1"], "sde_last must be in [0, 1), got 1.0"),
        (["--labels=3", "--cache=every:4"], "cache must be every:N with N in 1 .. 3 for 4 steps"),
        (["--labels=3", "--cache=often"], 'cache must be none, "every:3", "every:3:10-40" or'),
        (["--labels=3", "--cache_order=2"], "cache_order needs a cache, as --cache=every:3, got 2"),
        (["--labels=3", "--cache_fit=chebyshev"], "cache_fit needs a cache, as --cache=every:3"),
        (["--labels=3", "--cache_order=4"], "cache_order must be in 0 .. 3, got 4"),
        (
            ["--labels=3", "--cache_guidance=every:2", "--cfg_scale=1"],
            "cache_guidance must be none without guidance, whose cfg_scale is 1, got every:2",
        ),
        (["--calibrate=1"], "calibrate must be a number of steps in 2 .. 4, or a threshold above"),
        (["--calibrate=5"], "calibrate must be a number of steps in 2 .. 4, or a threshold above"),
        (["--calibrate=3", "--cache=every:2"], "--cache must be left out with --calibrate, got"),
        (["--calibrate=3", "--out=x.png"], "out must end with .json for --calibrate, got x.png"),
        (["--labels=3", "--cfg_schedule=up"], "--cfg_schedule must be one of constant, linear, "),
        (
            ["--labels=3", "--batch_size=0"],
            "batch_size must be a whole number of at least 1, got 0",
        ),
        (["--labels=3", "--checkpoint=/nowhere"], "must be a directory with a saved step, got"),
    ],
)
def test_wrong_use_is_one_line(refuse, checkpoint, args, message):
    assert message in refuse(sample, f"--checkpoint={checkpoint}", *args)
