"""The weights file of Inception, and the network in PyTorch that ours is compared with."""

import jax
import numpy as np
import pytest
import torch
from testdata import evaluation

from dit_jax.convert import torch_inception, torch_inception_model
from dit_jax.errors import UserError


@pytest.fixture(scope="module")
def peer(inception_weights):
    """peer(images) -> {part: array} of the network in PyTorch."""
    tensors = {name: torch.from_numpy(x) for name, x in inception_weights.items()}

    def run(images):
        outputs = torch_inception_model.features(tensors, images)
        return dict(
            zip(("pool", "spatial", "logits"), map(torch.Tensor.numpy, outputs), strict=True)
        )

    return run


def test_state_dict_has_the_size_of_the_published_file():
    shapes = torch_inception.shapes()
    assert len(shapes) == 472
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 23_885_392


def test_peer_matches_torch_fidelity(peer, golden_eval, check_close):
    for part, actual in peer(evaluation.images(32, 32)).items():
        check_close(f"peer {part}", actual, golden_eval[f"{part}/32x32"], 5e-5)  # float32 sums


def test_peer_resizes_as_torch_fidelity(golden_eval):
    x = torch.from_numpy(evaluation.images(256, 192)).permute(0, 3, 1, 2).float()
    resized = torch_inception_model.resize(x).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(resized[:, 100:116, 150:166], golden_eval["resized/256x192"])


@pytest.mark.parametrize("size", [(48, 80), (1, 1), (400, 310)])
def test_other_images_have_the_features_of_the_peer(look, peer, check_close, size):
    images = evaluation.images(*size, group="other/")
    features, _ = look(images)
    for part, expected in peer(images).items():
        name = f"other {part} {size[0]}x{size[1]}"
        check_close(name, getattr(features, part), expected, 1e-4)  # 94 convolutions in float32


SMALL = {"a.conv.weight": torch.ones(2, 1, 1, 1), "a.bn.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, torch.nn.Parameter])
def test_counters_parameters_and_the_legacy_format_are_read(tmp_path, legacy, wrap):
    state_dict = SMALL | {"a.conv.weight": wrap(SMALL["a.conv.weight"])}
    path = tmp_path / "x.pth"
    torch.save(state_dict, path, _use_new_zipfile_serialization=not legacy)
    found = torch_inception.read(path)
    assert found.keys() == {"a.conv.weight"}
    np.testing.assert_array_equal(found["a.conv.weight"], np.ones((2, 1, 1, 1)))


def test_batch_norm_is_folded_into_the_convolution(inception_weights):
    name, path = "Mixed_7c.branch3x3_2a", ("Mixed_7c", "branch3x3_2a")
    conv = torch_inception.from_torch(inception_weights)[path[0]][path[1]]
    assert conv["kernel"].shape == (1, 3, 384, 384) and conv["kernel"].dtype == np.float32
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 384), np.float32)
    actual = jax.lax.conv_general_dilated(
        x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    tensors = {key: torch.from_numpy(value) for key, value in inception_weights.items()}
    net = torch_inception_model.Net(tensors)
    expected = net.conv(name, torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    actual = np.maximum(actual + conv["bias"][None, None, None], 0)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * expected.max())  # float32 sums


def test_other_state_dict_is_refused(inception_weights):
    name = "Mixed_5b.branch1x1"
    with pytest.raises(UserError, match="names of Inception: missing fc.bias; surplus stray"):
        other = {key: x for key, x in inception_weights.items() if key != "fc.bias"}
        torch_inception.from_torch(other | {"stray": np.zeros(1)})
    for key, x, message in (
        (f"{name}.conv.weight", np.zeros((64, 192, 3, 3)), r"must have shape \(64, 192, 1, 1\)"),
        (f"{name}.bn.bias", np.full(64, np.nan, np.float32), "must be finite"),
        (f"{name}.bn.bias", np.zeros(64, np.int8), "must be float32, float16, bfloat16, float64"),
        (f"{name}.bn.running_var", np.full(64, -1, np.float32), "must be positive, got -1"),
    ):
        with pytest.raises(UserError, match=f"{key} {message}"):
            torch_inception.from_torch(inception_weights | {key: x})


def test_file_must_be_the_published_one(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    with pytest.raises(UserError, match="FILE must be an existing file, got .*: download https"):
        torch_inception.check_file(path)
    path.write_bytes(b"other")
    with pytest.raises(
        UserError, match="FILE must have the sha256 6726825d.* pass --other_weights"
    ):
        torch_inception.check_file(path)
    sha256 = torch_inception.check_file(path, other_weights=True)
    assert sha256.startswith("d9298a10") and len(sha256) == 64
    monkeypatch.setattr(torch_inception, "SHA256", sha256)
    assert torch_inception.check_file(path) == sha256
