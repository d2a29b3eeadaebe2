"""What the weights of a DiT predict, found in the file."""

import argparse

import ml_dtypes
import numpy as np
import pytest
import torch

from dit_jax.convert import files, prediction
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.settings import SIT, Diffusion

MODEL = dit.configure("Ti", 2, input_size=(8, 8), in_channels=3, num_classes=5)
ARGS = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
VELOCITY = Diffusion(**SIT)


def final_layer(dtype=np.float32):
    """The last layer's weights; rows are ordered by row and column of the patch, then channel."""
    weight = np.random.default_rng(0).standard_normal((24, 128))
    return {"final_layer.linear.weight": weight.astype(dtype)}


def save(path, args=None):
    state_dict = {"x": torch.zeros(1)}
    if path.suffix == ".safetensors":
        files.write_state_dict(path, {"x": np.zeros(1, np.float32)})
        return path
    torch.save({"ema": state_dict, "args": args} if args else state_dict, path)
    return path


@pytest.mark.parametrize("kind", [dict, lambda args: argparse.Namespace(**args)])
def test_args_of_sit_tell(tmp_path, kind):
    path = save(tmp_path / "0400000.pt", kind(ARGS))
    assert prediction.find(path, final_layer(), MODEL) == (VELOCITY, "by the args in the file")
    path = save(tmp_path / "SiT.pt", kind({"model": "DiT-XL/2", "image_size": 256}))
    assert prediction.find(path, final_layer(), MODEL) == (VELOCITY, "by its name")


@pytest.mark.parametrize(
    "args, message",
    [
        ({"path_type": "VP"}, "path_type of a SiT must be Linear or GVP, got VP in .*x.pt"),
        ({"prediction": "score"}, "prediction of a SiT must be velocity or noise, got score in"),
        ({"prediction": "v"}, "prediction of a SiT must be velocity or noise, got v in .*x.pt"),
    ],
)
def test_sit_of_another_process_is_refused(tmp_path, args, message):
    path = save(tmp_path / "x.pt", ARGS | args)
    with pytest.raises(UserError, match=message):
        prediction.find(path, final_layer(), MODEL)


@pytest.mark.parametrize("path_type, process", [("Linear", "linear"), ("GVP", "gvp")])
@pytest.mark.parametrize("predicted", ["velocity", "noise"])
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_args_go_through_a_file(tmp_path, path_type, process, predicted, end):
    diffusion = Diffusion(**SIT | {"process": process, "prediction": predicted})
    args = prediction.args_of(diffusion)
    assert args == {"path_type": path_type, "prediction": predicted}
    path = tmp_path / f"x.{end}"
    files.write_state_dict(path, final_layer(), args)
    np.testing.assert_equal(files.read_state_dict(path), final_layer())
    assert prediction.find(path, final_layer(), MODEL) == (diffusion, "by the args in the file")


def test_a_dit_has_no_args_in_its_file():
    assert prediction.args_of(Diffusion("squared_cosine")) == {}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"prediction": "v"}, "v on ddpm"),
        ({"process": "linear"}, "velocity on linear"),
        ({**SIT, "prediction": "x0"}, "x0 on linear"),
        ({**SIT, "time_scale": 1000.0}, "velocity on linear"),
    ],
)
def test_what_no_other_code_samples_rightly_is_not_written(options, words):
    with pytest.raises(UserError, match=f"time_scale 1 .* got a checkpoint of {words}$"):
        prediction.args_of(Diffusion(**options))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_unused_variance_tells(tmp_path, dtype):
    path = save(tmp_path / "x.pt")
    state_dict = final_layer(dtype)
    assert prediction.find(path, state_dict, MODEL) == (Diffusion(), "")
    weight = state_dict["final_layer.linear.weight"]
    weight[np.arange(24) % 6 >= 3] = 0  # three channels of noise, three of variance
    expected = VELOCITY, "its variance has weights of 0"
    assert prediction.find(path, state_dict, MODEL) == expected
    weight[:] = 0  # at the start of the training
    assert prediction.find(path, state_dict, MODEL) == (Diffusion(), "")


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "situation.pt", "mySiT.pt"])
def test_other_names_do_not_tell(tmp_path, name):
    assert prediction.find(save(tmp_path / name), final_layer(), MODEL) == (Diffusion(), "")


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "SiT.pt", "sit_b4.safetensors"])
def test_name_of_sit_tells(tmp_path, name):
    model = MODEL._replace(learn_sigma=False)
    assert prediction.find(save(tmp_path / name), {}, model) == (VELOCITY, "by its name")
