"""Runs of pixel transformers: all parts of JiT and its objective, from training to refusals."""

import jax
import numpy as np
import pytest
from PIL import Image

import dit_jax
from configs import jit256, pixels
from dit_jax.cli import convert, plan, prepare, train
from dit_jax.data import feed
from dit_jax.data import fields as data_fields
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.runs import build, fields, record

PARTS = (
    *("--config.model.norm=rms", "--config.model.mlp=swiglu", "--config.model.position=rope"),
    *("--config.model.qk_norm=true", "--config.model.bottleneck=5"),
    *("--config.model.class_tokens=3", "--config.model.class_tokens_from=1"),
)
OBJECTIVE = (
    *("--config.diffusion.process=linear", "--config.diffusion.prediction=x0"),
    *("--config.diffusion.weight=velocity", "--config.diffusion.noise_scale=2"),
    *("--config.diffusion.time=logit_normal", "--config.diffusion.time_mean=0.8"),
    *("--config.sampling.sampler=heun", "--config.sampling.num_steps=3"),
    "--config.sampling.cfg_interval=0.0,0.9",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The flags of a small run, and its workdir."""
    workdir = tmp_path_factory.mktemp("pixels") / "run"
    flags = ("--config=configs/digits.py:Pi/4", f"--workdir={workdir}", *PARTS, *OBJECTIVE)
    ends = ("total_steps=40", "checkpoint_every=40", "sample_every=40", "log_every=10")
    flags += tuple(f"--config.run.{each}" for each in ends)
    steps = ("--config.train.warmup_steps=0", "--config.train.decay_steps=0")
    return (*flags, *steps, "--config.run.num_samples=8"), workdir


@pytest.fixture
def run(trained, call):
    """The workdir, trained by the first test that asks for it."""
    flags, workdir = trained
    if not workdir.exists():
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
            code, _, text = call(train, *flags)
        assert code == 0, text
    return workdir


def test_all_parts_and_the_objective_train_and_sample(run):
    losses = [each["loss"] for each in record.read(run / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    model = dit_jax.load(run)
    assert model.config.mlp == "swiglu" and model.process.noise_scale == 2
    images = model.sample([3, 1])
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8
    # The noise that a user gives is x at t = 1, whose deviation is 2.
    noise = np.float32(2 * np.random.default_rng(0).standard_normal((2, 8, 8, 1)))
    assert model.sample([3, 1], noise=noise).shape == images.shape


@pytest.mark.parametrize(
    "target, name",
    [
        (("to-torch", "x.pt"), "norm must be layer for PyTorch, as in the paper's DiT, got rms"),
        (("to-torch", "x", "--bundle"), "norm must be layer for PyTorch, as in the paper's DiT"),
        (("to-diffusers", "x"), "norm must be layer for PyTorch, as in the paper's DiT, got rms"),
    ],
)
def test_a_conversion_is_refused_by_name(run, call, tmp_path, target, name):
    command, out, *flags = target
    code, _, text = call(convert, command, *flags, run, tmp_path / out)
    assert (code, text.count("\n")) == (2, 1) and name in text
    assert not (tmp_path / out).exists()


def test_a_card_is_written(run, call, tmp_path):
    code, _, text = call(convert, "card", run, tmp_path / "README.md")
    assert code == 0, text
    assert "norm rms" in (tmp_path / "README.md").read_text()


def test_a_pixel_model_with_a_vae_is_refused():
    config = jit256.get_config()
    config.data.path, config.data.vae = "data", "vae"
    message = "^data.vae must be '' where there are no latents, got 'vae'$"
    with pytest.raises(UserError, match=message):
        data_fields.check(build.read(config).data)


@pytest.mark.parametrize("size", ["B", "L", "H", "G"])
def test_jit256_has_the_parts_of_its_size(size):
    settings = build.read(jit256.get_config(f"{size}/16"))
    fields.check(settings)
    model = dit.configure(**vars(settings.model))
    table = {"B": (128, 4), "L": (128, 8), "H": (256, 10), "G": (256, 10)}
    assert (model.bottleneck, model.class_tokens_from) == table[size]
    assert (model.class_tokens, model.num_tokens, model.learn_sigma) == (32, 256, False)


def test_jit256_trains_on_prepared_pictures(call, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (300, 280, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    assert call(prepare, tmp_path / "pictures", tmp_path / "data")[0] == 0
    config = jit256.get_config()
    config.data.path, config.model.num_classes = str(tmp_path / "data"), 2
    example = feed.make(build.read(config)).source[0]
    assert example["image"].shape == (256, 256, 3) and example["image"].dtype == np.uint8


@pytest.mark.slow
def test_a_training_step_is_planned(call):
    flags = ("--config=configs/jit256.py", "--config.model.size=Pi", "--config.model.patch_size=64")
    flags += ("--config.model.class_tokens_from=1",)
    with jax.numpy_dtype_promotion("standard"):
        code, out, text = call(plan, *flags, "--config.train.batch_size=8", "--topology=v5e:2x2")
    assert (code, text) == (0, "")
    assert "4 x TPU v5 lite" in out


@pytest.mark.parametrize("patch, bottleneck", [(7, 16), (4, 5)])
def test_pixels_narrows_the_way_in(patch, bottleneck):
    settings = build.read(pixels.get_config(f"Ti/{patch}"))
    fields.check(settings)
    assert settings.model.bottleneck == bottleneck
