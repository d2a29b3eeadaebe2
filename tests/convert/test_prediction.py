"""What the weights of a DiT predict, found in the file."""

import argparse

import ml_dtypes
import numpy as np
import pytest
import torch

from dit_jax.convert import prediction
from dit_jax.errors import UserError
from dit_jax.models import dit

MODEL = dit.configure("Ti", 2, input_size=(8, 8), in_channels=3, num_classes=5)
SIT = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}


def final_layer(dtype=np.float32):
    """The last layer's weights; rows are ordered by row and column of the patch, then channel."""
    weight = np.random.default_rng(0).standard_normal((24, 128))
    return {"final_layer.linear.weight": weight.astype(dtype)}


def save(path, args=None):
    state_dict = {"x": torch.zeros(1)}
    torch.save({"ema": state_dict, "args": args} if args else state_dict, path)
    return path


@pytest.mark.parametrize("kind", [dict, lambda args: argparse.Namespace(**args)])
def test_args_of_sit_tell(tmp_path, kind):
    path = save(tmp_path / "0400000.pt", kind(SIT))
    assert prediction.find(path, final_layer(), MODEL) == ("velocity", "by the args in the file")
    path = save(tmp_path / "SiT.pt", kind({"model": "DiT-XL/2", "image_size": 256}))
    assert prediction.find(path, final_layer(), MODEL) == ("velocity", "by its name")


@pytest.mark.parametrize(
    "args, message",
    [
        ({"path_type": "GVP"}, "path_type of a SiT must be Linear, got GVP in .*x.pt"),
        ({"prediction": "score"}, "prediction of a SiT must be velocity, got score in .*x.pt"),
        ({"prediction": "v"}, "prediction of a SiT must be velocity, got v in"),
    ],
)
def test_sit_of_another_process_is_refused(tmp_path, args, message):
    path = save(tmp_path / "x.pt", SIT | args)
    with pytest.raises(UserError, match=message):
        prediction.find(path, final_layer(), MODEL)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_unused_variance_tells(tmp_path, dtype):
    path = save(tmp_path / "x.pt")
    state_dict = final_layer(dtype)
    assert prediction.find(path, state_dict, MODEL) == ("noise", "")
    weight = state_dict["final_layer.linear.weight"]
    weight[np.arange(24) % 6 >= 3] = 0  # three channels of noise, three of variance
    expected = "velocity", "its variance has weights of 0"
    assert prediction.find(path, state_dict, MODEL) == expected
    weight[:] = 0  # at the start of the training
    assert prediction.find(path, state_dict, MODEL) == ("noise", "")


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "situation.pt", "mySiT.pt"])
def test_other_names_do_not_tell(tmp_path, name):
    assert prediction.find(save(tmp_path / name), final_layer(), MODEL) == ("noise", "")


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "SiT.pt", "sit_b4.safetensors"])
def test_name_of_sit_tells(tmp_path, name):
    model = MODEL._replace(learn_sigma=False)
    assert prediction.find(save(tmp_path / name), {}, model) == ("velocity", "by its name")
