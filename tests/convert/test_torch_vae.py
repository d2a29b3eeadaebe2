"""The autoencoder against diffusers' AutoencoderKL."""

import diffusers
import jax
import numpy as np
import pytest
import stable_diffusion
import torch
from diffusers.loaders import single_file_utils

from dit_jax.convert import torch_vae
from dit_jax.errors import UserError
from dit_jax.models import vae
from dit_jax.sampling import autoencoder

NARROW = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
FULL = {  # Stable Diffusion's
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def make_peer(options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**options).eval()


def state_dict_of(net):
    return {name: x.numpy() for name, x in net.state_dict().items()}


@pytest.fixture(scope="module")
def peer():
    return make_peer(NARROW)


def expect_parity(net, height, width):
    """Checks the relative errors of the moments and of the decoded latent of a random image."""
    state_dict = state_dict_of(net)
    config = torch_vae.read_config(state_dict, dict(net.config))
    params = torch_vae.from_torch(state_dict, config)
    x = np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = net.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
        decoded = net.decode(posterior.mean).sample.numpy().transpose(0, 2, 3, 1)
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).numpy()
    moments = moments.transpose(0, 2, 3, 1)
    encode, decode = map(jax.jit, vae.make_apply(config))
    for actual, expected, bound in (
        (encode(params, x), moments, 1e-5),
        (decode(params, vae.mode(moments)), decoded, 5e-5),
    ):
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        print(f"{height} x {width}: {error:.1e}")
        assert error <= bound


@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_narrow_autoencoder_matches_diffusers(peer, height, width):
    expect_parity(peer, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(256, 256), (128, 192)])
def test_full_autoencoder_matches_diffusers(height, width):
    expect_parity(make_peer(FULL), height, width)


@pytest.mark.slow
def test_full_autoencoder_decodes_in_bfloat16_and_512_in_16_gb():
    net = make_peer(FULL)
    config = torch_vae.read_config(state_dict_of(net))
    params = torch_vae.from_torch(state_dict_of(net), config)
    z = np.random.default_rng(0).standard_normal((1, 32, 32, 4), np.float32)
    exact, rough = (
        np.asarray(jax.jit(vae.make_apply(config, dtype=dtype)[1])(params, z))
        for dtype in ("float32", "bfloat16")
    )
    error, mean = (f(np.abs(rough - exact)) / np.abs(exact).max() for f in (np.max, np.mean))
    print(f"bfloat16: {error:.1e} at most, {mean:.1e} in the mean, of the largest output")
    assert error <= 5e-2  # bfloat16 has 8 bits; about 40 layers
    chunk = jax.ShapeDtypeStruct((autoencoder.PIXELS // 512**2, 64, 64, 4), np.float32)
    decode = jax.jit(vae.make_apply(config)[1]).lower(params, chunk).compile()
    memory = decode.memory_analysis().temp_size_in_bytes / 1e9
    print(f"{chunk.shape[0]} images of 512x512 at once: {memory:.1f} GB")
    assert memory < 12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_per_block": 2, "latent_channels": 16, "in_channels": 1, "out_channels": 1},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"shift_factor": 0.1, "scaling_factor": 0.3},
        {"latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 4.0, 8.0]},
    ],
)
def test_round_trip_is_bit_identical(options):
    net = make_peer(NARROW | options)
    state_dict = state_dict_of(net)
    config = torch_vae.read_config(state_dict, dict(net.config))
    assert config.channels == (8, 16, 16)
    assert config.latent_channels == options.get("latent_channels", 4)
    assert config.num_resnets == options.get("layers_per_block", 1)
    assert config.quant_conv == options.get("use_quant_conv", True)
    back = torch_vae.to_torch(torch_vae.from_torch(state_dict, config))
    assert back.keys() == state_dict.keys()
    for name, x in state_dict.items():
        np.testing.assert_array_equal(back[name], x)


@pytest.mark.parametrize(
    "fields, scale, shift",
    [
        (None, (0.18215,), (0.0,)),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.3611,), (0.1159,)),
        (
            {"scaling_factor": 0.5, "latents_mean": [0, 1, 2, 3], "latents_std": [1, 2, 4, 8]},
            (0.5, 0.25, 0.125, 0.0625),
            (0, 1, 2, 3),
        ),
    ],
)
def test_scale_and_shift_of_the_latents(peer, fields, scale, shift):
    fields = {"norm_num_groups": 4} | fields if fields else {"norm_num_groups": 4}
    config = torch_vae.read_config(state_dict_of(peer), fields)
    assert (config.scale, config.shift) == (scale, shift)


