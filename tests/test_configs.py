"""The configs: each can be had with and without its variant, and is importable when installed."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import folder
from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.runs import build

ROOT = Path(__file__).parents[1]
OF_MODELS = ("jit256", "meanflow_improved", "meanflow_pixels")
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
OWN = """from configs import base, digits

def get_config():
    config = digits.get_config()
    config.run.total_steps = 3
    return config
"""


def write_manifest(path, **fields):
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(fields))
    return path


@pytest.fixture
def prepared(tmp_path):
    """A folder with the manifest of dit-prepare: three classes, sides of 20 to 300 pixels."""
    sides = {"300": 50, "20": 5, "30": 45}
    splits = {"train": {"short_sides": sides}, "test": {"short_sides": {"9": 1}}}
    return write_manifest(tmp_path / "data", classes=["a b", "c", "d"], splits=splits)


@pytest.fixture
def encoded(tmp_path):
    """A folder with the manifest of dit-encode: latents of 6 x 8 with four channels."""
    fields = {"shape": [2, 6, 8, 8], "num_classes": 5, "split": "validation"}
    return write_manifest(tmp_path / "latents", vae={"scale": [1.0]}, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_complete_without_a_variant(name):
    settings = build.read(importlib.import_module(f"configs.{name}").get_config())
    assert settings_lib.read(settings_lib.to_json(settings)) == settings
    assert dit.configure(**vars(settings.model)).num_classes == settings.model.num_classes


@pytest.mark.parametrize("name", sorted({*NAMES} - {"base", "folder", *OF_MODELS}))
def test_a_variant_sets_the_size_and_the_patch(name):
    model = importlib.import_module(f"configs.{name}").get_config("S/4").model
    assert (model.size, model.patch_size) == ("S", 4)


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_config_of_published_models_has_no_other_variant(name):
    message = "^the variant must be one of B/.*, got 'S/16'; set model.size and"
    with pytest.raises(ValueError, match=message):
        importlib.import_module(f"configs.{name}").get_config("S/16")


def test_a_folder_of_pictures_gives_the_classes_and_the_size(prepared):
    settings = build.read(folder.get_config(str(prepared)))
    model, data = settings.model, settings.data
    assert (model.num_classes, model.input_size, model.in_channels) == (3, (24, 24), 3)
    assert (data.source, data.space, data.split) == ("images", "pixels", "train")
    assert data.path == str(prepared) and settings.sampling.clip_x0
    assert settings.run.num_samples == 24  # eight of each class
    dit.configure(**vars(model))


@pytest.mark.parametrize(
    "sides, size",
    [
        ({"24": 9}, 24),
        ({"500": 9}, 24),
        ({"23": 9}, 18),
        ({"3": 1}, 6),
        ({"12": 10, "64": 90}, 24),  # a tenth is smaller and will be enlarged
        ({"12": 11, "64": 89}, 12),
    ],
)
def test_the_crop_is_what_nine_of_ten_pictures_reach(sides, size):
    assert folder.crop_size(sides) == size


def test_latents_give_their_classes_their_size_and_their_channels(encoded):
    settings = build.read(folder.get_config(str(encoded)))
    model, data = settings.model, settings.data
    assert (model.num_classes, model.input_size, model.in_channels) == (5, (6, 8), 4)
    assert (data.source, data.space, data.split) == ("latents", "latents", "validation")
    assert not settings.sampling.clip_x0
    dit.configure(**vars(model))


def test_a_tilde_in_the_path_is_expanded(prepared, monkeypatch):
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert folder.get_config("~/data").data.path == str(prepared)


@pytest.mark.parametrize("fields", [None, {}, {"splits": {}}, {"name": "of a web page"}])
def test_a_folder_that_is_not_prepared_is_one_line(tmp_path, fields):
    if fields is not None:
        write_manifest(tmp_path / "data", **fields)
    with pytest.raises(UserError, match=r"^config must name what dit-prepare .*, got .*/data$"):
        folder.get_config(str(tmp_path / "data"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the packages that setup.py installs."""
    path = tmp_path_factory.mktemp("installed")
    for name in ("dit_jax", "configs"):
        shutil.copytree(ROOT / name, path / name)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, path)
    command = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={path / 'lib'}"]
    subprocess.run(command, cwd=path, check=True)
    return path / "lib"


def test_the_names_of_imagenet_are_installed(installed):
    assert (installed / "dit_jax" / "sampling" / "imagenet.txt").read_text().count("\n") == 1000


@pytest.mark.parametrize("where", ["mine.py", "configs/mine.py"])
def test_a_config_outside_the_clone_works_from_any_directory(installed, tmp_path, where):
    """Also in a folder of the user that is called configs itself."""
    file = tmp_path / "work" / where
    file.parent.mkdir(parents=True)
    file.write_text(OWN)
    command = [sys.executable, "-m", "dit_jax.cli.train", f"--config={file}"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.stderr == "dit-train: --workdir must be given\n"  # it has read the config
    done = subprocess.run([*command, "--config.run.total_step=4"], **options)
    assert "total_step" in done.stderr and "total_steps" in done.stderr


def test_a_config_of_the_package_is_found_from_any_directory(installed, tmp_path):
    command = [sys.executable, "-m", "dit_jax.cli.train"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--config=configs/folder.py:nowhere"], **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "dit-train: config must name what dit-prepare or dit-encode wrote"
    )
    done = subprocess.run([*command, "--config=configs/digit.py"], **options)
    assert "config must be a Python file that exists, got configs/digit.py" in done.stderr
