"""dit-train --dry_run: says what a run would do and writes nothing."""

import numpy as np
import pytest
import small_run
from PIL import Image

from dit_jax.cli import train
from dit_jax.data import digits
from dit_jax.sampling import pictures

SMALL = [*small_run.SMALL, "--config.train.accumulation_steps=1"]


def test_a_dry_run_describes_the_run_and_writes_only_the_picture(call, tmp_path):
    workdir, picture = tmp_path / "run", tmp_path / "batch.png"
    flags = (f"--workdir={workdir}", "--dry_run", f"--picture={picture}")
    code, out, _ = call(train, *small_run.SMALL, *flags)
    assert code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]
    lines = out.splitlines()
    for line in (
        *("seed = 0", "model.size = Pi", "train.batch_size = 64", "run.total_steps = 60"),
        "devices: 8 x cpu; mesh: data 8, fsdp 1, tensor 1",
        "data: 1,500 examples, 23.4 batches per epoch, 2.6 epochs in 60 steps",
        f"picture of the first batch: {picture}",
    ):
        assert line in lines
    text = "\n".join(lines)
    assert "model: Pi/4, " in text and "FLOPs: " in text
    assert "first batch: x0 (64, 8, 8, 1) in model units: mean -0.3" in text
    assert "from -1.000 to 1.000" in text and "first batch: 10 classes: " in text
    assert "memory of each of 8 x cpu: " in text and " of temporaries" in text
    with Image.open(picture) as image:
        assert image.mode == "L"
        array = np.asarray(image)
    # the first image is one of the training images
    shown = array[pictures.TITLE_HEIGHT : pictures.TITLE_HEIGHT + 64 : 8, :64:8]
    assert (digits.load(())[0].image[..., 0] == shown).all(axis=(1, 2)).any()


def test_a_dry_run_leaves_a_run_as_it_is(call, tmp_path, reference):
    def state():
        return {path: path.stat().st_mtime_ns for path in sorted(reference.rglob("*"))}

    before = state()
    code, out, _ = call(train, reference, "--dry_run")
    assert code == 0 and "memory of each of " in out
    assert f"{reference} is trained already: it is at step {small_run.LAST}, and" in out
    code, out, _ = call(train, reference, "--dry_run", "--config.run.total_steps=99")
    assert code == 0 and f"resumes from step {small_run.LAST}" in out.splitlines()
    assert state() == before


def test_a_dry_run_says_what_a_new_run_takes_from_its_origin(call, tmp_path, reference):
    flags = (f"--workdir={tmp_path}/new", "--dry_run", f"--init_from={reference}")
    code, out, _ = call(train, *SMALL, *flags, "--config.diffusion.process=linear")
    assert code == 0
    lines = out.splitlines()
    assert f"starts from step {small_run.LAST} of {reference} (ema):" in lines
    assert any(line.startswith("  diffusion.process: ddpm before, linear now") for line in lines)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--picture=x.png"], "picture must be left out without --dry_run, got x.png"),
        (["--dry_run", "--picture=x.jpg"], "picture must end with .png, got x.jpg"),
        (["--dry_run", "--picture=no/x.png"], "picture must be in a directory that exists, got no"),
        (
            ["--dry_run", "--picture=x.png", "--config.data.source=synthetic"]
            + ["--config.data.space=latents"],
            "picture must be left out for data that are no images, got x.png: latents need",
        ),
        (["--dry_run", "--config.train.batch_size=9"], "train.batch_size must be divisible by 8"),
    ],
)
def test_wrong_use_of_a_dry_run_is_one_line(refuse, tmp_path, args, message):
    line = refuse(train, *SMALL, f"--workdir={tmp_path}/run", *args)
    assert message in line and not (tmp_path / "run").exists()
