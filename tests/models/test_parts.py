"""The parts of a block that the paper's DiT does not have: RMSNorm, SwiGLU, RoPE, class tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import apply_linear, normal, with_bias

from dit_jax.errors import UserError
from dit_jax.models import attention, dit, fields, flops, layers, transfer
from dit_jax.settings import Model

FLOAT32 = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
JIT = {"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True, "learn_sigma": False}
TOKENS = {"class_tokens": 3, "class_tokens_from": 2}
SMALL = {"input_size": (8, 12), "in_channels": 3, "num_classes": 5}
ALL = JIT | TOKENS | SMALL | {"bottleneck": 10}
IMAGENET = {"in_channels": 3, "class_tokens": 32} | JIT


def rms(x, weight):
    x = np.float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight[...])


def turned(x, rows, columns):
    """RoPE in float64, number by number: x (N, T, K, d), whose first half turns by the row."""
    x, out = np.float64(x), np.array(x, np.float64)
    pairs = x.shape[-1] // 4
    for token in range(rows * columns):
        for axis, index in enumerate((token // columns, token % columns)):
            for i in range(pairs):
                angle = index * 10_000 ** (-i / pairs)
                a, b = (2 * pairs * axis + 2 * i + k for k in (0, 1))
                first, second = x[:, token, :, a], x[:, token, :, b]
                out[:, token, :, a] = first * np.cos(angle) - second * np.sin(angle)
                out[:, token, :, b] = first * np.sin(angle) + second * np.cos(angle)
    return out


def random_params(config, scale=0.1):
    """Parameters of which none is 0 or 1, so that each part shows."""
    params = jax.jit(lambda: dit.init(config, jax.random.key(0)))()
    return jax.tree.map(lambda x: x + scale * normal(x.size, x.shape), params)


def inputs(config):
    return normal(0, (2, *config.input_size, config.in_channels)), {
        "t": np.array([17.0, 801.0], np.float32),
        "y": np.array([3, 5], np.int32),
    }


def test_rms_norm():
    norm, x = with_bias(layers.RMSNorm(8, **FLOAT32)), normal(0, (2, 3, 8)) + np.float32(2)
    np.testing.assert_allclose(norm(x), rms(x, norm.weight), rtol=1e-5)
    half = jnp.asarray(x, jnp.bfloat16)
    assert norm(half).dtype == jnp.bfloat16
    exact = norm(half.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(norm(half)), np.float32(exact))
    np.testing.assert_array_equal(layers.RMSNorm(8, **FLOAT32).weight[...], np.ones(8))


@pytest.mark.parametrize("size, width", [(768, 2048), (1024, 2730), (1280, 3413), (1664, 4437)])
def test_the_widths_of_swiglu_are_those_of_jit(size, width):
    assert fields.mlp_width("swiglu", size) == width


def test_swiglu():
    mlp, x = with_bias(layers.SwiGLU(9, **FLOAT32)), normal(0, (2, 3, 9))
    gate, value = np.split(apply_linear(mlp.fc1, x), 2, axis=-1)
    assert gate.shape == (2, 3, 24)
    expected = apply_linear(mlp.fc2, gate / (1 + np.exp(-gate)) * value)
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)


def test_a_bottleneck_is_two_linears_of_which_the_first_has_no_bias():
    embed = with_bias(layers.patch_embedder(5)(2, 12, 16, **FLOAT32))
    x = normal(0, (2, 4, 6, 3))
    assert embed.proj1.bias is None
    inner = np.float64(layers.patchify(x, 2)) @ np.asarray(embed.proj1.kernel[...])
    np.testing.assert_allclose(embed(x), apply_linear(embed.proj2, inner), atol=1e-5)


def test_rotation_turns_neighbours_by_row_and_column():
    x = normal(0, (2, 6 + 2, 3, 16))
    found = attention.rotate(x, (2, 3))
    np.testing.assert_allclose(found[:, :6], turned(x[:, :6], 2, 3), atol=1e-5)
    np.testing.assert_array_equal(found[:, 6:], x[:, 6:])  # class tokens have no position
    half = attention.rotate(jnp.asarray(x, jnp.bfloat16), (2, 3))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("grid", [(5,), (4, 5), (3, 4, 2)])
def test_products_of_rotated_tokens_depend_on_the_difference_of_their_positions(grid):
    """On grids of one, two and three axes."""
    token = normal(0, (2, 1, 1, 32))
    q, k = (
        attention.rotate(np.tile(each, (1, int(np.prod(grid)), 1, 1)), grid)[0, :, 0]
        for each in (token[:1], token[1:])
    )
    products = np.asarray(q) @ np.asarray(k).T
    index = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    differences = (index[:, None] - index[None]).reshape(-1, len(grid))
    seen = {}
    for difference, product in zip(map(tuple, differences), products.ravel(), strict=True):
        assert product == pytest.approx(seen.setdefault(difference, product), abs=1e-4)
    values = np.sort(list(seen.values()))
    assert (np.diff(values) > 1e-5).sum() > 0.9 * (len(values) - 1)  # they do depend on it


def test_attention_with_rotation_and_normalised_queries_and_keys():
    layer = attention.Attention(24, 2, grid=(2, 3), qk_norm=True, attention="xla", **FLOAT32)
    layer, x = with_bias(layer), normal(0, (2, 6, 24))
    q, k, v = (each.reshape(2, 6, 2, 12) for each in np.split(apply_linear(layer.qkv, x), 3, -1))
    q, k = turned(rms(q, layer.q_norm.weight), 2, 3), turned(rms(k, layer.k_norm.weight), 2, 3)
    logits = np.einsum("ntkd,nskd->nkts", q, k) / np.sqrt(12)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum("nkts,nskd->ntkd", weights, v).reshape(2, 6, 24)
    np.testing.assert_allclose(layer(x), apply_linear(layer.proj, mixed), atol=1e-4)


@pytest.mark.parametrize(
    "size, patch_size, options, count, gmacs",
    [
        ("B", 16, {"bottleneck": 128, "class_tokens_from": 4}, 131_123_712, 25.22),
        ("L", 16, {"bottleneck": 128, "class_tokens_from": 8}, 458_877_664, 87.94),
        ("H", 16, {"bottleneck": 256, "class_tokens_from": 10}, 952_514_368, 181.95),
        ("G", 16, {"bottleneck": 256, "class_tokens_from": 10}, 2_007_130_000, 383.74),
        ("B", 32, {"bottleneck": 128, "class_tokens_from": 4}, 133_190_400, 25.75),
    ],
)
def test_parameters_and_multiply_adds_of_jit(size, patch_size, options, count, gmacs):
    options |= {"input_size": (16 * patch_size,) * 2}
    config = dit.configure(size, patch_size, **IMAGENET, **options)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert flops.multiply_adds(config) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def value_and_gradients(config, **options):
    """A jitted function of parameters, x, t and y: mean square and output, and its gradients."""
    apply = dit.make_apply(config, **options)

    def loss(params, x, t, y):
        out = apply(params, x, t=t, y=y)
        return jnp.square(out).mean(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    "conditioning",
    [
        pytest.param(name, marks=() if name == "adaln_zero" else pytest.mark.slow)
        for name in fields.DESIGNS
    ],
)
def test_every_design_takes_every_part(conditioning):
    """Every parameter has a gradient, and every step, label and position changes the output."""
    config = dit.configure("Na", 4, conditioning=conditioning, **ALL)
    params, (x, given) = random_params(config), inputs(config)
    run = value_and_gradients(config)
    (_, out), grads = run(params, x, **given)
    assert out.shape == x.shape and out.dtype == np.float32
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 1e-6, path
    for other in ({"t": given["t"] + 50}, {"y": given["y"] - 1}):
        (_, changed), _ = run(params, x, **given | other)
        assert (np.abs(changed - out).max(axis=(1, 2)) > 1e-4).all()
    (_, moved), _ = run(params, np.roll(x, 4, axis=2), **given)  # by one patch
    assert np.abs(np.roll(moved, -4, axis=2) - out).max() > 1e-3


@pytest.mark.slow
def test_remat_and_unroll_change_no_output_and_no_gradient():
    config = dit.configure("Na", 4, **ALL)
    params, (x, given) = random_params(config), inputs(config)
    (_, out), grads = value_and_gradients(config)(params, x, **given)
    other = value_and_gradients(config, remat="full", unroll=True)
    (_, other_out), other_grads = other(params, x, **given)
    np.testing.assert_allclose(other_out, out, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other_grads, grads)


def test_class_tokens_join_before_their_block_and_leave_at_the_end():
    """A model of as many blocks without them has the same tokens up to there."""
    config = dit.configure("Ti", 4, **ALL)
    params, (x, given) = random_params(config), inputs(config)
    out, seen = jax.jit(dit.make_apply(config, watch=True))(params, x, **given)
    assert seen.x.shape == (5, 2, 6 + 3, 128) and seen.attention.shape == (4, 2, 4, 9, 9)
    assert not seen.x[:2, :, 6:].any() and not seen.attention[:2, ..., 6:].any()
    assert not seen.attention[:2, :, :, 6:].any()
    label = params["y_embedder"]["embedding_table"]["embedding"][given["y"]]
    joined = label[:, None] + params["class_tokens"][None]
    # x is what goes into a block, and these tokens come between two blocks.
    np.testing.assert_allclose(seen.x[2, :, 6:], joined, atol=1e-6)
    sums = np.asarray(seen.attention.sum(axis=-1))
    np.testing.assert_allclose(sums[:2, :, :, :6], 1, atol=1e-5)
    np.testing.assert_allclose(sums[2:], 1, atol=1e-5)
    plain = config._replace(class_tokens=0, class_tokens_from=0)
    fewer = {name: each for name, each in params.items() if name != "class_tokens"}
    other, without = jax.jit(dit.make_apply(plain, watch=True))(fewer, x, **given)
    np.testing.assert_allclose(seen.x[:3, :, :6], without.x[:3], atol=1e-5)
    assert np.abs(other - out).max() > 1e-3


def test_bfloat16_is_close_to_float32():
    config = dit.configure("Ti", 4, **ALL)
    params, (x, given) = random_params(config), inputs(config)
    exact = np.asarray(jax.jit(dit.make_apply(config))(params, x, **given))
    out = jax.jit(dit.make_apply(config, dtype="bfloat16"))(params, x, **given)
    assert out.dtype == jnp.float32
    assert 1e-3 < np.abs(out - exact).max() / np.abs(exact).max() < 0.05  # bfloat16 has 8 bits


def test_a_model_that_exists_has_none_of_the_parts():
    old = {name: x for name, x in dit.configure("Ti", 4)._asdict().items()}
    for name in dit.DiTConfig._field_defaults:
        del old[name]
    assert dit.DiTConfig.from_json(old) == dit.configure("Ti", 4)


def test_the_names_of_the_parts_are_those_of_their_tables():
    assert fields.PARTS["norm"] == tuple(layers.NORMS)
    assert fields.PARTS["mlp"] == tuple(layers.MLPS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"mlp": "relu"}, "mlp must be one of gelu, swiglu, got 'relu'"),
        (
            {"position": "learned"},
            "position must be one of sincos, rope, learned_rope, rope_1d, got 'learned'",
        ),
        ({"bottleneck": -1}, "bottleneck must be at least 0, got -1"),
        ({"class_tokens": -1}, "class_tokens must be at least 0, got -1"),
        ({"class_tokens_from": 2}, "class_tokens_from must be 0 without class_tokens, got 2"),
        (TOKENS | {"class_tokens_from": 4}, "class_tokens_from must be below the 4 blocks, got 4"),
        (
            {"position": "rope", "input_size": (4,) * 17},
            "position must be sincos for 17 axes and heads of 32, too few to rotate, got rope",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        dit.configure("Ti", 4, **SMALL | options)


def test_devices_must_share_the_mlp():
    message = "^mesh.tensor must divide the width 3413 of swiglu in H, got 2$"
    with pytest.raises(UserError, match=message):
        fields.check_tensor(Model(size="H", mlp="swiglu"), 2)
    fields.check_tensor(Model(size="L", mlp="swiglu"), 2)


def test_a_fine_tuning_keeps_the_parts_and_resizes_the_patches_of_a_bottleneck():
    source = dit.configure("Ti", 2, **ALL)
    target = dit.configure("Ti", 4, **ALL)
    params = transfer.adapt(random_params(source), source, target, rows=range(5))
    shapes = jax.eval_shape(lambda: dit.init(target, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    transfer.check(source, target)
    with pytest.raises(UserError, match="^model.norm must be rms as in init_from, got layer$"):
        transfer.check(source, target._replace(norm="layer"))
