import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.models import dit, transfer

CONFIG = dit.DiTConfig((8, 8), 2, 1, 2, 16, 2, 5, True, True, "adaln_zero")
ROWS = tuple(range(5))


@functools.cache
def make_params(config=CONFIG):
    """Random parameters without zeros."""
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)


def fit(target, rows=ROWS, source=CONFIG):
    """The parameters of `source`, fitted to `target` as in a run: jitted."""
    adapt = functools.partial(transfer.adapt, source=source, target=target, rows=rows)
    return jax.jit(adapt)(make_params(source))


def table(params):
    return np.asarray(params["y_embedder"]["embedding_table"]["embedding"])


def predict(config, params, x, y):
    t = jnp.arange(len(x)) * 300
    return jax.jit(dit.make_apply(config))(params, x, t=t, y=jnp.asarray(y))


def enlarge(x, factor):
    """Each 2x2 patch of x (N, H, W, C), enlarged by linear interpolation within the patch."""
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c)
    q = 2 * factor
    patches = jax.image.resize(patches, (n, h // 2, q, w // 2, q, c), "linear")
    return patches.reshape(n, h * factor, w * factor, c)


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({}, ROWS),
        ({"num_classes": 7}, (*ROWS, None, None)),
        ({"num_classes": 2, "null_label": False}, (4, 0)),
        ({"patch_size": 4, "learn_sigma": False}, ROWS),
        ({"patch_size": 1, "input_size": (6, 4)}, ROWS),
    ],
)
def test_the_result_has_the_shapes_of_the_new_model(changes, rows):
    target = CONFIG._replace(**changes)
    expected = jax.eval_shape(lambda: dit.init(target, jax.random.key(0)))
    found = jax.eval_shape(lambda: fit(target, rows))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_the_same_model_takes_everything_unchanged():
    jax.tree.map(np.testing.assert_array_equal, fit(CONFIG), make_params())
    other_size = CONFIG._replace(input_size=(16, 4))  # the position table is no parameter
    jax.tree.map(np.testing.assert_array_equal, fit(other_size), make_params())


def test_new_rows_of_the_label_table_start_from_the_null_label_which_stays_last():
    old = table(make_params())
    grown = table(fit(CONFIG._replace(num_classes=7), (*ROWS, None, None)))
    np.testing.assert_array_equal(grown, old[[0, 1, 2, 3, 4, 5, 5, 5]])
    shrunk = table(fit(CONFIG._replace(num_classes=3), (4, None, 0)))
    np.testing.assert_array_equal(shrunk, old[[4, 5, 0, 5]])


def test_models_without_a_null_label_get_and_give_none():
    without = CONFIG._replace(null_label=False)
    np.testing.assert_array_equal(table(fit(without)), table(make_params())[:5])
    grown = table(fit(CONFIG._replace(num_classes=6), (*ROWS, None), source=without))
    old = table(make_params(without))
    mean = old.mean(axis=0)
    np.testing.assert_allclose(grown, np.stack([*old, mean, mean]), rtol=1e-6)  # float32


@pytest.mark.parametrize("factor", [2, 4])
def test_larger_patches_of_enlarged_images_give_the_same_tokens_and_predictions(factor):
    target = CONFIG._replace(patch_size=2 * factor, input_size=(8 * factor, 8 * factor))
    x = jax.random.normal(jax.random.key(3), (3, 8, 8, 1))
    small = predict(CONFIG, make_params(), x, [0, 4, 5])
    large = predict(target, fit(target), enlarge(x, factor), [0, 4, 5])
    np.testing.assert_allclose(large, enlarge(small, factor), atol=2e-4)  # float32, two blocks


def test_patches_of_any_rank_are_resized():
    video = CONFIG._replace(input_size=(4, 4, 4), in_channels=2)
    target = video._replace(patch_size=4, input_size=(8, 8, 8))
    x = jax.random.normal(jax.random.key(3), (1, 2, 2, 2, 2))  # one patch
    large = jax.image.resize(x, (1, 4, 4, 4, 2), "linear")
    kernels = [
        params["x_embedder"]["proj"]["kernel"]
        for params in (make_params(video), fit(target, source=video))
    ]
    tokens = [x.reshape(-1) @ kernel for x, kernel in zip((x, large), kernels, strict=True)]
    np.testing.assert_allclose(*tokens, atol=1e-5)  # float32


