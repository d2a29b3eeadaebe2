"""DiT in the format of diffusers: bit-identical round trips, and the corrected pipeline."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from dit_jax.convert import (
    bundle,
    diffusers_dit,
    diffusers_pipeline,
    files,
    native,
    parity,
    torch_dit,
    torch_model,
)
from dit_jax.diffusion import schedules
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.settings import Diffusion

CONFIG = dit.configure("Ti", 2, input_size=(8, 8), num_classes=5)


def random_state_dict(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) * np.float32(0.05), shapes
    )
    return torch_dit.to_official(params, config)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Writes a small random AutoencoderKL and returns its folder."""
    path = tmp_path_factory.mktemp("vae") / "vae"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae):
    """Writes a pipeline with random weights and returns its folder."""
    path = tmp_path_factory.mktemp("pipeline") / "out"
    settings = native.settings_of(CONFIG, diffusion=Diffusion("squared_cosine"))
    diffusers_dit.write_folder(path, random_state_dict(), CONFIG, settings, vae)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 3, "learn_sigma": False},
        {"input_size": (16, 16), "num_classes": 1000},
    ],
)
def test_round_trip_is_bit_identical(tmp_path, options):
    config = dit.configure("Ti", 2, **{"input_size": (8, 8), "num_classes": 5} | options)
    config = config._replace(depth=3, num_heads=2)  # not the depth and heads of Ti
    state_dict = random_state_dict(config)
    settings = native.settings_of(config)
    diffusers_dit.write_folder(tmp_path / "out", dict(state_dict), config, settings)
    back, model, same_settings = diffusers_dit.read_folder(tmp_path / "out")
    assert model == config and same_settings == settings
    assert back.keys() == state_dict.keys()
    for name, x in state_dict.items():
        np.testing.assert_array_equal(back[name], x)


@pytest.mark.slow
@pytest.mark.parametrize("size, patch_size", [("S", 8), ("B", 4), ("XL", 2)])
def test_round_trip_of_the_paper_sizes_is_bit_identical(size, patch_size):
    """Official -> ours -> official -> diffusers -> official. XL/2 needs 8 GB."""
    config = dit.configure(size, patch_size)
    expected = random_state_dict(config)
    state_dict = torch_dit.to_official(
        torch_dit.from_official(dict(expected), config), torch_dit.read_config(expected)
    )
    state_dict = diffusers_dit.from_diffusers(
        diffusers_dit.to_diffusers(state_dict, config), config
    )
    assert state_dict.keys() == expected.keys()
    assert all(np.array_equal(state_dict[name], x) for name, x in expected.items())


def test_transformer_folder_with_old_pickle_is_read(folder, tmp_path):
    expected, model, settings = diffusers_dit.read_folder(folder)
    assert settings.diffusion == Diffusion("squared_cosine", 1000)
    net = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    net.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    state_dict, same_model, _ = diffusers_dit.read_folder(tmp_path)
    assert same_model == model
    for name, x in expected.items():
        np.testing.assert_array_equal(state_dict[name], x)


def test_only_the_corrected_transformer_matches_ours(folder):
    model = diffusers_dit.read_folder(folder)[1]
    inputs = parity.inputs(model)
    params = torch_dit.from_official(random_state_dict(), model)
    x, t, y = inputs
    expected = np.asarray(jax.jit(dit.make_apply(model))(params, x, t=t, y=y))
    assert parity.measure(expected, parity.diffusers(folder)(*inputs))["relative"] <= 1e-5
    plain = parity.measure(expected, parity.diffusers(folder, plain=True)(*inputs))
    assert plain["relative"] > 1e-3 and not plain["passed"]


