import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.models import dit, fields, layers

CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")
SMALL = {"input_size": (8, 8), "num_classes": 5}


def call(apply, params, x, t, y):
    return apply(params, x, t=t, y=y)


def inputs(config, seed=0, examples=2):
    """x, t, y for a config: different steps, different labels."""
    shape = (examples, *config.input_size, config.in_channels)
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    t = np.linspace(17, 801, examples).astype(np.int32)
    return x, t, np.arange(examples, dtype=np.int32) % config.num_classes


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("patch_size", [4, 8])
def test_golden_forward(patch_size, make_model, golden, golden_images, check_close):
    name = f"DiT-S/{patch_size}"
    model = make_model(dit.configure("S", patch_size))
    x, t, y = golden_images("x" + name, 2), jnp.asarray([17, 801]), jnp.asarray([3, 1000])
    expected = golden[f"forward/{name}"]
    check_close(f"forward/{name}", model.apply(model.params, x, t=t, y=y), expected, 1e-4)


@pytest.mark.parametrize(
    "size, patch_size, options, stored, trained",
    [
        ("S", 8, {}, 33_148_160, 33_142_016),
        ("S", 4, {}, 32_945_024, 32_920_448),
        ("S", 2, {}, 32_963_360, 32_865_056),
        ("B", 8, {}, 130_881_536, 130_869_248),
        ("B", 4, {}, 130_475_648, 130_426_496),
        ("B", 2, {}, 130_512_416, 130_315_808),
        ("L", 8, {}, 458_594_816, 458_578_432),
        ("L", 4, {}, 458_053_760, 457_988_224),
        ("L", 2, {}, 458_102_816, 457_840_672),
        ("XL", 8, {}, 675_683_072, 675_664_640),
        ("XL", 4, {}, 675_074_432, 675_000_704),
        ("XL", 2, {}, 675_129_632, 674_834_720),
        ("XL", 2, {"conditioning": "in_context"}, 449_326_112, 449_031_200),
        ("XL", 2, {"conditioning": "cross_attention"}, 598_090_784, 597_795_872),
        ("XL", 2, {"conditioning": "adaln"}, 600_747_296, 600_452_384),
        ("XL", 2, {"input_size": (64, 64)}, 676_014_368, 674_834_720),
    ],
)
def test_parameter_count(size, patch_size, options, stored, trained):
    """`stored` is with the position table, as in the official state dict."""
    config = dit.configure(size, patch_size, **options)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == trained
    assert count + config.num_tokens * config.hidden_size == stored


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-S/4", "DiT-S/8", "DiT-B/4", "DiT-XL/2"])
def test_golden_parameter_count(name, golden):
    size, patch_size = name.removeprefix("DiT-").split("/")
    config = dit.configure(size, int(patch_size))
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    table = layers.position_table(config.token_grid, config.hidden_size)
    assert sum(x.size for x in jax.tree.leaves(params)) + table.size == golden[f"params/{name}"]


@pytest.fixture(scope="module")
def born():
    """Fresh parameters of every design, as dicts from a path to an array."""
    params = {}
    for conditioning in CONDITIONINGS:
        config = dit.configure("Ti", 4, conditioning=conditioning, num_classes=500)
        flat = jax.tree_util.tree_leaves_with_path(dit.init(config, jax.random.key(0)))
        params[conditioning] = {
            "/".join(key.key for key in path): np.asarray(x) for path, x in flat
        }
    return params


