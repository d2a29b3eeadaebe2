"""From a tree of images to decoded samples: prepare, train, sample with one command each."""

import json
import subprocess
import sys

import jax
import numpy as np
import pictures
import pytest
from PIL import Image

from dit_jax.cli import prepare, sample, train
from dit_jax.data import latents, loader
from dit_jax.models import vae
from dit_jax.sampling import autoencoder
from dit_jax.train import step as steps

NARROW = vae.VAEConfig(channels=(8, 16, 16), num_resnets=1, num_groups=4, scale=(1.0,))
OPTIONS = (
    "--config=configs/imagenet256.py:Ti/2",
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
def places(tmp_path_factory):
    """A folder with a tree of images, `tree`, and an autoencoder, `vae`."""
    path = tmp_path_factory.mktemp("images")
    pictures.draw(path / "tree")
    params = jax.jit(vae.init, static_argnums=0)(NARROW, jax.random.key(0))
    autoencoder.save(path / "vae", NARROW, params)
    return path


def test_one_command_each_from_files_to_decoded_samples(call, caplog, places):
    data, run, encoder = places / "data", places / "run", f"--vae={places}/vae"
    assert call(prepare, places / "tree", data, "--num_shards=2")[0] == 0
    options = (*OPTIONS, f"--config.data.path={data}", f"--config.data.vae={places}/vae")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        code, _, errors = call(train, *options, f"--workdir={run}", "--config.run.total_steps=4")
    assert code == 0, errors
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
    with Image.open(run / "samples" / "0000004.png") as image:
        assert image.mode == "RGB"
    usual = (f"--checkpoint={run}", "--labels=0,1,2", encoder)
    assert call(sample, *usual, f"--out={places}/x.npz")[0] == 0
    images = np.load(places / "x.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    params = jax.jit(vae.init, static_argnums=0)(NARROW, jax.random.key(0))
    for part, warns in (("decoder", False), ("encoder", True)):
        changed = params | {part: jax.tree.map(lambda x: x + 1, params[part])}
        autoencoder.save(places / part, NARROW, changed)
        usual = (f"--checkpoint={run}", "--labels=0", f"--vae={places}/{part}")
        assert call(sample, *usual, f"--out={places}/y.npz")[0] == 0
        assert ("is not the one that encoded for" in caplog.text) == warns


def test_pixels_of_images_need_no_autoencoder(call, places):
    call(prepare, places / "tree", places / "data", "--num_shards=2")
    options = (
        *(*OPTIONS, f"--config.data.path={places}/data", "--config.data.space=pixels"),
        *("--config.model.in_channels=3", "--config.sampling.clip_x0=true"),
        f"--workdir={places}/pixels",
    )
    with jax.numpy_dtype_promotion("standard"):
        code, _, errors = call(train, *options, "--config.run.total_steps=2")
    assert code == 0, errors


def test_no_command_of_training_brings_torch_or_tensorflow(places):
    code = (
        "import sys, tensorflow_datasets\n"
        "from dit_jax.cli import encode, prepare, sample, train\n"
        "from dit_jax.data import imagefolder, records, shards\n"
        f"shards.write({str(places / 'alone')!r}, 'train', "
        f"imagefolder.scan({str(places / 'tree')!r}))\n"
        f"records.open_images({str(places / 'alone')!r}, 'train', 16)[0]\n"
        "print(sorted({'torch', 'tensorflow', 'diffusers'} & sys.modules.keys()))\n"
    )
    # A worker process of dit-prepare starts by importing this file: it must be a file.
    (places / "alone.py").write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")
    out = subprocess.run([sys.executable, places / "alone.py"], capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "data.path must be given: what dit-prepare or dit-encode wrote; or train on"),
        (["--config.data.path={data}"], "data.vae must be given: what `dit-convert vae` wrote"),
        (
            ["--config.data.path=/nowhere", "--config.data.vae={vae}"],
            "dataset must be a directory of dit-prepare or tensorflow-datasets, got /nowhere",
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
            "model.input_size and in_channels must be (4, 4, 4) for images, got (4, 8, 4)",
        ),
        (
            ["--config.data.path={data}", "--config.data.space=pixels"],
            "model.input_size and in_channels must be (4, 4, 3) for images, got (4, 4, 4)",
        ),
        (
            ["--config.data.source=synthetic", "--config.data.vae={vae}"],
            "data.vae must be '' where there are no latents, got",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(call, refuse, places, tmp_path, options, message):
    call(prepare, places / "tree", places / "data", "--num_shards=2")
    options = [option.format(data=places / "data", vae=places / "vae") for option in options]
    given = {option.split("=")[0] for option in options}  # a tuple given twice is one longer
    usual = [option for option in OPTIONS if option.split("=")[0] not in given]
    assert message in refuse(train, *usual, *options, f"--workdir={tmp_path}/run")
    assert list(tmp_path.iterdir()) == []


def run(name, *args):
    subprocess.run([sys.executable, "-m", f"dit_jax.cli.{name}", *map(str, args)], check=True)


@pytest.fixture(scope="module")
def thousands(places, tmp_path_factory):
    """2,400 images of 8 classes, prepared, `data`, and encoded, `cache`."""
    path = tmp_path_factory.mktemp("thousands")
    pictures.draw(path / "tree", num_classes=8, per_class=300, low=24, high=120)
    run("prepare", path / "tree", path / "data", "--num_shards=8")
    run("encode", path / "data", path / "cache", "--size=32", f"--vae={places}/vae")
    return path


@pytest.mark.slow
def test_thousands_of_images_train_alike_from_the_cache_and_from_the_files(places, thousands):
    losses = {}
    for source, data in (("images", "data"), ("latents", "cache")):
        workdir = thousands / f"run_{source}"
        run(
            "train",
            *("--config=configs/imagenet256.py:S/2", "--config.model.input_size=(8, 8)"),
            *("--config.model.num_classes=8", "--config.compute.dtype=float32"),
            *(f"--config.data.source={source}", f"--config.data.path={thousands / data}"),
            *(f"--config.data.vae={places}/vae", "--config.train.batch_size=32"),
            *("--config.run.total_steps=150", "--config.run.log_every=10"),  # two epochs
            *("--config.run.num_samples=8", "--config.sampling.num_steps=10"),
            f"--workdir={workdir}",
        )
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[source] = np.array([line["loss"] for line in lines])
    np.testing.assert_allclose(losses["images"], losses["latents"], rtol=2e-3)
    assert losses["latents"][-1] < 0.8 * losses["latents"][0]
    usual = (f"--checkpoint={thousands}/run_latents", f"--vae={places}/vae", "--num_steps=10")
    run("sample", *usual, "--labels=0,1,2,3,4,5,6,7", f"--out={thousands}/grid.png")
    run("sample", *usual, "--labels=0,1", f"--out={thousands}/samples.npz")
    with np.load(thousands / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 32, 32, 3) and file["arr_0"].dtype == np.uint8


@pytest.mark.slow
def test_over_many_epochs_flips_are_balanced_and_the_posterior_is_drawn_anew(thousands):
    cache, epochs = latents.open_latents(thousands / "cache"), 30
    plain = [cache[i]["moments"] for i in range(2400)]
    ways = {x.tobytes(): (i, flip) for i, pair in enumerate(plain) for flip, x in enumerate(pair)}
    options = {"batch_size": 80, "seed": 0, "start": 0, "augment": latents.pick_at_random}
    share = loader.part(cache, **options, rows=list(range(80)))
    flips, noise = np.zeros(2400), []
    for step in range(epochs * 30):
        batch = share[step]
        places = [ways[x.tobytes()] for x in batch["moments"]]
        for i, flip in places:
            flips[i] += flip
        x0 = steps.to_x0(batch, jax.random.fold_in(jax.random.key(0), step))
        mean, log_variance = np.split(batch["moments"], 2, axis=-1)
        drawn = (x0 - mean) / np.exp(log_variance / 2)
        noise += [drawn[k] for k, (i, _) in enumerate(places) if i == 7]  # once in every epoch
    assert abs(flips.mean() / epochs - 0.5) < 0.01  # 72,000 draws: five standard deviations
    assert abs(flips.var() / (epochs / 4) - 1) < 0.15  # no example has a way of its own
    assert len(noise) == epochs
    matrix = np.corrcoef(np.stack(noise).reshape(epochs, -1))
    assert np.abs(matrix - np.eye(epochs)).max() < 0.4  # 256 numbers: six standard deviations
    assert abs(np.std(noise) - 1) < 0.05
