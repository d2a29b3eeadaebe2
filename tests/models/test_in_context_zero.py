"""The networks of improved MeanFlow and pixel MeanFlow: condition tokens, gates and two heads.

testdata/golden_in_context.npz holds what the authors' codes (github.com/Lyy-iiis/imeanflow bf60cd7
and github.com/Lyy-iiis/pMF 75f6073, both MIT) gave with the weights of `filled`.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import normal
from testdata.weights import array

from dit_jax.errors import UserError
from dit_jax.models import attention, conditions, dit, fields, flops, transfer
from dit_jax.settings import Model

GOLDEN = Path(__file__).parents[1] / "testdata" / "golden_in_context.npz"
NETWORK = {"conditioning": "in_context_zero", "norm": "rms", "mlp": "swiglu", "qk_norm": True}
NETWORK |= {"conditions": ("h", "omega", "t_min", "t_max", "y"), "learn_sigma": False}
HEADS = {"velocity_head": True, "head_depth": 8}
LATENTS = NETWORK | HEADS | {"position": "rope_1d"}
PIXELS = NETWORK | HEADS | {"position": "learned_rope", "in_channels": 3}
SMALL = {"input_size": (8, 8), "num_classes": 5}
CONFIGS = {
    "imf": dit.configure("S", 2, depth=10, **LATENTS | SMALL),
    "pmf": dit.configure("S", 2, depth=10, bottleneck=128, **PIXELS | SMALL),
}
CONFIGS = {name: each._replace(hidden_size=48, num_heads=4) for name, each in CONFIGS.items()}
TINY = {"velocity_head": True, "head_depth": 2} | SMALL


def filled(config):
    """Parameters of which none is 0 or 1, each by its name and shape."""

    def fill(path, x):
        name = "/".join(key.key for key in path)
        z = array(name, x.shape)
        if name.endswith("weight"):
            return 1 + 0.3 * z
        if not name.endswith("kernel"):
            return 0.3 * z
        inputs = x.shape[1 if name.startswith("blocks/") else 0]
        return z / np.float32(np.sqrt(inputs))

    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def inputs(config):
    x = array("x", (3, *config.input_size, config.in_channels))
    numbers = {"h": (0.5, 0.1, 0.6), "omega": (1, 2.5, 7), "t_min": (0, 0.2, 0.4)}
    numbers |= {"t_max": (1, 0.8, 0.6), "t": (0.9, 0.3, 0.04)}
    given = {name: np.float32(values) for name, values in numbers.items()}
    return x, given | {"y": np.int32([0, 5, 3])}


@functools.cache
def forward(config, first=0, stop=None, **options):
    """A compiled function of parameters, x and conditions: the output's channels first .. stop."""
    apply = dit.make_apply(config, **options)
    return jax.jit(lambda params, x, given: apply(params, x, **given)[..., first:stop])


@pytest.mark.parametrize("name", ["imf", "pmf"])
def test_the_output_is_that_of_the_authors_code(name, check_close):
    config = CONFIGS[name]
    x, given = inputs(config)
    out = np.asarray(forward(config)(filled(config), x, given))
    assert out.shape == (*x.shape[:-1], 2 * config.in_channels)
    with np.load(GOLDEN) as file:
        golden = {key: file[key] for key in file.files}
    for key, half in zip(("u", "v"), np.split(out, 2, axis=-1), strict=True):
        if name == "pmf":  # theirs ends in the velocity, and here the process computes it
            half = (x - half) / np.maximum(given["t"], 0.05)[:, None, None, None]
        check_close(f"{name}/{key}", half, golden[f"{name}/{key}"], 1e-5)


