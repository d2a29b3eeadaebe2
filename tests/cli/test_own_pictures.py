"""From a folder of one's own pictures to samples, by the commands of dit_jax/data/README.md.

They run in a folder that has nothing to do with the clone.
"""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pictures
import pytest
import stable_diffusion
import torch
from PIL import Image
from sklearn.svm import SVC

from dit_jax.data import images

ROOT = Path(__file__).parents[2]
README = ROOT / "dit_jax" / "data" / "README.md"
HEADING = "## Your own pictures"
SIZE = 24  # of the pictures that a model sees
TINY = (  # seconds instead of minutes
    *("--config.run.total_steps=2", "--config.train.batch_size=8", "--config.run.num_samples=6"),
    "--config.sampling.num_steps=ddim2",
)


def read_commands(number):
    """The commands in block `number` of the README's section, each as a list of words."""
    section = README.read_text().split(f"{HEADING}\n")[1].split("\n## ")[0]
    block = section.split("```bash\n")[number + 1].split("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0] for line in lines]


def run(command, folder, *more):
    """Runs a line of the README in a folder, with the modules of this clone."""
    functions = "".join(
        f'dit-{name}() {{ "{sys.executable}" -m dit_jax.cli.{name} "$@"; }}\n'
        for name in ("prepare", "convert", "encode", "train", "sample")
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = " ".join([command, *more])
    done = subprocess.run(
        ["bash", "-c", functions + line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (line, done.stderr)


def outlines(pictures_of_shapes):
    """Where each picture (H, W, 3) differs from its ground, cut out and 16 x 16: (N, 256)."""
    rows = []
    for image in np.asarray(pictures_of_shapes, np.float64):
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        distance = np.abs(image - np.median(edge, axis=0)).max(axis=-1)
        mask = distance > 0.5 * distance.max()
        top, bottom = np.flatnonzero(mask.any(axis=1))[[0, -1]]
        left, right = np.flatnonzero(mask.any(axis=0))[[0, -1]]
        cut = Image.fromarray(mask).crop((left, top, right + 1, bottom + 1)).convert("L")
        rows.append(np.asarray(cut.resize((16, 16), Image.Resampling.BOX)).ravel() / 255)
    return np.stack(rows)


def read_all(paths):
    return [images.center_crop(images.decode(path.read_bytes()), SIZE) for path in sorted(paths)]


def fit_classifier(folder):
    """A classifier of shapes, blind to colour, size and place; label i is the i-th class."""
    train = [read_all((folder / name).iterdir()) for name in sorted(pictures.SHAPES)]
    labels = np.repeat(np.arange(len(train)), [len(part) for part in train])
    return SVC(C=10).fit(outlines(np.concatenate(train)), labels)


def test_the_classifier_of_shapes_is_right(tmp_path):
    pictures.draw_shapes(tmp_path / "all", per_class=60)
    for i, path in enumerate(sorted((tmp_path / "all").glob("*/*.png"))):
        target = tmp_path / ("train" if i % 2 else "held out") / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    classifier = fit_classifier(tmp_path / "train")
    held_out = [read_all((tmp_path / "held out" / name).iterdir()) for name in pictures.SHAPES]
    for label, part in enumerate(held_out):
        assert (classifier.predict(outlines(part)) == label).mean() >= 0.96


@pytest.mark.slow
def test_the_commands_of_the_readme_work_in_any_folder(tmp_path):
    """From pictures to samples with two steps of training."""
    pictures.draw_shapes(tmp_path / "pictures", per_class=4)
    prepare, train, *samples = read_commands(0)
    run(prepare, tmp_path)
    run(train, tmp_path, *TINY)
    for sample in samples:
        run(sample, tmp_path)
    assert len(list((tmp_path / "stars").iterdir())) == 100
    with Image.open(tmp_path / "shapes.png") as image:
        assert image.width > 3 * 2 * SIZE  # three columns, enlarged
    assert len(list((tmp_path / "runs/shapes/samples").iterdir())) == 1


@pytest.mark.slow
def test_the_commands_for_latents_work_with_an_autoencoder_of_stable_diffusion(tmp_path):
    pictures.draw_shapes(tmp_path / "pictures", per_class=4)
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),  # 8 times smaller, like Stable Diffusion's
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    original = stable_diffusion.original(model.state_dict(), prefix="first_stage_model.")
    torch.save({"state_dict": original}, tmp_path / "model.ckpt")
    run(read_commands(0)[0], tmp_path)
    convert, encode, train, sample = read_commands(1)
    (tmp_path / "runs").mkdir()  # which the first training has made
    run(convert, tmp_path)
    run(encode, tmp_path, "--size=64")
    run(train, tmp_path, *TINY)
    run(sample, tmp_path)
    with Image.open(tmp_path / "latents.png") as image:
        assert image.mode == "RGB" and image.width > 3 * 64


@pytest.mark.slow
def test_samples_show_the_shape_that_was_asked_for(tmp_path):
    pictures.draw_shapes(tmp_path / "pictures")
    for command in read_commands(0):
        run(command, tmp_path)
    classifier = fit_classifier(tmp_path / "pictures")
    requested = np.resize(np.arange(3), 99)
    names = ",".join(sorted(pictures.SHAPES))
    sample = f'dit-sample --checkpoint=runs/shapes --labels="{names}" --num_samples=99'
    run(sample, tmp_path, "--out=samples.npz", "--seed=1")
    with np.load(tmp_path / "samples.npz") as file:
        found = classifier.predict(outlines(file["arr_0"]))
    assert (found == requested).mean() >= 0.95
    stars = read_all((tmp_path / "stars").iterdir())
    found = classifier.predict(outlines(stars))
    assert (found == sorted(pictures.SHAPES).index("green star")).mean() >= 0.95
