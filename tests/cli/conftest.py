"""Fixtures of the tests of commands."""

import pytest
import small_run


@pytest.fixture(autouse=True, scope="module")
def each_program_compiles_once(compilation_cache_in_this_process):
    """For all commands of a file, and for the processes that they start."""


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
    small_run.finish(small_run.start(workdir, "--config.run.sample_every=30"))
    return workdir