@pytest.mark.parametrize(
    "conditioning, path, inputs, outputs",
    [
        ("adaln_zero", "x_embedder/proj", 4 * 4 * 4, 128),
        ("adaln_zero", "blocks/attn/qkv", 128, 3 * 128),
        ("adaln_zero", "blocks/attn/proj", 128, 128),
        ("adaln_zero", "blocks/mlp/fc1", 128, 512),
        ("adaln_zero", "blocks/mlp/fc2", 512, 128),
        ("cross_attention", "blocks/cross_attn/q", 128, 128),
        ("cross_attention", "blocks/cross_attn/kv", 128, 2 * 128),
        ("cross_attention", "blocks/cross_attn/proj", 128, 128),
    ],
)
def test_linears_are_born_xavier_uniform(born, conditioning, path, inputs, outputs):
    kernel = born[conditioning][f"{path}/kernel"]
    limit = np.sqrt(6 / (inputs + outputs))
    assert kernel.size == inputs * outputs * (len(kernel) if path.startswith("blocks") else 1)
    for layer in kernel.reshape(-1, inputs * outputs):
        assert 0.999 * limit < np.abs(layer).max() <= limit * (1 + 1e-6)
        # The standard error of the deviation is below 0.5 % over 8192 numbers or more.
        assert layer.std() == pytest.approx(limit / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    "path",
    ["t_embedder/fc1/kernel", "t_embedder/fc2/kernel", "y_embedder/embedding_table/embedding"],
)
def test_embedders_are_born_normal(born, path):
    x = born["adaln_zero"][path]
    assert abs(x.mean()) < 1e-3  # 0.02 / sqrt(16384) = 2e-4
    assert x.std() == pytest.approx(0.02, rel=0.02)
    assert 3.5 < np.abs(x / 0.02).max() < 6  # neither uniform nor truncated


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_biases_modulations_and_the_last_linear_are_born_zero(born, conditioning):
    zero = {path for path, x in born[conditioning].items() if not x.any()}
    expected = {path for path in born[conditioning] if path.endswith("bias")}
    expected |= {"final_layer/linear/kernel"}
    if conditioning.startswith("adaln"):
        expected |= {"final_layer/adaLN_modulation/kernel", "blocks/adaLN_modulation/kernel"}
    assert zero == expected


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_layer_is_born_different(born, conditioning):
    kernels = [x for path, x in born[conditioning].items() if path.endswith("kernel") and x.any()]
    drawn = [x.ravel() for kernel in kernels for x in kernel.reshape(-1, *kernel.shape[-2:])]
    assert len({x[:8].tobytes() for x in drawn}) == len(drawn) >= 3 + 4 * 4


def test_init_is_a_function_of_its_key():
    config = dit.configure("Ti", 4, **SMALL)
    make = jax.jit(lambda key: dit.init(config, key)["blocks"]["attn"]["qkv"]["kernel"])
    first, again, other = (make(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.99


@pytest.fixture(scope="module")
def reference(make_model):
    """A small model, its inputs, its output and its gradients, nothing recomputed."""
    model = make_model(dit.configure("Ti", 4, **SMALL)._replace(depth=2))
    return model, inputs(model.config), value_and_gradients(model, model.apply)


def value_and_gradients(model, apply):
    def loss(params):
        out = call(apply, params, *inputs(model.config))
        return jnp.square(out).mean(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    return out, grads


@pytest.mark.parametrize(
    "options",
    [{"unroll": True}, {"remat": "dots"}, {"remat": "full", "unroll": True}],
)
def test_remat_and_unroll_change_no_output_and_no_gradient(reference, options):
    model, _, (out, grads) = reference
    other_out, other_grads = value_and_gradients(model, dit.make_apply(model.config, **options))
    # The order of float32 sums may differ.
    np.testing.assert_allclose(other_out, out, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), other_grads, grads)
    assert min(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-4


def test_remat_stores_less_for_the_backward_pass(reference):
    model, arguments, _ = reference

    def kept(remat):
        apply = dit.make_apply(model.config, remat=remat)
        backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: call(apply, p, *arguments), p)[1], model.params
        )
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept("none") > kept("dots") > kept("full")


# bfloat16 has 8 bits: through the blocks the error is some times 2^-8 = 0.004, and not 0.
# jax.nn.dot_product_attention itself mixes bfloat16 and float32, forward and backward.


@pytest.mark.parametrize("conditioning", ["cross_attention", "adaln_zero"])
def test_bfloat16_is_close_to_float32(conditioning, make_model):
    model = make_model(dit.configure("Ti", 4, conditioning=conditioning, **SMALL))
    arguments = (model.params, *inputs(model.config))
    with jax.numpy_dtype_promotion("standard"):
        out = call(jax.jit(dit.make_apply(model.config, dtype="bfloat16")), *arguments)
    assert out.dtype == jnp.float32
    assert 1e-3 < relative_error(out, call(model.apply, *arguments)) < 0.03


def test_gradients_in_bfloat16_are_close_to_float32(reference):
    model, _, (_, grads) = reference
    with jax.numpy_dtype_promotion("standard"):
        apply = dit.make_apply(model.config, dtype="bfloat16", remat="dots")
        _, other_grads = value_and_gradients(model, apply)
    assert {x.dtype for x in jax.tree.leaves(other_grads)} == {jnp.dtype("float32")}
    errors = jax.tree.leaves(jax.tree.map(relative_error, other_grads, grads))
    assert 1e-3 < max(errors) < 0.1


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": (4, 12), "in_channels": 1},
        {"input_size": (12, 8), "in_channels": 3, "learn_sigma": False},
    ],
)
def test_any_input(conditioning, options, make_model):
    """Every label and every step changes every output channel."""
    model = make_model(dit.configure("Ti", 4, conditioning=conditioning, num_classes=5, **options))
    x, t, y = inputs(model.config)
    out = model.apply(model.params, x, t=t, y=y)
    channels = options["in_channels"] * (1 + options.get("learn_sigma", True))
    assert out.shape == (2, *options["input_size"], channels)
    assert out.dtype == jnp.float32
    for other in ((x, t + 50, y), (x, t, y + 1), (x, t, np.full_like(y, 5))):
        change = np.abs(np.asarray(call(model.apply, model.params, *other)) - out).max(axis=(1, 2))
        assert (change > 1e-4 * np.abs(out).max()).all()  # of each example and channel


