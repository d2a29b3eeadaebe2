"""From a folder of images to decoded samples: prepare, train and sample, one command each."""

import json
import subprocess
import sys

import jax
import numpy as np
import pictures
import pytest
from PIL import Image

import dit_jax
from dit_jax.cli import prepare, sample, train
from dit_jax.data import latents, loader
from dit_jax.models import vae
from dit_jax.sampling import autoencoder
from dit_jax.sampling import pictures as pictures_lib
from dit_jax.train import step as steps

NARROW = vae.VAEConfig(channels=(8, 16, 16), num_resnets=1, num_groups=4, scale=(1.0,))
OPTIONS = (
    "--config=configs/imagenet256.py:Pi/2",
    "--config.model.input_size=(4, 4)",
    "--config.model.num_classes=3",
    "--config.compute.dtype=float32",
    "--config.train.batch_size=8",
    "--config.sampling.num_steps=4",
    "--config.run.log_every=2",
    "--config.run.sample_every=4",
    "--config.run.num_samples=3",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a folder tree of images, `tree`, and an autoencoder, `vae`."""
    path = tmp_path_factory.mktemp("images")
    pictures.draw(path / "tree")
    params = jax.jit(vae.init, static_argnums=0)(NARROW, jax.random.key(0))
    autoencoder.save(path / "vae", NARROW, params)
    return path


def test_files_to_decoded_samples_with_one_command_each(call, caplog, root):
    data, run, encoder = root / "data", root / "run", f"--vae={root}/vae"
    assert call(prepare, root / "tree", data, "--num_shards=2")[0] == 0
    options = (*OPTIONS, f"--config.data.path={data}", f"--config.data.vae={root}/vae")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        code, _, errors = call(train, *options, f"--workdir={run}", "--config.run.total_steps=4")
    assert code == 0, errors
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
    with Image.open(run / "samples" / "0000004.png") as image:
        size = 3 * (64 + 4) - 4, 64 + pictures_lib.TITLE_HEIGHT  # a column for each class
        assert image.mode == "RGB" and image.size == size
    assert dit_jax.load(run).class_names == ("c0", "c1", "c2")  # of the folders
    common = (f"--checkpoint={run}", "--labels=c0,c1,c2", encoder)
    assert call(sample, *common, f"--out={root}/x.npz")[0] == 0
    images = np.load(root / "x.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    params = jax.jit(vae.init, static_argnums=0)(NARROW, jax.random.key(0))
    for part, warns in (("decoder", False), ("encoder", True)):
        changed = params | {part: jax.tree.map(lambda x: x + 1, params[part])}
        autoencoder.save(root / part, NARROW, changed)
        common = (f"--checkpoint={run}", "--labels=0", f"--vae={root}/{part}")
        assert call(sample, *common, f"--out={root}/y.npz")[0] == 0
        assert ("is not the one whose latents" in caplog.text) == warns


@pytest.mark.slow  # runs/test_pixels.py and launch/test_notebook_train.py train on pixels too
def test_training_on_pixels_needs_no_autoencoder(call, root):
    call(prepare, root / "tree", root / "data", "--num_shards=2")
    options = (
        *(*OPTIONS, f"--config.data.path={root}/data", "--config.data.space=pixels"),
        *("--config.model.in_channels=3", "--config.sampling.clip_x0=true"),
        f"--workdir={root}/pixels",
    )
    with jax.numpy_dtype_promotion("standard"):
        code, _, errors = call(train, *options, "--config.run.total_steps=2")
    assert code == 0, errors


def test_training_commands_import_neither_torch_nor_tensorflow(root):
    code = (
        "import sys, tensorflow_datasets\n"
        "from dit_jax.cli import encode, prepare as command, sample, train\n"
        "from dit_jax.data import imagefolder, prepare, prepared\n"
        f"prepare.write({str(root / 'alone')!r}, 'train', "
        f"imagefolder.scan({str(root / 'tree')!r}))\n"
        f"prepared.open_images({str(root / 'alone')!r}, 'train', 16)[0]\n"
        "print(sorted({'torch', 'tensorflow', 'diffusers'} & sys.modules.keys()))\n"
    )
    # Each worker process imports the main module, so that must be a file.
    (root / "alone.py").write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")
    out = subprocess.run([sys.executable, root / "alone.py"], capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "data.path must be given: what dit-prepare or dit-encode wrote; or train on"),
        (["--config.data.path={data}"], "data.vae must be given: what `dit-convert vae` wrote"),
        (
            ["--config.data.path=/nowhere", "--config.data.vae={vae}"],
            "data.path must exist, got /nowhere",
        ),
        (
            ["--config.data.path={data}", "--config.data.vae=/nowhere"],
            "vae must be a folder that `dit-convert vae` wrote, got /nowhere",
        ),
        (
            [
                "--config.data.path={data}",
                "--config.data.vae={vae}",
                "--config.model.num_classes=9",
            ],
            "model.num_classes must be 3 for images, got 9",
        ),
        (
            ["--config.data.path={data}", "--config.data.vae={vae}", "--config.data.split=x"],
            "split must be one of train, got 'x'",
        ),
        (
            [
                "--config.data.path={data}",
                "--config.data.vae={vae}",
                "--config.model.in_channels=8",
            ],
            "data.vae must have 8 latent channels, got 4",
        ),
        (
            [
                *("--config.data.path={data}", "--config.data.vae={vae}"),
                "--config.model.input_size=(4, 8)",
            ],
            "model.input_size must be (4, 4) for images, got (4, 8)",
        ),
        (
            ["--config.data.path={data}", "--config.data.space=pixels"],
            "model.in_channels must be 3 for images, got 4",
        ),
        (
            ["--config.data.source=synthetic", "--config.data.path={data}"],
            "data.path must be '' for synthetic, which reads none, got",
        ),
        (
            ["--config.data.source=synthetic", "--config.data.vae={vae}"],
            "data.vae must be '' where there are no latents, got",
        ),
    ],
)
def test_config_that_does_not_fit_the_data_prints_one_line(
    call, refuse, root, tmp_path, options, message
):
    call(prepare, root / "tree", root / "data", "--num_shards=2")
    options = [option.format(data=root / "data", vae=root / "vae") for option in options]
    given = {option.split("=")[0] for option in options}  # giving a tuple twice would append to it
    defaults = [option for option in OPTIONS if option.split("=")[0] not in given]
    assert message in refuse(train, *defaults, *options, f"--workdir={tmp_path}/run")
    assert list(tmp_path.iterdir()) == []


def run(name, *args):
    subprocess.run([sys.executable, "-m", f"dit_jax.cli.{name}", *map(str, args)], check=True)


@pytest.fixture(scope="module")
def thousands(root, tmp_path_factory):
    """A folder with 2,400 images of 8 classes: prepared, `data`, and encoded, `cache`."""
    path = tmp_path_factory.mktemp("thousands")
    pictures.draw(path / "tree", num_classes=8, per_class=300, low=24, high=120)
    run("prepare", path / "tree", path / "data", "--num_shards=8")
    run("encode", path / "data", path / "cache", "--size=32", f"--vae={root}/vae")
    return path


@pytest.mark.slow
def test_losses_from_the_cache_match_losses_from_the_images(root, thousands):
    losses = {}
    for source, data in (("images", "data"), ("latents", "cache")):
        workdir = thousands / f"run_{source}"
        run(
            "train",
            *("--config=configs/imagenet256.py:S/2", "--config.model.input_size=(8, 8)"),
            *("--config.model.num_classes=8", "--config.compute.dtype=float32"),
            *(f"--config.data.source={source}", f"--config.data.path={thousands / data}"),
            *(f"--config.data.vae={root}/vae", "--config.train.batch_size=32"),
            *("--config.run.total_steps=150", "--config.run.log_every=10"),  # two epochs
            *("--config.run.num_samples=8", "--config.sampling.num_steps=10"),
            f"--workdir={workdir}",
        )
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[source] = np.array([line["loss"] for line in lines])
    np.testing.assert_allclose(losses["images"], losses["latents"], rtol=2e-3)
    assert losses["latents"][-1] < 0.8 * losses["latents"][0]
    common = (f"--checkpoint={thousands}/run_latents", f"--vae={root}/vae", "--num_steps=10")
    run("sample", *common, "--labels=0,1,2,3,4,5,6,7", f"--out={thousands}/grid.png")
    run("sample", *common, "--labels=0,1", f"--out={thousands}/samples.npz")
    with np.load(thousands / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3) and file["arr_0"].dtype == np.uint8


@pytest.mark.slow
def test_flips_and_posterior_noise_are_drawn_anew_in_every_epoch(thousands):
    cache, epochs = latents.open_latents(thousands / "cache"), 30
    plain = [cache[i]["moments"] for i in range(2400)]
    pairs = {x.tobytes(): (i, flip) for i, pair in enumerate(plain) for flip, x in enumerate(pair)}
    options = {"batch_size": 80, "seed": 0, "start": 0, "augment": latents.pick_at_random}
    share = loader.part(cache, **options, rows=list(range(80)))
    flips, noise = np.zeros(2400), []
    for step in range(epochs * 30):
        batch = share[step]
        indices = [pairs[x.tobytes()] for x in batch["moments"]]
        for i, flip in indices:
            flips[i] += flip
        x0 = steps.to_x0(
            {"posterior": batch["moments"]}, jax.random.fold_in(jax.random.key(0), step)
        )
        mean, log_variance = np.split(batch["moments"], 2, axis=-1)
        drawn = (x0 - mean) / np.exp(log_variance / 2)
        noise += [drawn[k] for k, (i, _) in enumerate(indices) if i == 7]  # once per epoch
    assert abs(flips.mean() / epochs - 0.5) < 0.01  # 72,000 draws: five standard deviations
    assert abs(flips.var() / (epochs / 4) - 1) < 0.15  # no example prefers one side
    assert len(noise) == epochs
    matrix = np.corrcoef(np.stack(noise).reshape(epochs, -1))
    assert np.abs(matrix - np.eye(epochs)).max() < 0.4  # 256 numbers: six standard deviations
    assert abs(np.std(noise) - 1) < 0.05
