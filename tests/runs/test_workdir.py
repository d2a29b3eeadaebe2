import errno
import json

import pytest

from dit_jax.machine import disk
from dit_jax.runs import workdir as workdirs

CONFIG = {"seed": 0, "run": {"total_steps": 400}}


def make(path, *, saved=None, folder=None):
    """A run's directory whose record tells of a saved step; folder: one that is in checkpoints."""
    path.mkdir(exist_ok=True)
    workdirs.claim(path, CONFIG)
    steps = [(20, None), (40, saved)]
    records = (json.dumps({"step": step, "saved": known}) + "\n" for step, known in steps)
    (path / "metrics.jsonl").write_text("".join(records))
    if folder:
        (path / "checkpoints" / folder).mkdir(parents=True)
    return path


def assert_accepted_untouched(path):
    """The check lets the run go on, and writes nothing."""

    def content():
        return {p: p.read_bytes() if p.is_file() else None for p in path.rglob("*")}

    before = content()
    workdirs.check(path, CONFIG)
    assert content() == before


@pytest.mark.parametrize("folder", [None, "8.orbax-checkpoint-tmp"])
def test_a_run_that_was_killed_before_its_first_save_starts_again(tmp_path, folder):
    assert_accepted_untouched(make(tmp_path, folder=folder))


@pytest.mark.parametrize("saved, folder", [(30, None), (30, "8.orbax-checkpoint-tmp"), (None, "8")])
def test_a_run_that_lost_its_saved_steps_does_not_start_again(tmp_path, saved, folder):
    make(tmp_path, saved=saved, folder=folder)
    with pytest.raises(ValueError, match=f"had saved step {saved or '.'}, but there is no whole"):
        workdirs.check(tmp_path, CONFIG)


def test_a_run_without_its_config_is_no_other_thing(tmp_path):
    (make(tmp_path, saved=8) / "config.json").unlink()
    with pytest.raises(ValueError, match=f"have lost its config.json, got {tmp_path}: restore it"):
        workdirs.check(tmp_path, CONFIG)


def test_a_whole_step_is_gone_on_from(tmp_path):
    make(tmp_path, saved=8, folder="8")
    (tmp_path / "checkpoints" / "8" / "_CHECKPOINT_METADATA").touch()
    assert_accepted_untouched(tmp_path)


def test_a_claim_that_was_killed_is_taken_up_again(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".partial-7-config.json").write_text("{")
    assert_accepted_untouched(tmp_path)
    with workdirs.held(tmp_path):
        workdirs.claim(tmp_path, CONFIG)
        with pytest.raises(ValueError, match="^workdir must not be written by another run, got"):
            workdirs.held(tmp_path).__enter__()
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="workdir must be where you may write, got"):
        workdirs.check(tmp_path / "run", CONFIG)


def test_a_share_that_cannot_lock_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with workdirs.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert f"{tmp_path}/run cannot be locked, let no other run write to it: " in caplog.text