@pytest.mark.parametrize("input_size", [(12,), (4, 8, 4)])
@pytest.mark.parametrize("conditioning", ["in_context", "adaln_zero"])
def test_grids_of_one_and_three_axes(conditioning, input_size):
    """A change of one patch reaches every token, and equal patches give different outputs."""
    options = {"conditioning": conditioning, "input_size": input_size, "in_channels": 2}
    config = dit.configure("Ti", 4, num_classes=5, **options)
    params = dit.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    x, t, y = inputs(config)
    apply = jax.jit(dit.make_apply(config))
    out = apply(params, np.ones_like(x), t=t, y=y)
    assert out.shape == (2, *input_size, 4)
    tokens = np.asarray(layers.patchify(out, 4))
    count = config.num_tokens
    distance = np.abs(tokens[:, :, None] - tokens[:, None]).max(axis=-1)
    assert (distance + np.eye(count) > 1e-3).all()
    changed = np.ones_like(x)
    changed.reshape(2, -1)[:, 0] += 1
    change = layers.patchify(apply(params, changed, t=t, y=y) - out, 4)
    assert (np.abs(change).max(axis=-1) > 1e-5).all()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_examples_do_not_mix(conditioning, make_model):
    model = make_model(dit.configure("Ti", 4, conditioning=conditioning, **SMALL))
    x, t, y = inputs(model.config)
    out = model.apply(model.params, x, t=t, y=y)
    swapped = model.apply(model.params, x[::-1], t=t[::-1], y=y[::-1])
    np.testing.assert_allclose(swapped[::-1], out, atol=1e-5)


