"""Names of repositories and digests of files; cli/test_share.py tests the rest of `hub`."""

import hashlib

import pytest

from dit_jax.convert import hub
from dit_jax.errors import UserError


@pytest.mark.parametrize("name", ["alice/digits", "a-b/DiT-XL-2.v1", "a/b_c"])
def test_names_of_repositories(name):
    hub.check_name(name)


@pytest.mark.parametrize("name", ["digits", "a/b/c", "/a", "a/", "a b/c", "a/..", "a--b/c", "~/x"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="REPO must be NAMESPACE/NAME of the Hugging Face hub"):
        hub.check_name(name)


def test_digests_are_those_of_git_and_of_large_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")
    assert hub._is_same(path, "ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object
    assert hub._is_same(path, hashlib.sha256(b"hello\n").hexdigest())
    assert not hub._is_same(path, None) and not hub._is_same(path, 64 * "0")