@pytest.mark.parametrize(
    "size, patch_size, depth, options, parameters, gmacs",
    [
        ("B", 2, 12, LATENTS, (88_948_256, 145_596_960), (24.86, 41.42)),
        ("B", 2, 24, LATENTS, (173_921_312, 230_570_016), (49.70, 66.27)),
        ("L", 2, 32, LATENTS, (409_071_648, 509_752_352), (116.12, 145.15)),
        ("L", 2, 48, LATENTS, (610_433_056, 711_113_760), (174.18, 203.20)),
        ("B", 16, 16, PIXELS, (118_234_240, 175_474_304), (33.33, 50.05)),
        ("B", 32, 16, PIXELS, (120_300_928, 179_312_768), (33.86, 51.03)),
        ("L", 16, 32, PIXELS, (410_320_768, 511_789_696), (116.37, 145.60)),
        ("L", 32, 32, PIXELS, (412_977_280, 516_807_808), (117.05, 146.88)),
        ("H", 16, 48, PIXELS, (954_956_032, 1_113_259_520), (270.20, 315.42)),
        ("H", 32, 48, PIXELS, (958_497_280, 1_119_752_192), (271.11, 317.08)),
    ],
)
def test_parameters_and_multiply_adds(size, patch_size, depth, options, parameters, gmacs):
    """With one head and with both. Of iMF the authors count the final layers of both always."""
    if options is PIXELS:
        bottleneck = 128 if size in "BL" else 256
        options = options | {"input_size": (16 * patch_size,) * 2, "bottleneck": bottleneck}
    config = dit.configure(size, patch_size, depth=depth, **options)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    second = count(params["blocks"]) // config.num_blocks * config.head_depth
    if config.position == "learned_rope":
        second += count(params["velocity_layer"])
    assert (count(params) - second, count(params)) == parameters
    one = flops.multiply_adds(config)
    both = one + flops.second_head_multiply_adds(config)
    assert (one / 1e9, both / 1e9) == pytest.approx(gmacs, rel=1e-3)


def test_a_new_network_has_the_authors_distributions_and_predicts_0():
    config = dit.configure("XS", 2, depth=3, **TINY | NETWORK | {"position": "learned_rope"})
    params = jax.jit(lambda: dit.init(config, jax.random.key(0)))()
    size, blocks = config.hidden_size, params["blocks"]
    inner = params["h_embedder"]["embedder"]
    for x, std in (
        (blocks["attn"]["qkv"]["kernel"], 0.32 * size**-0.5),
        (blocks["mlp"]["fc2"]["kernel"], 0.32 * 512**-0.5),
        (inner["fc1"]["kernel"], 256**-0.5),
        (inner["fc2"]["kernel"], size**-0.5),
        (params["y_embedder"]["tokens"], size**-0.5),
        (params["y_embedder"]["embedder"]["embedding_table"]["embedding"], size**-0.5),
        (params["position_table"], 0.02),
    ):
        assert x.std() == pytest.approx(std, rel=0.08) and abs(x.mean()) < 0.1 * std
    for name in ("gate_msa", "gate_mlp"):
        assert not blocks[name].any()
    x, given = inputs(config)
    assert not forward(config)(params, x, given).any()


def test_where_one_half_is_used_the_compiler_leaves_out_the_other_head():
    config = dit.configure("Ti", 2, **LATENTS | TINY)
    args = filled(config), *inputs(config)

    def loops(*channels):
        return forward(config, *channels).lower(*args).compile().as_text().count(" while(")

    # The shared blocks and those of each head.
    assert [loops(), loops(0, 4), loops(4, 8)] == [3, 2, 2]


def test_the_heads_share_the_first_blocks_only():
    config = dit.configure("Ti", 2, **LATENTS | TINY)  # 2 blocks for both, then 2 for each
    params, (x, given) = filled(config), inputs(config)
    for channels, used in (((0, 4), [0, 1, 2, 3]), ((4, 8), [0, 1, 4, 5])):
        run = forward(config, *channels)

        def loss(blocks, run=run):
            return jnp.square(run(params | {"blocks": blocks}, x, given)).sum()

        grad = jax.grad(loss)(params["blocks"])["gate_mlp"]  # (L, D)
        assert np.flatnonzero(np.abs(grad).max(axis=1)).tolist() == used


@pytest.mark.slow
def test_remat_and_unroll_change_no_output():
    config = dit.configure("Ti", 2, **LATENTS | TINY)
    params, (x, given) = filled(config), inputs(config)
    out = forward(config)(params, x, given)
    other = forward(config, remat="full", unroll=True)(params, x, given)
    np.testing.assert_allclose(other, out, atol=1e-5)


