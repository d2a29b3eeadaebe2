import json

import pytest

from dit_jax.cli import workdir as workdirs

CONFIG = {"seed": 0, "run": {"checkpoint_every": 8}}


def make(path, *, last, folder=None):
    """A run's directory whose record ends at step `last`; folder: one that lies in checkpoints."""
    path.mkdir(exist_ok=True)
    workdirs.claim(path, CONFIG)
    records = (json.dumps({"step": step}) + "\n" for step in range(1, last + 1))
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


@pytest.mark.parametrize("last", [0, 1, 8, 16])  # at 16 the save of 8 may be on its way to the disk
@pytest.mark.parametrize("folder", [None, "8.orbax-checkpoint-tmp"])
def test_a_run_that_was_killed_before_its_first_save_starts_again(tmp_path, last, folder):
    assert_accepted_untouched(make(tmp_path, last=last, folder=folder))


@pytest.mark.parametrize("last, folder", [(17, None), (400, "8.orbax-checkpoint-tmp"), (1, "8")])
def test_a_run_that_lost_its_saved_steps_does_not_start_again(tmp_path, last, folder):
    make(tmp_path, last=last, folder=folder)
    with pytest.raises(ValueError, match=f"holds a record up to step {last}, but no whole step"):
        workdirs.check(tmp_path, CONFIG)


def test_what_is_lost_is_measured_by_the_run_that_lost_it(tmp_path):
    longer = CONFIG | {"run": {"checkpoint_every": 1000}}
    with pytest.raises(ValueError, match="must not have lost its saved steps"):
        workdirs.check(make(tmp_path, last=17), longer)


def test_a_whole_step_is_gone_on_from(tmp_path):
    make(tmp_path, last=400, folder="8")
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
