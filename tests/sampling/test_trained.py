import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.models import dit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, its parameters and their EMA."""
    path = tmp_path_factory.mktemp("run")
    return path, *random_run.save(path)


def test_the_ema_is_loaded_by_default(run):
    path, params, ema = run
    model = dit_jax.load(path)
    assert model.step == 30
    assert model.config.hidden_size == 128 and model.config.input_size == (8, 8)
    np.testing.assert_array_equal(
        model.params["x_embedder"]["proj"]["kernel"], ema["x_embedder"]["proj"]["kernel"]
    )
    plain = dit_jax.load(path / "checkpoints", weights="params")
    np.testing.assert_array_equal(
        plain.params["x_embedder"]["proj"]["kernel"], params["x_embedder"]["proj"]["kernel"]
    )


def test_a_call_is_the_forward_pass_inside_a_jit_too(run):
    path, _, ema = run
    model = dit_jax.load(path)
    x, t, y = jnp.ones((8, 8, 8, 1)), jnp.arange(8), jnp.arange(8)
    out = model(x, t, y)
    assert out.shape == (8, 8, 8, 2) and out.dtype == jnp.float32
    expected = dit.make_apply(model.config)(ema, x, t=t, y=y)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model)(x, t, y), out, rtol=1e-4, atol=1e-5)
    assert model(x[:1], [5], [10]).shape == (1, 8, 8, 2)  # lists; the null label


def test_samples_follow_labels_seed_and_options(run):
    model = dit_jax.load(run[0])
    images = model.sample([3, 1, 4])
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, model.sample(np.array([3, 1, 4])))
    for options in ({"seed": 1}, {"cfg_scale": 1.0}, {"num_steps": 6}, {"cfg_interval": [0, 400]}):
        assert not np.array_equal(images, model.sample([3, 1, 4], **options)), options
    plain = model.sample([3], cfg_interval=(0, 400), cfg_scale=3.0, seed=2**32 - 1)
    arrays = {"cfg_interval": np.array([0, 400]), "cfg_scale": jnp.float32(3)}
    np.testing.assert_array_equal(plain, model.sample([3], **arrays, seed=2**32 - 1))


def test_repr_names_size_design_step_and_weights(run):
    assert repr(dit_jax.load(run[0])) == "LoadedDiT(Ti/4 adaln_zero, step 30, ema)"


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([3, 10], {}, "labels must be in 0 .. 9, got 10"),
        ([-1], {}, "labels must be in 0 .. 9, got -1"),
        ([0.5], {}, r"labels must be a list of whole numbers, got \[0.5\]"),
        ([], {}, "labels must be a list of whole numbers"),
        (3, {}, "labels must be a list of whole numbers, got 3"),
        ([[1], [2, 3]], {}, r"labels must be a list of whole numbers, got \[\[1\], \[2, 3\]\]"),
        ([10**22], {}, "labels must be in 0 .. 9, got 10000000000000000000000"),
        ([True], {}, r"labels must be a list of whole numbers, got \[True\]"),
        ([3], {"seed": -1}, "seed must be a whole number in 0 .. 4294967295, got -1"),
        ([3], {"seed": 2**32}, "seed must be a whole number in 0 .. 4294967295, got 4294967296"),
        ([3], {"seed": None}, "seed must be a whole number in 0 .. 4294967295, got None"),
        ([3], {"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ([3], {"batch_size": "a"}, "batch_size must be a whole number of at least 1, got 'a'"),
        ([3], {"cfg_scale": "2"}, "cfg_scale must be a number, got '2'"),
        ([3], {"cfg_scale": None}, "cfg_scale must be a number, got None"),
        ([3], {"num_steps": None}, "num_steps must be text, got None"),
        ([3], {"cfg_interval": None}, "cfg_interval must be a list, got None"),
        ([3], {"cfg_interval": [[0], [1]]}, "cfg_interval must be two numbers"),
        ([3], {"sampler": ["ddim"]}, "sampler must be text, got"),
        ([3], {"clip_x0": "no"}, "clip_x0 must be true or false, got 'no'"),
        ([3], {"scale": 2}, "a sampling option must be one of sampler, .*, got scale"),
        ([3], {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ([3], {"sampler": "heun"}, "sampler must be one of ddpm, ddim, got 'heun'"),
    ],
)
def test_sample_names_bad_arguments(run, labels, options, message):
    with pytest.raises(ValueError, match=message):
        dit_jax.load(run[0]).sample(labels, **options)


X, T, Y = np.ones((2, 8, 8, 1), np.float32), np.array([0, 999]), np.array([0, 10])


@pytest.mark.parametrize(
    "x, t, y, message",
    [
        (X[..., 0], T, Y, r"\(N, 8, 8, 1\), \(N,\) and \(N,\), .*, got \(2, 8, 8\), \(2,\) and"),
        (X, T[:1], Y, r"x, t and y must have shapes .* got \(2, 8, 8, 1\), \(1,\) and \(2,\)"),
        (X, 5, 3, r"x, t and y must have shapes .* got \(2, 8, 8, 1\), \(\) and \(\)"),
        (X[:0], [], [], "x, t and y must have shapes .*, N at least 1, got"),
        (None, T, Y, "x must be an array of numbers, got None"),
        (X, "t", Y, "t must be an array of numbers, got 't'"),
        (X, T, [[1], [2, 3]], "y must be an array of numbers, got"),
        (X, [0, 1000], Y, "t must be in 0 .. 999, got 1000"),
        (X, [-1, 0], Y, "t must be in 0 .. 999, got -1"),
        (X, [0.5, np.nan], Y, "t must be in 0 .. 999, got nan"),
        (X, T, [11, 0], "y must be in 0 .. 10, got 11"),
    ],
)
def test_call_names_bad_arguments(run, x, t, y, message):
    with pytest.raises(ValueError, match=message):
        dit_jax.load(run[0])(x, t, y)


def test_load_names_bad_arguments(run, tmp_path):
    with pytest.raises(ValueError, match="must be a directory with a saved step, got .*nothing"):
        dit_jax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="weights must be ema or params, got 'best'"):
        dit_jax.load(run[0], weights="best")
    with pytest.raises(ValueError, match="'cudnn' only on a GPU"):
        dit_jax.load(run[0], attention="cudnn")
