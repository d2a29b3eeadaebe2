"""Conversion between our parameters and the official state dict, bit for bit."""

import jax
import numpy as np
import pytest

from dit_jax.convert import torch_dit
from dit_jax.errors import UserError
from dit_jax.models import dit

OPTIONS = {"input_size": (8, 4), "in_channels": 3, "num_classes": 5}
CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


@pytest.fixture
def config():
    return dit.configure("Ti", 2, **OPTIONS)


@pytest.fixture
def state_dict(config):
    return torch_dit.to_official(random_params(config), config)


def test_official_names_and_shapes(state_dict):
    """They equal those of `DiT(...).state_dict()` in the official code."""
    expected = {
        "pos_embed": (1, 8, 128),
        "x_embedder.proj.weight": (128, 3, 2, 2),
        "x_embedder.proj.bias": (128,),
        "t_embedder.mlp.0.weight": (128, 256),
        "t_embedder.mlp.0.bias": (128,),
        "t_embedder.mlp.2.weight": (128, 128),
        "t_embedder.mlp.2.bias": (128,),
        "y_embedder.embedding_table.weight": (6, 128),
        "final_layer.linear.weight": (24, 128),
        "final_layer.linear.bias": (24,),
        "final_layer.adaLN_modulation.1.weight": (256, 128),
        "final_layer.adaLN_modulation.1.bias": (256,),
    }
    for i in range(4):
        for name, size, inputs in (
            ("attn.qkv", 384, 128),
            ("attn.proj", 128, 128),
            ("mlp.fc1", 512, 128),
            ("mlp.fc2", 128, 512),
            ("adaLN_modulation.1", 768, 128),
        ):
            expected[f"blocks.{i}.{name}.weight"] = (size, inputs)
            expected[f"blocks.{i}.{name}.bias"] = (size,)
    assert {name: x.shape for name, x in state_dict.items()} == expected


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("learn_sigma, null_label", [(True, True), (False, False)])
def test_round_trip_is_bit_identical(conditioning, learn_sigma, null_label):
    options = {"learn_sigma": learn_sigma, "null_label": null_label}
    config = dit.configure("Ti", 2, conditioning=conditioning, **OPTIONS, **options)
    params = random_params(config)
    state_dict = torch_dit.to_official(dict(params), config)
    back = torch_dit.from_official(dict(state_dict), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = torch_dit.to_official(back, config)
    assert again.keys() == state_dict.keys()
    for name, x in state_dict.items():
        assert again[name].tobytes() == x.tobytes()
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.flags.writeable


def test_patch_convolution_becomes_a_linear_map(config, state_dict):
    """The kernel rows have the order in which `patchify` flattens (row, column, channel)."""
    params = torch_dit.from_official(dict(state_dict), config)
    weight = state_dict["x_embedder.proj.weight"]  # (D, C, p, p)
    kernel = params["x_embedder"]["proj"]["kernel"]  # (p*p*C, D)
    for row, column, channel in np.ndindex(2, 2, 3):
        index = (2 * row + column) * 3 + channel
        np.testing.assert_array_equal(kernel[index], weight[:, channel, row, column])


def test_blocks_keep_their_order(config, state_dict):
    params = torch_dit.from_official(dict(state_dict), config)
    for i in range(config.depth):
        np.testing.assert_array_equal(
            params["blocks"]["mlp"]["fc1"]["kernel"][i], state_dict[f"blocks.{i}.mlp.fc1.weight"].T
        )


def test_half_precision_becomes_float32(config, state_dict):
    half = {name: x.astype(np.float16) for name, x in state_dict.items()}
    half["pos_embed"] = state_dict["pos_embed"]
    params = torch_dit.from_official(dict(half), config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    bias = params["blocks"]["mlp"]["fc1"]["bias"][3]
    np.testing.assert_array_equal(bias, half["blocks.3.mlp.fc1.bias"].astype(np.float32))


def test_float64_is_rounded_to_float32(config, state_dict):
    exact = {name: x.astype(np.float64) for name, x in state_dict.items()}
    exact["blocks.3.mlp.fc1.bias"] += 1e-12  # lost in float32
    assert torch_dit.read_config(exact) == config
    params = torch_dit.from_official(exact, config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    bias = params["blocks"]["mlp"]["fc1"]["bias"][3]
    np.testing.assert_array_equal(bias, state_dict["blocks.3.mlp.fc1.bias"])


def test_missing_and_surplus_names_are_listed(config, state_dict):
    state_dict["y_embedder.weight"] = state_dict.pop("y_embedder.embedding_table.weight")
    message = (
        "state dict must have the names of the config: "
        "missing y_embedder.embedding_table.weight; surplus y_embedder.weight$"
    )
    with pytest.raises(UserError, match=message):
        torch_dit.from_official(state_dict, config)


def test_at_most_ten_names_are_listed(config):
    with pytest.raises(UserError, match="and 42 more; surplus none$") as error:
        torch_dit.from_official({}, config)
    assert str(error.value).count("blocks.") == 10


@pytest.mark.parametrize(
    "name, x, message",
    [
        (
            "blocks.2.attn.qkv.weight",
            np.zeros((128, 384), np.float32),
            r"blocks.2.attn.qkv.weight must have shape \(384, 128\), got \(128, 384\)",
        ),
        ("pos_embed", np.zeros((1, 8, 128), np.float32), "pos_embed must be .* 4 x 2 patches"),
        ("pos_embed", np.zeros((1, 9, 128), np.float32), r"pos_embed must have shape \(1, 8, 128"),
        (
            "t_embedder.mlp.0.bias",
            np.zeros(128, np.int8),
            "t_embedder.mlp.0.bias must be float32, float16, bfloat16, float64, got int8",
        ),
        ("t_embedder.mlp.0.bias", np.full(128, 1e300), "must be finite, got NaN or infinity"),
        (
            "blocks.1.attn.qkv.bias",
            np.full(384, np.nan, np.float32),
            "blocks.1.attn.qkv.bias must be finite, got NaN or infinity",
        ),
    ],
)
def test_wrong_array_is_refused(config, state_dict, name, x, message):
    with pytest.raises(UserError, match=message):
        torch_dit.from_official(state_dict | {name: x}, config)


def test_params_of_another_config_are_refused(config):
    params = random_params(config)
    with pytest.raises(UserError, match="^params must have .* missing blocks/cross_attn/kv/bias"):
        torch_dit.to_official(params, config._replace(conditioning="cross_attention"))
    with pytest.raises(UserError, match=r"embedding must have shape \(11, 128\), got \(6, 128\)"):
        torch_dit.to_official(params, config._replace(num_classes=10))


def test_params_with_infinity_are_refused(config):
    params = random_params(config)
    params["final_layer"]["linear"]["bias"] = np.full(24, np.inf, np.float32)
    with pytest.raises(UserError, match="^final_layer/linear/bias must be finite, got NaN or inf"):
        torch_dit.to_official(params, config)


def test_conversion_empties_its_input(config, state_dict):
    torch_dit.from_official(state_dict, config)
    params = random_params(config)
    assert not state_dict and torch_dit.to_official(params, config) and not params


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("input_size", [(8, 4), (4, 8), (6, 6)])
def test_config_is_inferred_from_shapes(conditioning, learn_sigma, input_size):
    options = OPTIONS | {"input_size": input_size, "learn_sigma": learn_sigma}
    config = dit.configure("Ti", 2, conditioning=conditioning, **options)
    state_dict = torch_dit.to_official(random_params(config), config)
    assert torch_dit.read_config(state_dict) == config


def test_num_classes_is_inferred_or_checked(state_dict, config):
    assert torch_dit.read_config(state_dict, num_classes=5) == config
    without = torch_dit.read_config(state_dict, num_classes=6)
    assert without.num_classes == 6 and not without.null_label
    with pytest.raises(UserError, match="num_classes must be 5 or 6 for a .* 6 rows, got 1000"):
        torch_dit.read_config(state_dict, num_classes=1000)


def test_num_heads_is_required_for_unknown_sizes(config, state_dict):
    config = config._replace(depth=3)
    state_dict = torch_dit.to_official(random_params(config), config)
    with pytest.raises(UserError, match="num_heads must be given for depth 3 and hidden size 128"):
        torch_dit.read_config(state_dict)
    assert torch_dit.read_config(state_dict, num_heads=8).num_heads == 8
    with pytest.raises(UserError, match="num_heads must divide hidden size 128, got 7"):
        torch_dit.read_config(state_dict, num_heads=7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_with_rounded_position_table(state_dict, config, dtype):
    half = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in state_dict.items()}
    assert torch_dit.read_config(half) == config
    params = torch_dit.from_official(dict(half), config)
    np.testing.assert_array_equal(
        params["final_layer"]["linear"]["bias"], half["final_layer.linear.bias"].astype(np.float32)
    )


def test_names_of_diffusers_are_recognised():
    with pytest.raises(UserError, match="got names of diffusers: use .* from-diffusers DIR OUT"):
        torch_dit.read_config({"transformer_blocks.0.norm1.linear.weight": np.zeros(2)})


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_autoencoder_is_recognised(prefix):
    with pytest.raises(UserError, match="got an autoencoder: use dit-convert vae FILE OUT"):
        torch_dit.read_config({f"{prefix}encoder.conv_in.weight": np.zeros(2)})


def test_weights_of_another_model_are_refused():
    other = {f"layer{i}.weight": np.zeros((2, 2), np.float32) for i in range(12)}
    with pytest.raises(UserError, match="must have the names of a DiT: missing .*and 8 more") as e:
        torch_dit.read_config(other)
    assert "surplus layer0.weight" in str(e.value) and str(e.value).count("layer") == 10 + 2


@pytest.mark.parametrize(
    "name, x, message",
    [
        ("pos_embed", np.zeros((1, 8, 128)), "sin-cos table of a grid of 8 patches"),
        (
            "blocks.0.adaLN_modulation.1.weight",
            np.zeros((640, 128)),
            "must have 4 or 6 x 128 rows, got 640",
        ),
        (
            "final_layer.linear.weight",
            np.zeros((18, 128)),
            "must have 12 or, with a learned variance, 24 rows for patch 2 and 3 channels, got 18",
        ),
        ("x_embedder.proj.weight", np.zeros((128, 16)), "must have 4 axes, got shape"),
        ("y_embedder.embedding_table.weight", np.zeros((0, 128)), "must not be empty, got shape"),
        ("x_embedder.proj.weight", np.zeros((128, 3, 2, 1)), "must have square patches"),
    ],
)
def test_inconsistent_shapes_are_refused(state_dict, name, x, message):
    with pytest.raises(UserError, match=message):
        torch_dit.read_config(state_dict | {name: x})


@pytest.mark.parametrize("input_size", [(8,), (4, 8, 4)])
def test_input_size_without_two_axes_is_refused(config, state_dict, input_size):
    config = config._replace(input_size=input_size)
    message = r"input_size must have two axes for PyTorch, got \("
    with pytest.raises(UserError, match=message):
        torch_dit.to_official({}, config)
    with pytest.raises(UserError, match=message):
        torch_dit.from_official(state_dict, config)
