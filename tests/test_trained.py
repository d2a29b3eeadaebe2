import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.models import dit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, its parameters and their average."""
    path = tmp_path_factory.mktemp("run")
    return path, *random_run.save(path)


def test_the_average_is_opened_unless_told_otherwise(run):
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


def test_a_call_is_the_forward_pass_also_inside_a_jit(run):
    path, _, ema = run
    model = dit_jax.load(path)
    x, t, y = jnp.ones((8, 8, 8, 1)), jnp.arange(8), jnp.arange(8)
    out = model(x, t, y)
    assert out.shape == (8, 8, 8, 2) and out.dtype == jnp.float32
    expected = dit.make_apply(model.config)(ema, x, t, y)
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


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([3, 10], {}, "labels must be in 0 .. 9, got 10"),
        ([-1], {}, "labels must be in 0 .. 9, got -1"),
        ([0.5], {}, r"labels must be a list of whole numbers, got \[0.5\]"),
        ([], {}, "labels must be a list of whole numbers"),
        (3, {}, "labels must be a list of whole numbers, got 3"),
        ([3], {"scale": 2}, "a sampling option must be one of sampler, .*, got scale"),
        ([3], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([3], {"sampler": "heun"}, "sampler must be one of ddpm, ddim, got 'heun'"),
    ],
)
def test_what_cannot_be_sampled_is_named(run, labels, options, message):
    with pytest.raises(ValueError, match=message):
        dit_jax.load(run[0]).sample(labels, **options)


def test_what_cannot_be_called_is_named(run):
    model, x = dit_jax.load(run[0]), jnp.ones((2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"x, t and y must have shapes \(2, 8, 8, 1\), \(2,\)"):
        model(x[..., 0], jnp.zeros(2), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"got \(2, 8, 8, 1\), \(3,\) and \(2,\)"):
        model(x, jnp.zeros(3), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="labels must be in 0 .. 10, got 11"):
        model(x, jnp.zeros(2), jnp.array([11, 0]))


def test_what_cannot_be_loaded_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="must be a directory with a saved step, got .*nothing"):
        dit_jax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="weights must be ema or params, got 'best'"):
        dit_jax.load(run[0], weights="best")
    with pytest.raises(ValueError, match="'cudnn' only on a GPU"):
        dit_jax.load(run[0], attention="cudnn")
