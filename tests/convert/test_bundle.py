"""A bundle samples with PyTorch alone, without JAX or dit_jax, and matches our samples."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.convert import bundle, native, torch_dit
from dit_jax.diffusion import processes, samplers, schedules
from dit_jax.errors import UserError
from dit_jax.evals import digits
from dit_jax.machine import sharding
from dit_jax.models import dit
from dit_jax.sampling import generate

ALONE = """
import sys
for name in ("jax", "flax", "dit_jax", "diffusers"):
    sys.modules[name] = None  # makes the import fail
import numpy as np
import dit
labels, noise, options = np.load(sys.argv[1]), np.load(sys.argv[2]), eval(sys.argv[3])
images = dit.load(".").sample(labels.tolist(), noise=noise, **options)
np.save(sys.argv[4], np.asarray(images))
"""


def sample_alone(folder, labels, noise, options):
    """Samples a bundle in a separate process without JAX; noise (S + 1, N, H, W, C)."""
    np.save(folder / "labels.npy", labels)
    np.save(folder / "noise.npy", noise.transpose(0, 1, 4, 2, 3))
    command = [sys.executable, "-c", ALONE, "labels.npy", "noise.npy", repr(options), "out.npy"]
    subprocess.run(command, cwd=folder, check=True)
    return np.load(folder / "out.npy")


def noise_of(model, labels, num_steps, seed=0):
    """Returns the noise (S + 1, N, H, W, C) that `model.sample` uses for these labels."""
    keys = generate.image_keys(seed, len(labels))
    shape = (*model.config.input_size, model.config.in_channels)
    noise_at = jax.jit(samplers.make_noise(keys, shape, num_steps))
    return np.stack([np.asarray(noise_at(i)) for i in range(num_steps - 1, -2, -1)])


def write(run, folder):
    model, settings, params = native.read(run)
    bundle.write(folder, torch_dit.to_official(params, model), model, settings)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm", "num_steps": "6", "cfg_scale": 1.0}])
def test_bundle_samples_the_same_images(tmp_path, options):
    random_run.save(tmp_path / "run")
    write(tmp_path / "run", tmp_path / "bundle")
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        *("README.md", "config.json", "dit.py", "model.safetensors"),
    ]
    model, labels = dit_jax.load(tmp_path / "run"), np.arange(8)
    expected = model.sample(labels, **options)
    steps = len(schedules.keep_steps(1000, (model.sampling | options)["num_steps"]))
    images = sample_alone(tmp_path / "bundle", labels, noise_of(model, labels, steps), options)
    assert images.dtype == np.uint8
    # A rounding error in the last bit may change a pixel by 1.
    np.testing.assert_allclose(images.astype(int), expected, atol=1)


def test_bundle_keeps_the_names_of_the_classes_and_what_the_data_are(tmp_path):
    random_run.save(tmp_path / "run")
    model, settings, params = native.read(tmp_path / "run")
    names, folder = [str(i) for i in range(10)], tmp_path / "bundle"
    bundle.write(folder, torch_dit.to_official(params, model), model, settings, names)
    back, kept = bundle.read_config(folder)
    assert back == model and kept.data == settings.data and kept.data.source == "digits"
    assert bundle.read_class_names(folder) == {"class_names": names}
    config = json.loads((folder / "config.json").read_text())
    older = {name: x for name, x in config.items() if name not in ("data", "class_names")}
    (folder / "config.json").write_text(json.dumps(older))
    assert bundle.read_config(folder)[1].data.source == "images"
    assert bundle.read_class_names(folder) == {}
    for wrong in (names[1:], "0123456789", [0] * 10):
        (folder / "config.json").write_text(json.dumps(config | {"class_names": wrong}))
        with pytest.raises(UserError, match="class_names in .* must be 10 names, got"):
            bundle.read_class_names(folder)


def test_code_in_the_readme_of_a_bundle_runs(tmp_path):
    random_run.save(tmp_path / "run")
    write(tmp_path / "run", tmp_path / "bundle")
    text = (tmp_path / "bundle" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0] + "assert images.shape == (3, 8, 8, 1)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "bundle", check=True)
    assert "uint8" in text and "num_steps='4'" in text


@pytest.mark.slow
def test_trained_digits_sample_the_same_in_pytorch(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dit_jax.cli.train", "--config=configs/digits.py"]
    subprocess.run([*command, f"--workdir={run}"], check=True)
    check_same_digits(run, tmp_path / "bundle")


def check_same_digits(run, folder):
    """Compares 250 DDPM and 50 DDIM steps from the same noise, to 1e-3 of the pixel range."""
    write(run, folder)
    config = json.loads((folder / "config.json").read_text())
    # Compare floats, because pixels would hide small errors by rounding.
    (folder / "config.json").write_text(json.dumps(config | {"space": "latents"}))
    model, labels = dit_jax.load(run), digits.labels(300)
    classifier = digits.fit_classifier(digits.digits.load()[0])
    for options, steps in (
        ({"sampler": "ddpm", "num_steps": "250"}, 250),
        ({"sampler": "ddim", "num_steps": "50"}, 50),
    ):
        generate_batch = generate.make(
            dit.make_apply(model.config),
            model.config,
            processes.make(model.settings.diffusion),
            sharding.make_mesh(),
            space="latents",
            sampling=dataclasses.replace(model.settings.sampling, **options),
        )
        ours = generate.run(generate_batch, model.params, labels, seed=0, batch_size=300)
        noise = noise_of(model, labels, steps)
        theirs = sample_alone(folder, labels, noise, options).transpose(0, 2, 3, 1)
        error = np.abs(ours - theirs).max() / 2  # relative to the pixel range, -1 to 1
        scores = [
            classifier.score(np.clip(x, -1, 1).reshape(len(x), 64), labels) for x in (ours, theirs)
        ]
        print(f"{options}: {error:.1e} of the range; agreement {scores}")
        assert error <= 1e-3
        assert abs(scores[0] - scores[1]) <= 0.01 and min(scores) >= 0.99


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"sampler": "ddim", "num_steps": "ddim25", "cfg_scale": 3.0}, True),
        ({"sampler": "ddim", "spacing": "linspace"}, True),
        ({"sampler": "unipc", "num_steps": "20"}, False),
        ({"sampler": "ddpm", "num_steps": "999,500,9"}, False),
        ({"sampler": "ddim", "spacing": "trailing"}, False),
        ({"cfg_schedule": "linear"}, False),
    ],
)
def test_a_bundle_samples_with_what_dit_py_has(tmp_path, caplog, options, kept):
    random_run.save(tmp_path)
    model, settings, _ = native.read(tmp_path)
    sampling = dataclasses.replace(settings.sampling, **options)
    config = bundle.make_config(model, dataclasses.replace(settings, sampling=sampling))
    names = ("sampler", "num_steps", "cfg_scale")
    usual = {"sampler": "ddim", "num_steps": "50"}
    expected = vars(sampling) | ({} if kept else usual)
    assert {name: config["sampling"][name] for name in names} == {x: expected[x] for x in names}
    assert kept == ("dit.py of a bundle cannot sample as the run" not in caplog.text)
    assert config["sampling"].keys() == random_run.CONFIG["sampling"].keys()