@pytest.mark.parametrize("convolution", [False, True])
def test_old_attention_names_are_renamed(peer, convolution):
    """Files from before diffusers 0.17 have them; the oldest store 1x1 convolutions."""
    state_dict = state_dict_of(peer)
    old = {}
    for name, x in state_dict.items():
        for now, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            if f".{now}." in name:
                name = name.replace(now, before)
                x = x[:, :, None, None] if convolution and x.ndim == 2 else x
        old[name] = x
    assert old.keys() != state_dict.keys()
    new = torch_vae.rename(old)
    assert new.keys() == state_dict.keys()
    for name, x in state_dict.items():
        np.testing.assert_array_equal(new[name], x)


@pytest.mark.parametrize("levels", [1, 3])
def test_original_names_of_stable_diffusion_are_renamed(levels):
    """diffusers' own converter agrees, so `stable_diffusion.original` makes the true names."""
    options = {k: x[:levels] if isinstance(x, tuple) else x for k, x in NARROW.items()}
    net = make_peer(options | {"layers_per_block": 2})
    state_dict = state_dict_of(net)
    original = stable_diffusion.original(state_dict)
    assert "decoder.up.0.block.2.conv1.weight" in original
    assert original["encoder.mid.attn_1.q.weight"].ndim == 4
    theirs = single_file_utils.convert_ldm_vae_checkpoint(original, dict(net.config))
    ours = torch_vae.rename({"loss.logvar": np.zeros(())} | original)
    assert ours.keys() == state_dict.keys() == theirs.keys()
    for name, x in state_dict.items():
        np.testing.assert_array_equal(ours[name], x)
        np.testing.assert_array_equal(theirs[name], x)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_other_types_become_float32_or_are_refused(peer, dtype):
    state_dict = {name: x.astype(dtype) for name, x in state_dict_of(peer).items()}
    config = torch_vae.read_config(state_dict, dict(peer.config))
    if dtype == np.int8:
        with pytest.raises(UserError, match="must be float32, float16, bfloat16, float64, got int"):
            torch_vae.from_torch(state_dict, config)
        return
    params = torch_vae.from_torch(state_dict, config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_other_state_dict_is_refused(peer):
    state_dict = state_dict_of(peer)
    config = torch_vae.read_config(state_dict, dict(peer.config))
    with pytest.raises(UserError, match="must be an AutoencoderKL: missing 'encoder.conv_in"):
        torch_vae.read_config({"a": np.zeros(2)})
    with pytest.raises(UserError, match="channels must be divisible by norm_num_groups 32, got"):
        torch_vae.read_config(state_dict)
    odd = {"norm_num_groups": 4, "latents_mean": [0.0], "latents_std": [1.0, 2.0]}
    with pytest.raises(UserError, match="scale must be one number or one for each channel, got"):
        torch_vae.read_config(state_dict, odd)
    with pytest.raises(UserError, match="autoencoder: missing quant_conv.bias; surplus stray"):
        stray = {"stray": np.zeros(2)} | state_dict
        stray.pop("quant_conv.bias")
        torch_vae.from_torch(stray, config)
    name = "decoder.conv_in.weight"
    with pytest.raises(UserError, match=f"{name} must have shape .16, 4, 3, 3., got .16, 4, 1, 1"):
        torch_vae.from_torch(state_dict | {name: state_dict[name][:, :, :1, :1]}, config)
    with pytest.raises(UserError, match=f"{name} must be finite"):
        torch_vae.from_torch(state_dict | {name: state_dict[name] * np.nan}, config)
