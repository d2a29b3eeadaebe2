"""Tokens that skip the middle blocks in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import count_products, normal

from dit_jax.errors import UserError
from dit_jax.models import dit, flops, routing

SMALL = {"input_size": (8, 8), "in_channels": 1, "num_classes": 5}


def configure(**options):
    return dit.configure("Na", 2, **SMALL | options)


CONFIG = configure()  # 3 blocks, 16 tokens


@pytest.fixture(scope="module")
def make():
    """make(config) -> params, of which none is 0, x, {"t", "y"}."""

    def made(config):
        params = jax.jit(lambda: dit.init(config, jax.random.key(0)))()
        params = jax.tree.map(lambda x: x + 0.1 * normal(x.size, x.shape), params)
        x = normal(0, (2, *config.input_size, config.in_channels))
        return params, x, {"t": np.float32([17, 801]), "y": np.int32([3, 1])}

    return made


def test_each_example_keeps_its_own_tokens_and_each_token_as_often():
    draw = routing.make(CONFIG, 0.5, ()).draw
    kept = np.asarray(draw(jax.random.key(0), 4000))
    assert kept.shape == (4000, 8) and kept.dtype == np.int32
    assert all(len(set(row)) == 8 for row in kept[:100].tolist())
    counts = np.bincount(kept.ravel(), minlength=16) / 4000
    np.testing.assert_allclose(counts, 0.5, atol=0.04)  # five deviations of 0.008


@pytest.mark.parametrize("design", ["in_context", "cross_attention", "adaln", "adaln_zero"])
def test_the_model_is_the_same_if_every_token_is_kept(make, design):
    config = configure(conditioning=design)
    params, x, given = make(config)
    route = routing.Routing(1, 1, 16, 0)
    order = jnp.asarray(np.random.default_rng(0).permuted([range(16)] * 2, axis=1), jnp.int32)
    apply = jax.jit(dit.make_apply(config))
    routed = jax.jit(lambda *args: dit.make_apply(config)(*args, **given, route=(route, order)))
    np.testing.assert_allclose(routed(params, x), apply(params, x, **given), rtol=1e-4, atol=1e-5)


def test_a_token_that_skips_the_blocks_stays_as_it_is_bit_for_bit():
    x, kept = jnp.asarray(normal(0, (2, 18, 4))), jnp.array([[0, 5], [7, 2]])
    seen = []

    def blocks(x, first, stop):
        seen.append((first, stop, x.shape[1]))
        return x + 1 if first == 3 else x

    out = np.asarray(routing.Routing(3, 6, 16, 14).run(blocks, x, kept))
    assert seen == [(0, 3, 18), (3, 7, 4), (7, None, 18)]
    for row, tokens in enumerate(kept.tolist()):
        changed = [*tokens, 16, 17]  # the last two are of the conditions
        same = np.setdiff1d(np.arange(18), changed)
        np.testing.assert_array_equal(out[row, same], x[row, same])
        np.testing.assert_array_equal(out[row, changed], x[row, changed] + np.float32(1))


@pytest.mark.parametrize("blocks", [(0, 2), (1, 1)])
def test_gradients_reach_every_block_and_every_token_of_the_example(make, blocks):
    params, x, given = make(CONFIG)
    route = routing.make(CONFIG, 0.5, blocks)
    kept = route.draw(jax.random.key(1), 2)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            apply = dit.make_apply(CONFIG, remat="dots")
            return jnp.square(apply(params, x, **given, route=(route, kept))[0]).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    of_params, of_x = gradients(params, x)
    kernel = np.abs(of_params["blocks"]["mlp"]["fc1"]["kernel"])
    assert (kernel.max(axis=(1, 2)) > 0).all()
    assert (np.abs(of_x[0]) > 0).all() and (of_x[1] == 0).all()


def test_the_work_of_a_step_is_that_of_the_program(make):
    params, x, given = make(CONFIG)
    route = routing.make(CONFIG, 0.25, (1, 2))
    kept = route.draw(jax.random.key(0), 2)
    apply = dit.make_apply(CONFIG)
    program = jax.make_jaxpr(lambda *args: apply(*args, **given, route=(route, kept)))(params, x)
    counted = count_products(program.jaxpr)
    assert flops.train_flops(CONFIG, route) * 2 == pytest.approx(6 * counted, rel=1e-9)
    assert flops.train_flops(CONFIG, route) < flops.train_flops(CONFIG)


@pytest.mark.parametrize(
    "options, share, blocks, message",
    [
        ({}, 0.0, (1, 2), r"^route_blocks must be \(\) if route_share is 0, got \(1, 2\)$"),
        ({}, 0.5, (1, 3), r"^route_blocks must be \(first, last\), .*, in 0 .. 2, got \(1, 3\)$"),
        ({}, 0.5, (2, 1), r"first <= last, in 0 .. 2, got \(2, 1\)$"),
        ({}, 0.05, (), "^route_share must be 0 or at least one of 16 tokens, got 0.05$"),
        ({"position": "rope"}, 0.5, (), "^route_share must be 0 for a model with position rope or"),
        ({"class_tokens": 2}, 0.5, (), "rope or class_tokens, got 0.5$"),
    ],
)
def test_what_cannot_be_routed_is_refused(options, share, blocks, message):
    with pytest.raises(UserError, match=message):
        routing.make(configure(**options), share, blocks)


def test_a_model_of_two_blocks_has_no_middle():
    config = dit.configure("Pi", 2, **SMALL)
    with pytest.raises(UserError, match=r"^route_blocks must be .* 0 .. 1, got \(\)$"):
        routing.make(config, 0.5, ())
    assert routing.make(config, 0.5, (1, 1)) == routing.Routing(1, 1, 16, 8)
    assert routing.make(config, 0.0, ()) is None
