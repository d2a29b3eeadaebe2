"""The cache of compiled programs that commands switch on."""

import os
from types import SimpleNamespace

import jax
import pytest

from dit_jax.cli import encode, evaluate, sample, train
from dit_jax.errors import UserError
from dit_jax.machine import compiled, disk


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that seems to have one process and a GPU; its user's cache folder."""
    monkeypatch.delenv(compiled.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_of_a_gpu_are_kept_where_only_the_user_writes(machine):
    folder = compiled.keep()
    assert folder == machine / "dit_jax" / "compiled" == disk.user_cache() / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name, value", [("default_backend", "cpu"), ("process_count", 2)])
def test_nothing_is_kept_on_cpus_and_on_several_hosts(machine, monkeypatch, name, value):
    monkeypatch.setattr(jax, name, lambda: value)
    assert compiled.keep() is None and jax.config.jax_compilation_cache_dir is None
    assert not list(machine.iterdir())


@pytest.mark.parametrize("value", ["/another/folder", ""])
def test_the_users_variable_wins(machine, monkeypatch, value):
    monkeypatch.setenv(compiled.VARIABLE, value)
    assert compiled.keep() is None and not list(machine.iterdir())


def test_the_cache_can_be_turned_off(machine):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert compiled.keep() is None and not list(machine.iterdir())
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_folder_that_cannot_be_made_is_one_line(machine, monkeypatch, caplog):
    (machine / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "file"))
    with caplog.at_level("INFO", logger="absl"):
        assert compiled.keep() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("compiled programs are not kept: ")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_others_can_write_to_is_not_used(machine, caplog):
    folder = compiled.keep()
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    with caplog.at_level("INFO", logger="absl"):
        assert compiled.keep() is None
    assert f"others may write to {folder}" in caplog.text


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / name / "program"
        path.parent.mkdir()
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - age))
    compiled.remove_oldest(tmp_path, 25)
    assert {path.parent.name for path in tmp_path.glob("*/program")} == {"new", "middle"}


@pytest.mark.parametrize(
    "command, words",
    [(encode, ("dataset", "out")), (evaluate, ()), (sample, ())],
)
def test_commands_that_compile_keep_their_programs(monkeypatch, tmp_path, command, words):
    monkeypatch.setattr(compiled, "keep", refuse)
    values = SimpleNamespace(compare=False, study="", out=str(tmp_path / "out.png"))
    with pytest.raises(UserError, match="asked for the cache"):
        command.main(values, *words)


def test_training_keeps_its_programs(monkeypatch, tmp_path, call):
    monkeypatch.setattr(compiled, "keep", refuse)
    code, _, errors = call(train, "configs/digits.py:Pi/4", tmp_path / "run")
    assert (code, errors) == (2, "dit-train: asked for the cache\n")


def refuse():
    raise UserError("asked for the cache")
