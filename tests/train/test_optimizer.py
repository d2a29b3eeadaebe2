import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from dit_jax import compat, settings
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.train import frozen, optimizer

CONFIG = dit.DiTConfig((4, 4), 2, 1, 3, 16, 2, 10, True, True, "adaln_zero")
MATRICES = {"attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaLN_modulation"}


def rates(steps, **options):
    defaults = {"learning_rate": 1e-4, "warmup_steps": 0, "decay_steps": 0}
    schedule = optimizer.learning_rate_schedule(**defaults | options)
    return [float(schedule(step)) for step in steps]


def make(name, **options):
    defaults = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    defaults |= {"clip_norm": 0.0, "warmup_steps": 0, "decay_steps": 0}
    return optimizer.make(name, **defaults | options)


def test_the_learning_rate_is_constant_without_warmup_and_decay():
    np.testing.assert_allclose(rates([0, 1, 10_000_000]), 1e-4)


def test_the_learning_rate_rises_in_warmup_and_falls_to_zero():
    warm = rates([0, 5, 10, 20], warmup_steps=10)
    np.testing.assert_allclose(warm, [0, 0.5e-4, 1e-4, 1e-4], rtol=1e-6)
    short = rates([0, 10, 60, 110, 120], warmup_steps=10, decay_steps=110)
    np.testing.assert_allclose(short, [0, 1e-4, 0.5e-4, 0, 0], rtol=1e-5, atol=1e-12)


def test_decay_must_end_after_warmup():
    with pytest.raises(UserError, match="decay_steps must be 0 or above warmup_steps 10, got 10"):
        rates([0], warmup_steps=10, decay_steps=10)


def test_adamw_follows_its_formula():
    values = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    adamw = make("adamw", learning_rate=0.01, **values)
    params = expected = np.array([1.0, -2.0])
    m = v = np.zeros(2)
    with jax.numpy_dtype_promotion("standard"):
        state = adamw.init(params.astype(np.float32))
        for i, grad in enumerate([np.array([0.3, -0.1]), np.array([-0.2, 0.4])], start=1):
            updates, state = adamw.update(grad.astype(np.float32), state, params.astype(np.float32))
            params = params + np.asarray(updates)
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            adam = (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
            expected = expected - 0.01 * (adam + 0.1 * expected)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_settings_know_the_optimizers():
    assert settings.OPTIMIZERS == tuple(optimizer.OPTIMIZERS)


@pytest.mark.parametrize("name", settings.OPTIMIZERS)
@pytest.mark.parametrize("norm, clipped", [(0.4, 0.4), (2.0, 1.0)])
def test_gradients_above_the_norm_are_scaled_to_it_together(name, norm, clipped, monkeypatch):
    """With an optimizer that keeps what it is given."""
    keep = optax.GradientTransformation(
        lambda params: (), lambda grads, state, _=None: (grads, state)
    )
    monkeypatch.setitem(optimizer.OPTIMIZERS, name, lambda rate, **options: keep)
    clip = make(name, clip_norm=1.0)
    grads = {
        "a": np.float32([0.6, 0]) * np.float32(norm),
        "b": np.float32([[0.8]]) * np.float32(norm),
    }
    with compat.default_arithmetic():
        updates, _ = clip.update(grads, clip.init(grads), grads)
    np.testing.assert_allclose(updates["a"], [0.6 * clipped, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [[0.8 * clipped]], rtol=1e-6)


def test_without_clipping_the_state_is_the_optimizers_own():
    params = {"kernel": np.zeros((2, 3), np.float32)}
    plain = optax.adamw(optax.constant_schedule(1e-3)).init(params)
    assert jax.tree.structure(make("adamw").init(params)) == jax.tree.structure(plain)


@pytest.fixture(scope="module")
def muon_step():
    """(parameters, gradients, updates / learning rate, state) of Muon's first step: flat dicts."""
    params = dit.init(CONFIG, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    grads = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    muon = make("muon")
    with compat.default_arithmetic():
        state = muon.init(params)
        updates, state = jax.jit(muon.update)(grads, state, params)
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (params, grads, updates)]
    return flat[0], flat[1], {path: np.asarray(x) / 1e-3 for path, x in flat[2].items()}, state


def is_matrix(path):
    return path in {f"blocks/{name}/kernel" for name in MATRICES}


def test_muon_orthogonalises_every_kernel_of_the_blocks_layer_by_layer(muon_step):
    params, grads, updates, _ = muon_step
    found = [path for path in params if is_matrix(path)]
    assert len(found) == len(MATRICES)
    for path in found:
        x, given = updates[path], np.asarray(grads[path])
        if "qkv" in path:  # q, k and v are matrices of their own
            x, given = (y.transpose(0, 2, 1, 3).reshape(-1, 16, 16) for y in (x, given))
        assert x.ndim == 3
        for one, grad in zip(x, given, strict=True):
            size = optimizer.UPDATE_RMS * max(one.shape) ** 0.5
            values = np.linalg.svd(one, compute_uv=False) / size
            assert 0.6 < np.median(values) < values.max() < 1.25, path  # five steps, not exact
            assert 0.14 < np.sqrt(np.mean(one**2)) < 0.21, path  # as AdamW's
            u, _, v = np.linalg.svd(-grad, full_matrices=False)
            assert np.sum(one / size * (u @ v)) > 0.75 * min(one.shape), path  # the same directions


def test_adam_trains_everything_else(muon_step):
    params, grads, updates, state = muon_step
    adam, muon = state.inner_states["adam"], state.inner_states["muon"]
    counted = {name: len(jax.tree.leaves(s)) for name, s in {"adam": adam, "muon": muon}.items()}
    others = [path for path in params if not is_matrix(path)]
    assert counted["muon"] == len(MATRICES) + 2 + 1  # momentum; count, coefficients; schedule
    assert counted["adam"] == 2 * len(others) + 2
    for path in others:  # the first step of Adam with Nesterov momentum: 1.0 to 1.5 in size
        np.testing.assert_array_less(0.99, np.abs(updates[path]), path)
        assert (np.sign(updates[path]) == -np.sign(grads[path])).all()


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention", "adaln"])
def test_muon_has_a_matrix_for_the_kernels_of_every_design(conditioning):
    config = CONFIG._replace(conditioning=conditioning)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    numbers = traverse_util.flatten_dict(optimizer._matrices(params), sep="/")
    shapes = traverse_util.flatten_dict(params, sep="/")
    chosen = {path for path, each in numbers.items() if each}
    assert chosen == {path for path in shapes if path.startswith("blocks") and "kernel" in path}
    for path in chosen:
        assert numbers[path] == (1, shapes[path].ndim - 1)


def test_muon_takes_only_the_parameters_that_are_trained():
    params = dit.init(CONFIG, jax.random.key(0))
    muon = frozen.leave_out(make("muon"), ("attn", "y_embedder"))
    trained, _ = frozen.split(params, ("attn", "y_embedder"))
    with compat.default_arithmetic():
        state = jax.eval_shape(muon.init, params)
        updates, _ = jax.eval_shape(muon.update, trained, state, trained)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