def test_watching_shows_the_blocks_of_the_average_velocity():
    config = dit.configure("Ti", 2, **LATENTS | TINY)
    params, (x, given) = filled(config), inputs(config)
    out, seen = jax.jit(dit.make_apply(config, watch=True))(params, x, **given)
    np.testing.assert_allclose(out, forward(config)(params, x, given), atol=1e-5)
    assert seen.x.shape == (5, 3, 16 + 20, 128) and seen.attention.shape == (4, 3, 4, 36, 36)
    one_head = config._replace(velocity_head=False, head_depth=0)
    fewer = {name: each for name, each in params.items() if name != "velocity_layer"}
    fewer["blocks"] = jax.tree.map(lambda x: x[:4], params["blocks"])
    _, expected = jax.jit(dit.make_apply(one_head, watch=True))(fewer, x, **given)
    for found, same in zip(seen, expected, strict=True):
        np.testing.assert_allclose(found, same, atol=1e-5)


def test_the_tokens_of_the_conditions():
    config = dit.configure("Ti", 2, **NETWORK | SMALL)
    counts = {each.name: each.num_tokens for each in conditions.of(config)}
    assert counts == {"y": 8, "omega": 4, "t_min": 2, "t_max": 2, "h": 4}
    assert list(counts) == ["y", "omega", "t_min", "t_max", "h"]
    assert conditions.count_tokens(config) == 20


def test_rotation_along_one_axis_puts_the_other_tokens_before_the_grid():
    """The products are those of the same tokens on a grid that holds all, others first."""
    q, k = normal(0, (2, 1, 9, 2, 16))
    turned = [attention.rotate(x, (6,), rotates_all=True) for x in (q, k)]
    whole = [attention.rotate(np.concatenate([x[:, 6:], x[:, :6]], 1), (9,)) for x in (q, k)]
    products, expected = (np.einsum("ntkd,nskd->nkts", *pair) for pair in (turned, whole))
    order = [*range(3, 9), *range(3)]
    np.testing.assert_allclose(products, expected[:, :, order][..., order], atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_depth": 2}, "head_depth must be 0 without velocity_head, got 2"),
        (HEADS, "head_depth must be below the 4 blocks, got 8"),
        ({"depth": -1}, "depth must be at least 0, got -1"),
        (
            TINY | {"class_tokens": 3, "position": "rope"},
            "head_depth must be 0 with class_tokens, got 2",
        ),
        ({"class_tokens": 3}, "class_tokens must be 0 with rope_1d, got 3"),
        (TINY | {"depth": 2}, "head_depth must be below the 2 blocks, got 2"),
    ],
)
def test_fields_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        dit.configure("Ti", 2, **SMALL | NETWORK | {"position": "rope_1d"} | options)


def test_a_depth_replaces_that_of_the_size():
    assert fields.shape(Model(size="B", depth=24)) == (24, 768, 12)


def test_fine_tuning_resizes_both_heads_and_grows_the_label_table():
    source = dit.configure("Ti", 2, **LATENTS | TINY)
    target = dit.configure("Ti", 4, **LATENTS | TINY | {"num_classes": 7})
    transfer.check(source, target)
    params = transfer.adapt(filled(source), source, target, rows=[*range(5), None, None])
    shapes = jax.eval_shape(lambda: dit.init(target, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    old = filled(source)["velocity_layer"]["linear"]["kernel"]
    assert np.abs(params["velocity_layer"]["linear"]["kernel"]).max() > 0.1 * np.abs(old).max()


@pytest.mark.parametrize(
    "options, changes, message",
    [
        (LATENTS, {"head_depth": 0}, "model.head_depth must be 2 as in init_from, got 0"),
        (
            LATENTS,
            {"conditions": ("t", *NETWORK["conditions"])},
            r"model.conditions must be \('h', .*\) as in init_from, got \('t', 'h', .*\)",
        ),
        (
            PIXELS,
            {"input_size": (16, 16)},
            r"model.input_size must be \(8, 8\) as in init_from, got \(16, 16\)",
        ),
    ],
)
def test_what_learned_tokens_depend_on_is_kept_in_fine_tuning(options, changes, message):
    source = dit.configure("Ti", 2, **options | TINY)
    with pytest.raises(UserError, match=f"^{message}$"):
        transfer.check(source, source._replace(**changes))