def test_pipeline_opens_and_samples(folder):
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    assert pipeline.get_label_ids(["3", "1"]) == [3, 1]
    pipeline.set_progress_bar_config(disable=True)
    # Guidance 1, because the null class of diffusers is 1000 and the table has 5 classes.
    images = pipeline([3, 1], guidance_scale=1.0, num_inference_steps=3).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_corrected_pipeline_samples_like_ours(folder):
    pipeline = diffusers_pipeline.match_official(diffusers.DiTPipeline.from_pretrained(folder))
    assert pipeline.labels == {str(i): i for i in range(5)}
    noise = np.random.default_rng(2).standard_normal((9, 2, 4, 8, 8), np.float32)
    options = {"num_inference_steps": 8, "noise": noise}
    latents = pipeline([3, 1], output_type="latent", **options).images.numpy()
    with torch.device("meta"):
        net = torch_model.DiT(**CONFIG.to_json())
    tensors = {name: torch.from_numpy(x) for name, x in random_state_dict().items()}
    net.load_state_dict(tensors, assign=True)
    settings = native.settings_of(CONFIG, diffusion=Diffusion("squared_cosine"))
    sampler = torch_model.Sampler(net, bundle.make_config(CONFIG, settings))
    expected = sampler.sample([3, 1], noise=noise, num_steps="8", cfg_scale=4.0).numpy()
    np.testing.assert_allclose(latents, expected, atol=1e-3 * np.abs(expected).max())
    shapes = {"pt": (2, 3, 16, 16), "np": (2, 16, 16, 3)}
    for kind, shape in shapes.items():
        assert pipeline([3, 1], output_type=kind, **options).images.shape == shape
    assert pipeline([3], num_inference_steps=2).images[0].size == (16, 16)


def test_corrected_pipeline_samples_in_bfloat16(folder):
    plain = diffusers.DiTPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    images = diffusers_pipeline.match_official(plain)([3], num_inference_steps=2).images
    assert images[0].size == (16, 16)


def test_corrected_pipeline_keeps_class_names(folder):
    names = {0: "tench, Tinca tinca", 1: "goldfish", 2: "goldfish"}
    plain = diffusers.DiTPipeline.from_pretrained(folder)
    plain = diffusers.DiTPipeline(plain.transformer, plain.vae, plain.scheduler, id2label=names)
    matched = diffusers_pipeline.match_official(plain)
    assert matched.get_label_ids(["Tinca tinca", "goldfish"]) == plain.get_label_ids(
        ["Tinca tinca", "goldfish"]
    )


def test_invalid_pipeline_or_option_is_refused(folder):
    plain = diffusers.DiTPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="pipeline must be a DiTPipeline, got DiTTransformer2DMo"):
        diffusers_pipeline.match_official(plain.transformer)
    matched = diffusers_pipeline.match_official(plain)
    with pytest.raises(UserError, match="output_type must be one of pil, np, pt, latent, got 'jp"):
        matched([3], output_type="jpg")
    with pytest.raises(UserError, match="guidance_channels must be in 0 .. 4, got 5"):
        matched([3], guidance_channels=5)
    matched.vae = None
    with pytest.raises(UserError, match="output_type must be latent if vae is None, got 'pil'"):
        matched([3])
    plain.scheduler.register_to_config(beta_schedule="scaled_linear")
    with pytest.raises(UserError, match="beta_schedule must be one of linear, .* scaled_linear"):
        diffusers_pipeline.match_official(plain)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conditioning": "in_context"}, "conditioning must be adaln_zero for diffusers, got in_"),
        ({"conditioning": "cross_attention"}, "conditioning must be adaln_zero for diffusers"),
        ({"conditioning": "adaln"}, "conditioning must be adaln_zero for diffusers, got adaln"),
        ({"input_size": (8, 4)}, r"input_size must be \(8, 8\) for diffusers, got \(8, 4\)"),
        ({"null_label": False}, "null_label must be True for diffusers, got False"),
        ({"input_size": (4, 8, 8)}, r"input_size must have two axes for PyTorch, got \(4, 8, 8\)"),
    ],
)
def test_config_that_diffusers_cannot_represent_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        diffusers_dit.check(CONFIG._replace(**options))


