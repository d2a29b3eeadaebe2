"""Fixtures of the tests of commands."""

import os

import jax
import pytest
import small_run
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True, scope="module")
def compilation_cache_in_this_process(compiled_once):
    """A command that is called several times compiles its programs once."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # it looks at the configuration once
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def refuse(call):
    """refuse(command module, *flags) -> its one line of error; expects exit code 2."""

    def run(module, *args):
        code, _, errors = call(module, *args)
        assert code == 2
        (line,) = errors.splitlines()
        assert line.startswith(f"dit-{module.__name__.split('.')[-1]}: ")
        return line

    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The directory of a small run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    small_run.finish(small_run.start(workdir))
    return workdir