def test_smaller_patches_embed_as_closely_as_possible():
    """The least-squares solution over both axes at once."""
    target = CONFIG._replace(patch_size=1)
    found = fit(target)["x_embedder"]["proj"]["kernel"]
    resize = transfer.resize_matrix(2, 1)
    old = np.asarray(make_params()["x_embedder"]["proj"]["kernel"], np.float64)
    expected = np.linalg.lstsq(np.kron(resize, resize).T, old, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "old, new", [(2, 4), (4, 2), (2, 8), (8, 2), (3, 5), (5, 3), (1, 4), (4, 1)]
)
def test_the_matrix_resizes_as_jax_does(old, new):
    expected = jax.image.resize(jnp.eye(old), (new, old), "linear")
    np.testing.assert_allclose(transfer.resize_matrix(old, new), expected, atol=1e-6)


def test_a_new_condition_has_no_effect_and_can_learn():
    source = CONFIG._replace(conditions=("t", "h", "y"))
    target = CONFIG._replace(conditions=("t", "h", "omega", "y"))
    params, x = fit(target, source=source), jax.random.normal(jax.random.key(3), (2, 8, 8, 1))
    given = {"t": jnp.array([0.2, 0.9]), "h": jnp.array([0.2, 0.0]), "y": jnp.array([0, 5])}
    expected = jax.jit(dit.make_apply(source))(make_params(source), x, **given)

    def total(params):
        out = dit.make_apply(target)(params, x, omega=jnp.array([1.0, 7.0]), **given)
        return jnp.sum(out**2), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert np.abs(grads["omega_embedder"]["fc2"]["kernel"]).max() > 1e-4
    lines = transfer.describe(source, target, ROWS)
    assert "condition omega: new, starts without effect" in lines
    in_context = [config._replace(conditioning="in_context") for config in (source, target)]
    lines = transfer.describe(*in_context, ROWS)
    assert "condition omega: new, starts as a token of zeros" in lines


def test_a_condition_that_is_not_asked_for_is_left_out():
    source = CONFIG._replace(conditions=("t", "h", "y"))
    found = fit(CONFIG, source=source)
    assert found.keys() == make_params(CONFIG).keys()
    assert "condition h: left out" in transfer.describe(source, CONFIG, ROWS)


def test_a_variance_does_not_become_a_velocity():
    target = CONFIG._replace(learn_sigma=False, velocity_head=True)
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 1))
    new = predict(target, fit(target), x, [0, 1])
    np.testing.assert_allclose(
        new[..., :1], predict(CONFIG, make_params(), x, [0, 1])[..., :1], atol=1e-6
    )
    assert not np.any(new[..., 1:])
    lines = transfer.describe(CONFIG, target, ROWS)
    assert "velocity head in the final layer: new, starts at 0" in lines


def test_a_variance_is_left_out_or_starts_at_0():
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 1))
    both = predict(CONFIG, make_params(), x, [0, 1])
    without = CONFIG._replace(learn_sigma=False)
    np.testing.assert_allclose(predict(without, fit(without), x, [0, 1]), both[..., :1], atol=1e-6)
    old = predict(without, make_params(without), x, [0, 1])
    new = predict(CONFIG, fit(CONFIG, source=without), x, [0, 1])
    np.testing.assert_allclose(new[..., :1], old, atol=1e-6)
    assert not np.any(new[..., 1:])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"depth": 3},
            "^model.size must have depth 2, hidden_size 16, num_heads 2 as in init_from, got depth",
        ),
        (
            {"conditioning": "adaln"},
            "^model.conditioning must be adaln_zero as in init_from, got ad",
        ),
        ({"in_channels": 4}, "^model.in_channels must be 1 as in init_from, got 4$"),
        (
            {"input_size": (8, 8, 8)},
            r"^model.input_size must have 2 axes as in init_from, got \(8, 8, 8\)$",
        ),
    ],
)
def test_a_model_that_cannot_take_the_parameters_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        transfer.check(CONFIG, CONFIG._replace(**changes))


def test_what_changes_is_described():
    transfer.check(CONFIG, CONFIG)
    assert transfer.describe(CONFIG, CONFIG, ROWS) == ["everything: taken as it is"]
    target = CONFIG._replace(
        input_size=(16, 8), patch_size=4, num_classes=3, learn_sigma=False, null_label=False
    )
    assert transfer.describe(CONFIG, target, (4, None, 0)) == [
        "label table: 2 labels taken, 3 left out, 1 new from the null label",
        "patch embedding and final layer: resized from patch size 2 to 4",
        "variance in the final layer: left out",
        "position table: computed anew, from 4 x 4 to 4 x 2 tokens",
        "everything else: taken as it is",
    ]
    assert transfer.describe(target, CONFIG, (0, 1, 2, None, None))[0] == (
        "label table: 3 labels taken, 0 left out, 2 new from the mean of all labels"
    )