def test_every_token_depends_on_its_position_and_on_the_others(make_model):
    """A change of one patch reaches all; equal patches give different outputs."""
    model = make_model(dit.configure("Ti", 4, input_size=(8, 12), num_classes=5))
    x, t, y = inputs(model.config)
    x = np.ones_like(x)
    out = np.asarray(model.apply(model.params, x, t=t, y=y))
    patches = layers.patchify(out, 4)  # (2, 6, P)
    distance = np.abs(patches[:, :, None] - patches[:, None]).max(axis=-1)
    assert (distance + np.eye(6) > 1e-3).all()
    x[:, 0, 0] += 1
    change = layers.patchify(np.asarray(model.apply(model.params, x, t=t, y=y)) - out, 4)
    assert (np.abs(change).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_unconditional(conditioning, make_model):
    config = dit.configure(
        "Ti", 4, conditioning=conditioning, input_size=(8, 8), num_classes=1, null_label=False
    )
    model = make_model(config)
    assert model.params["y_embedder"]["embedding_table"]["embedding"].shape == (1, 128)
    out = call(model.apply, model.params, *inputs(config))
    assert out.shape == (2, 8, 8, 8)
    assert np.isfinite(out).all()


def test_a_fresh_model_predicts_zero():
    config = dit.configure("Ti", 4, **SMALL)
    out = call(
        jax.jit(dit.make_apply(config)), dit.init(config, jax.random.key(0)), *inputs(config)
    )
    np.testing.assert_array_equal(out, np.zeros((2, 8, 8, 8)))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_watched_model_shows_its_tokens_and_attention(conditioning, make_model):
    model = make_model(dit.configure("Ti", 4, conditioning=conditioning, **SMALL))
    x, t, y = inputs(model.config)
    apply = jax.jit(dit.make_apply(model.config, watch=True))
    out, watched = apply(model.params, x, t=t, y=y)
    np.testing.assert_allclose(out, model.apply(model.params, x, t=t, y=y), atol=1e-5)
    num_tokens = 4 + 2 * (conditioning == "in_context")  # and those of t and y
    assert watched.x.shape == (5, 2, num_tokens, 128)
    assert watched.attention.shape == (4, 2, 4, num_tokens, num_tokens)
    np.testing.assert_allclose(watched.attention.sum(axis=-1), 1, atol=1e-6)
    embedder = jax.tree.map(np.asarray, model.params["x_embedder"]["proj"])
    tokens = layers.patchify(x, 4) @ embedder["kernel"] + embedder["bias"]
    tokens += layers.position_table((2, 2), 128)
    np.testing.assert_allclose(watched.x[0][:, :4], tokens, atol=1e-5)
    changes = jnp.abs(watched.x[1:] - watched.x[:-1]).max(axis=(1, 2, 3))
    assert (changes > 1e-3).all()  # by every block


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_only_adaln_zero_is_born_as_the_identity(conditioning):
    config = dit.configure("Ti", 4, conditioning=conditioning, **SMALL)
    apply = jax.jit(dit.make_apply(config, watch=True))
    x, t, y = inputs(config)
    _, watched = apply(dit.init(config, jax.random.key(0)), x, t=t, y=y)
    is_identity = [bool((after == watched.x[0]).all()) for after in watched.x[1:]]
    assert is_identity == [conditioning == "adaln_zero"] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "XXL"}, "size must be one of Pi, Na, Ti, XS, S, B, M, L, XL, H, G, got 'XXL'"),
        (
            {"conditioning": "film"},
            f"conditioning must be one of {', '.join(fields.DESIGNS)}, got 'film'",
        ),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"input_size": (32, 30)}, r"divisible by patch_size 4, got \(32, 30\)"),
        ({"input_size": (0, 32)}, r"input_size must be whole numbers of at least 1, got \(0, 32\)"),
        ({"input_size": ()}, r"input_size must be whole numbers of at least 1, got \(\)"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(UserError, match=message):
        dit.configure(**{"size": "S", "patch_size": 4} | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"attention": "flash"}, "attention must be one of xla, cudnn, got 'flash'"),
        ({"remat": "some"}, "remat must be one of none, dots, full, got 'some'"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(UserError, match=message):
        dit.make_apply(dit.configure("Ti", 4, **SMALL), **options)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_flat_products_change_nothing_but_roundings(conditioning, make_model):
    model = make_model(dit.configure("Ti", 4, conditioning=conditioning, **SMALL))
    x, t, y = inputs(model.config)
    out = jax.jit(dit.make_apply(model.config, product="flat"))(model.params, x, t=t, y=y)
    assert relative_error(out, np.asarray(model.apply(model.params, x, t=t, y=y))) < 1e-5
