"""The installed jaxlib computes correctly, and setup.py excludes the faulty version 0.10.2."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

SETUP = Path(__file__).parents[1] / "setup.py"


def test_installed_jaxlib_computes_correctly():
    """jaxlib 0.10.2 computes wrong numbers on CPUs: https://github.com/jax-ml/jax/issues/39103."""
    line = jnp.arange(32769.0)
    x = jnp.stack([line, jnp.zeros_like(line), jnp.zeros_like(line)], axis=1)  # (32769, 3)
    f = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))
    np.testing.assert_allclose(
        f(x),
        np.arange(32769.0) ** 2,
        rtol=1e-6,
        err_msg=f"jaxlib {jaxlib.version.__version__} computes wrong numbers: install another one",
    )


def requirements():
    """The versions of jax and jaxlib that setup.py allows, as {name: version specifiers}."""
    text = SETUP.read_text()
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    for name, value in constants.items():
        text = text.replace(f"{{{name}}}", str(value))
    return dict(re.findall(r'"(jax(?:lib)?(?:\[\w+\])?)([<>=!~][^"]*)"', text))


@pytest.mark.parametrize("name", ["jax", "jaxlib", "jax[tpu]", "jax[cuda12]"])
def test_setup_excludes_the_faulty_jaxlib(name):
    versions = SpecifierSet(requirements()[name])
    assert "0.10.2" not in versions
    assert all(version in versions for version in ("0.7.2", "0.10.1", "0.10.3"))


def test_setup_bounds_every_requirement_on_jax():
    named = re.findall(r'"(jax(?:lib)?(?:\[\w+\])?)(?=[^\w])', SETUP.read_text())
    assert set(named) == requirements().keys() and len(named) == 5  # dev repeats jax[tpu]
