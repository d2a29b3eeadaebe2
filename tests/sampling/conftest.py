import pytest


@pytest.fixture(autouse=True, scope="module")
def each_program_compiles_once(compilation_cache_in_this_process):
    """For all tests of a file, which often build the same programs."""
