"""From a folder of one's own pictures to samples, by the commands of dit_jax/data/README.md.

They run in a folder that has nothing to do with the clone.
"""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pictures
import pytest
import stable_diffusion
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
README = ROOT / "dit_jax" / "data" / "README.md"
HEADING = "## Your own pictures"
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
        assert image.width > 3 * 64
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