def broken(folder, tmp_path, change):
    """Copies the transformer and applies `change` to the state dict of the copy."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "transformer" / files.DIFFUSERS_WEIGHTS[0])
    change(weights)
    save_file(weights, tmp_path / files.DIFFUSERS_WEIGHTS[0])
    config = (folder / "transformer" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    return tmp_path


EMBEDDER = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"


def test_different_copies_of_an_embedder_are_refused(folder, tmp_path):
    def change(weights):
        weights[EMBEDDER] = weights[EMBEDDER] + np.float32(1)

    with pytest.raises(
        UserError, match="class_embedder.* must be equal in all blocks, got .* in block 2"
    ):
        diffusers_dit.read_folder(broken(folder, tmp_path, change))


def test_missing_and_surplus_arrays_are_listed(folder, tmp_path):
    def change(weights):
        weights.pop(EMBEDDER)
        weights["stray"] = np.zeros(2, np.float32)

    with pytest.raises(UserError, match=f"DiT of diffusers: missing {EMBEDDER}; surplus stray$"):
        diffusers_dit.read_folder(broken(folder, tmp_path, change))


def test_folder_of_another_kind_is_refused(folder, tmp_path, vae):
    with pytest.raises(UserError, match="DIR must be an existing folder, got .*/nowhere"):
        diffusers_dit.read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="folder must contain a diffusers DiT, got no config.json"):
        diffusers_dit.read_folder(tmp_path)
    with pytest.raises(
        UserError, match="folder must contain a diffusers DiT, got AutoencoderKL in"
    ):
        diffusers_dit.read_folder(vae)
    (tmp_path / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match="must contain diffusion_pytorch_model.safetensors or diff"):
        diffusers_dit.read_folder(tmp_path)
    with pytest.raises(UserError, match="vae must be the folder of a diffusers AutoencoderKL, got"):
        diffusers_dit.check_vae(folder, CONFIG)
    with pytest.raises(UserError, match="vae must have 3 latent channels, got 4"):
        diffusers_dit.check_vae(vae, CONFIG._replace(in_channels=3))
    path = folder / "scheduler" / "scheduler_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"beta_schedule": "scaled_linear"}))
    with pytest.raises(UserError, match="beta_schedule must be one of linear, .* scaled_linear"):
        diffusers_dit.read_folder(folder)
    path.write_text(before)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"beta_schedule": ["linear"]}, "beta_schedule must be one of linear, squaredcos_cap_v2"),
        ({"prediction_type": "v_prediction"}, "prediction_type must be epsilon in a DiT, got v_"),
        ({"trained_betas": [0.1]}, "trained_betas must be None in a DiT"),
        (
            {"beta_schedule": "linear", "beta_end": 0.012},
            "beta_end must be 0.02 in a DiT, got 0.01",
        ),
        ({"num_train_timesteps": "many"}, "num_train_timesteps must be an integer .* 'many'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1"),
    ],
)
def test_scheduler_that_is_not_dits_is_refused(folder, fields, message):
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    with pytest.raises(UserError, match=message):
        diffusers_dit.read_diffusion(config | fields)


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
@pytest.mark.parametrize("num_steps", [100, 1000])
def test_scheduler_has_our_noise_levels(tmp_path, schedule, num_steps):
    settings = native.settings_of(CONFIG, diffusion=Diffusion(schedule, num_steps))
    diffusers_dit.write_folder(tmp_path / "out", random_state_dict(), CONFIG, settings)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    expected = schedules.make(schedule, num_steps).alpha_bar
    np.testing.assert_allclose(scheduler.alphas_cumprod, expected, rtol=2e-4)  # float32 products
    _, _, back = diffusers_dit.read_folder(tmp_path / "out", space="pixels")
    assert back.diffusion == settings.diffusion and back.data.space == "pixels"
    assert int(back.sampling.num_steps) <= num_steps


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_layers", "four", "num_layers must be an integer of at least 1, got 'four'"),
        ("patch_size", 0, "patch_size must be an integer of at least 1, got 0"),
        ("patch_size", 4, "patch_size must be 2, as in the weights, got 4"),
        ("sample_size", 7, "sample_size must be divisible by patch_size 2, got 7"),
        ("num_layers", 3, "num_layers must be 4, as in the weights, got 3"),
        ("num_embeds_ada_norm", 1000, "num_embeds_ada_norm must be 5, as in the weights, got"),
        ("num_attention_heads", 2, "attention_head_dim must be 128, as in the weights, got 64"),
        ("in_channels", 8, "in_channels must be 4, as in the weights, got 8"),
        ("out_channels", 5, "out_channels must be 4 or 8, got 5"),
        ("out_channels", 4, "out_channels must be 8, as in the weights, got 4"),
        ("activation_fn", "geglu", "activation_fn must be gelu-approximate in a DiT, got geglu"),
        ("norm_type", "layer_norm", "norm_type must be ada_norm_zero in a DiT, got layer_norm"),
    ],
)
def test_config_that_contradicts_the_weights_is_refused(folder, tmp_path, field, value, message):
    path = broken(folder, tmp_path, lambda weights: None)
    config = json.loads((path / "config.json").read_text()) | {field: value}
    if field == "in_channels":
        config["out_channels"] = 16
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        diffusers_dit.read_folder(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json must be JSON"),
        ("[1]", "config.json must be a JSON object, got list"),
        (
            '{"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}',
            "must have 'sample_size' in its JSON files",
        ),
    ],
)
def test_incomplete_config_is_refused(folder, tmp_path, text, message):
    path = broken(folder, tmp_path, lambda weights: None)
    (path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        diffusers_dit.read_folder(path)
