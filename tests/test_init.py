import importlib.metadata

import dit_jax


def test_the_version_is_that_of_the_installed_package():
    assert dit_jax.__version__ == importlib.metadata.version("dit_jax")  # read by setup.py
