import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.machine import prng

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "dit_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")])
MAKES_KEYS = {"key", "PRNGKey", "wrap_key_data", "key_impl", "key_dtype"}
TAKES_A_KEY = {"split", "fold_in", "key_data"}  # and draws no number


def test_keys_are_those_of_threefry():
    ours, theirs = prng.key(7), jax.random.key(7, impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(theirs))
    again = prng.wrap(jax.random.key_data(jax.random.split(ours, 3)))
    for x, y in zip(again, jax.random.split(theirs, 3), strict=True):
        np.testing.assert_array_equal(jax.random.normal(x, (5,)), jax.random.normal(y, (5,)))


def test_a_seed_may_be_an_int_or_traced():
    for seed in (2**32 - 1, np.int64(2**32 - 1), np.uint32(2**32 - 1)):
        key = prng.key(seed)
        traced = jax.jit(prng.key)(np.uint32(seed))
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(traced))
        assert key.dtype == traced.dtype


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_numbers_do_not_depend_on_the_settings_of_jax(kind, partitionable):
    def draw():
        def numbers(seed):
            one, two = jax.random.split(prng.key(seed))
            many = jax.vmap(lambda i: jax.random.fold_in(two, i))(jnp.arange(3, dtype=jnp.uint32))
            return jax.random.normal(one, (4, 3), jnp.float32), jax.random.key_data(many)

        return jax.tree.map(np.asarray, jax.jit(numbers)(np.uint32(3)))

    expected = draw()
    with jax.default_prng_impl(kind), jax.threefry_partitionable(partitionable):
        for x, y in zip(draw(), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def calls(path):
    """(the name after jax.random or nnx, node) of each call of these modules in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            module, _, name = ast.unparse(node.func).rpartition(".")
            if module in ("jax.random", "random", "nnx"):
                yield name if module != "nnx" else f"nnx.{name}", node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_prng_makes_keys_and_every_draw_states_its_dtype(path):
    text = path.read_text()
    assert "from jax.random" not in text and "from jax import random" not in text
    for name, node in calls(path):
        line = f"{path}:{node.lineno}: {ast.unparse(node)}"
        if name in MAKES_KEYS:
            assert path.name == "prng.py", line
        elif name == "nnx.Rngs":  # it makes a key of a number by itself
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            assert not any(isinstance(value, ast.Constant) for value in given), line
        elif not name.startswith("nnx.") and name not in TAKES_A_KEY:
            assert any(word in line for word in ("jnp.float32", "jnp.int32", "jnp.uint8")), line
