"""The PyTorch DiT of the bundles matches ours: forward passes, schedules and samples."""

import functools
import gc
import itertools
import math

import jax
import numpy as np
import pytest
import torch

from dit_jax.convert import parity, torch_dit, torch_model
from dit_jax.diffusion import ddpm, guidance, samplers, schedules, solvers
from dit_jax.diffusion.process import predictor
from dit_jax.models import dit

CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")


def random_model(config, seed=0):
    """Returns (parameters, PyTorch model) with the same random weights."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))

    def draw(x):  # scaled to keep activations near 1
        is_joined = len(x.shape) > 2 and x.shape[-2] <= 3  # queries, keys and values in one array
        shape = (*x.shape[:-2], -1) if is_joined else x.shape
        fan_in = shape[-2] if len(shape) > 1 else 100
        return rng.standard_normal(x.shape, np.float32) * np.float32(0.7 / np.sqrt(fan_in))

    params = jax.tree.map(draw, shapes)
    state_dict = torch_dit.to_official(dict(params), config)
    with torch.device("meta"):
        net = torch_model.DiT(**config.to_json())
    net.load_state_dict({k: torch.from_numpy(x) for k, x in state_dict.items()}, assign=True)
    return params, net


def relative_error(config):
    """Returns the relative error of the forward passes of JAX and PyTorch on `parity.inputs`."""
    params, net = random_model(config)
    inputs = parity.inputs(config)
    x, t, y = inputs
    expected = np.asarray(jax.jit(dit.make_apply(config))(params, x, t=t, y=y))
    del params
    return parity.measure(expected, parity.run_torch(net, *inputs))["relative"]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": (4, 12), "in_channels": 1, "num_classes": 5},
        {"in_channels": 3, "learn_sigma": False, "num_classes": 1, "null_label": False},
    ],
)
def test_every_design_matches(conditioning, options):
    config = dit.configure("Ti", 4, conditioning=conditioning, **options)
    assert relative_error(config) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, patch_size, extent",
    [*itertools.product(["S", "B", "L"], [2, 4, 8], [32, 64]), ("XL", 2, 32), ("XL", 8, 64)],
)
def test_every_size_matches(size, patch_size, extent):
    error = relative_error(dit.configure(size, patch_size, input_size=(extent, extent)))
    gc.collect()
    print(f"DiT-{size}/{patch_size} at {extent}: {error:.1e}")
    assert error <= 2e-5


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine"])
@pytest.mark.parametrize("spacing", ["250", "7", "ddim50", "ddim7"])
def test_schedules_match(schedule, spacing):
    ours = schedules.respace(schedules.make(schedule, 1000), spacing)
    alpha_bar, timestep = torch_model.make_schedule(schedule, 1000, spacing)
    # The last alpha_bar of squared_cosine is 2e-9, a difference of numbers near 1.
    np.testing.assert_allclose(alpha_bar, ours.alpha_bar, rtol=1e-12, atol=1e-16)
    assert timestep == ours.timestep.tolist()


def test_spacing_without_integer_stride_is_refused():
    with pytest.raises(ValueError, match="num_steps must be 2 to 1000, got 1001"):
        torch_model.keep_steps(1000, "1001")
    with pytest.raises(
        ValueError, match="num_steps must have an integer stride over 1000 steps, got ddim600"
    ):
        torch_model.keep_steps(1000, "ddim600")


SAMPLING = {
    "sampler": "ddpm",
    "num_steps": "10",
    "eta": 0.0,
    "clip_x0": False,
    "cfg_scale": 3.0,
    "cfg_channels": 3,
    "cfg_interval": (0, 999),
}


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7, "num_steps": "ddim8"},
        {"clip_x0": True, "cfg_channels": 0},
        {"sampler": "ddim", "clip_x0": True, "cfg_interval": (100, 600)},
        {"cfg_scale": 1.0},
    ],
)
def test_same_noise_gives_same_samples(learn_sigma, options):
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5, learn_sigma=learn_sigma)
    params, net = random_model(config)
    options = SAMPLING | options
    process = ddpm.DDPM(schedules.linear())
    levels = process.levels(options["num_steps"])
    shape = (levels.num_steps + 1, 2, 8, 8, 4)
    noise = np.random.default_rng(1).standard_normal(shape, np.float32)
    y = np.array([3, 1])
    network = guidance.guide(
        functools.partial(dit.make_apply(config), params),
        {"y": y},
        nulls={"y": 5},
        channels=options["cfg_channels"] or 4,
    )
    scales = guidance.scales(levels, scale=options["cfg_scale"], interval=options["cfg_interval"])
    predict = predictor(network, process, levels, clip_x0=options["clip_x0"], scales=scales)
    extra = {"eta": options["eta"]} if options["sampler"] == "ddim" else {}
    sampler = solvers.SAMPLERS[options["sampler"]](levels, **extra)

    @jax.jit
    def run(x, noise):  # noise[j] belongs to the step that ends j steps before the data
        return samplers.run(sampler, predict, x, noise_at=lambda i: noise[levels.num_steps - 1 - i])

    expected = run(noise[-1], noise[:-1])
    settings = {
        "space": "latents",
        "diffusion": {"schedule": "linear", "num_steps": 1000},
        "sampling": options,
    }
    x = torch_model.Sampler(net.eval(), settings).sample(y, noise=noise.transpose(0, 1, 4, 2, 3))
    actual = x.numpy().transpose(0, 2, 3, 1)
    assert np.abs(actual - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([2, 5], {}, "labels must be integers in 0 .. 4, got 5"),
        ([2, 0.5], {}, "labels must be integers in 0 .. 4, got 0.5"),
        (["cat"], {}, "labels must be integers in 0 .. 4, got 'cat'"),
        (3, {}, "labels must be a list of integers, got 3"),
        ([], {}, r"labels must be a list of integers, got \[\]"),
        ([2], {"scale": 3}, "option must be one of sampler, .*, cfg_interval, got scale"),
        ([2], {"sampler": "euler"}, "sampler must be ddpm or ddim, got 'euler'"),
        ([2], {"num_steps": "xx"}, "num_steps must be a count such as 250 or ddim50, got 'xx'"),
        ([2], {"num_steps": 1}, "num_steps must be 2 to 1000, got 1"),
        ([2], {"eta": "much"}, "eta must be in 0 .. 1, got 'much'"),
        ([2], {"clip_x0": "yes"}, "clip_x0 must be True or False, got 'yes'"),
        (
            [2],
            {"cfg_scale": -1},
            "cfg_scale must be 1, or at least 0 if the model has a null label, got -1",
        ),
        (
            [2],
            {"cfg_channels": 5},
            "cfg_channels must be 0 or a number of channels of the model, got 5",
        ),
        (
            [2],
            {"cfg_interval": (9, 3)},
            r"cfg_interval must be two steps in ascending order, got \(9, 3\)",
        ),
        ([2], {"cfg_interval": (-5, -1)}, "cfg_interval must be two steps in ascending order, got"),
        (
            [2],
            {"cfg_interval": "ab"},
            "cfg_interval must be two steps in ascending order, got 'ab'",
        ),
        (
            [2],
            {"cfg_channels": 1.0},
            "cfg_channels must be 0 or a number of channels of the model, got 1.0",
        ),
        (
            [2],
            {"cfg_scale": math.inf},
            "cfg_scale must be 1, or at least 0 if the model has a null label, got",
        ),
        (
            [2],
            {"cfg_scale": np.ones(2)},
            "cfg_scale must be 1, or at least 0 if the model has a null label",
        ),
        ([2], {"noise": np.zeros((4, 1, 8, 8))}, r"noise must have shape \(\d+, 1, 4, 8, 8\), got"),
        ([2], {"cfg_interval": 3}, "cfg_interval must be two steps in ascending order, got 3"),
    ],
)
def test_invalid_label_or_option_is_refused(labels, options, message):
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5)
    settings = {
        "space": "latents",
        "diffusion": {"schedule": "linear", "num_steps": 1000},
        "sampling": SAMPLING,
    }
    sampler = torch_model.Sampler(random_model(config)[1], settings)
    with pytest.raises(ValueError, match=message):
        sampler.sample(labels, **options)


def test_bfloat16_model_samples():
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5)
    settings = {
        "space": "latents",
        "diffusion": {"schedule": "linear", "num_steps": 1000},
        "sampling": SAMPLING,
    }
    net = random_model(config)[1]
    exact = torch_model.Sampler(net, settings).sample([2])
    rough = torch_model.Sampler(net.bfloat16(), settings).sample([2])
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.3 * exact.abs().max()  # bfloat16 has 8 bits


def test_folder_without_bundle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="path must be the folder of a bundle, got"):
        torch_model.load(tmp_path)


def test_guidance_needs_a_null_label():
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5, null_label=False)
    settings = {"space": "latents", "sampling": SAMPLING}
    sampler = torch_model.Sampler(random_model(config)[1], settings)
    with pytest.raises(
        ValueError, match="cfg_scale must be 1, or at least 0 if .* null label, got 4.0"
    ):
        sampler.sample([2], cfg_scale=4.0)
