import errno
import json
from pathlib import Path

import pytest

from dit_jax import settings as settings_lib
from dit_jax.data import feed
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import lock, moved, own_config
from dit_jax.runs import workdir as workdirs

SETTINGS = settings_lib.read({"data": {"source": "digits"}, "run": {"total_steps": 400}})


def make(path, *, saved=None, folder=None):
    """A run's directory. saved: the step that its record names; folder: a folder in checkpoints."""
    path.mkdir(exist_ok=True)
    workdirs.claim(path, SETTINGS)
    steps = [(20, None), (40, saved)]
    records = (json.dumps({"step": step, "saved": newest}) + "\n" for step, newest in steps)
    (path / "metrics.jsonl").write_text("".join(records))
    if folder:
        (path / "checkpoints" / folder).mkdir(parents=True)
    return path


def assert_accepted_untouched(path):
    """Expects that `check` raises nothing and writes nothing."""

    def read_all():
        return {p: p.read_bytes() if p.is_file() else None for p in path.rglob("*")}

    before = read_all()
    workdirs.check(path, SETTINGS)
    assert read_all() == before


def change(fields):
    """SETTINGS with other values of {topic: {field: value}}."""
    config = settings_lib.to_json(SETTINGS)
    for topic, values in fields.items():
        config[topic] |= values
    return settings_lib.read(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"run": {"total_steps": 800, "log_every": 7, "keep_best": 1}},
        {"mesh": {"fsdp": 8, "shard_optimizer": False}},
        {"sampling": {"sampler": "ddim", "num_steps": "50", "cfg_interval": [0, 500]}},
        {"compute": {"attention": "xla", "remat": "full", "unroll": True}},
        {"data": {"cache": "/mnt/disk"}},
    ],
)
def test_a_resumed_run_may_change_what_does_not_change_its_result(tmp_path, fields):
    make(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    workdirs.check(tmp_path, change(fields))
    assert (tmp_path / "config.json").read_bytes() == before  # a check writes nothing
    assert json.loads(before) != settings_lib.to_json(change(fields))  # and these are changes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate 0.0001, got 0.5;"),
        ({"train": {"optimizer": "muon"}}, "train.optimizer 'adamw', got 'muon';"),
        ({"train": {"ema_snapshot_every": 9}}, "train.ema_snapshot_every 0, got 9;"),
        ({"compute": {"dtype": "float32"}}, "compute.dtype 'bfloat16', got 'float32';"),
        ({"model": {"size": "S"}, "data": {"flip": False}}, r"'XL', got 'S' \(and 1 more\);"),
    ],
)
def test_a_resumed_run_must_not_change_what_is_learned(tmp_path, fields, message):
    make(tmp_path, saved=8)
    expected = (
        f"workdir must not hold a run of another config: {tmp_path} has .*{message} only mesh"
    )
    with pytest.raises(UserError, match=expected):
        workdirs.check(tmp_path, change(fields))


@pytest.mark.parametrize("folder", [None, "8.orbax-checkpoint-tmp"])
def test_a_run_that_was_killed_before_its_first_save_may_start_at_0(tmp_path, folder):
    assert_accepted_untouched(make(tmp_path, folder=folder))


@pytest.mark.parametrize("folder", [None, "8.orbax-checkpoint-tmp"])
def test_a_run_that_saved_nothing_may_start_with_another_config(tmp_path, folder):
    make(tmp_path, folder=folder)
    new = change({"train": {"batch_size": 16}, "data": {"path": "other"}})
    workdirs.check(tmp_path, new)
    moved.check(tmp_path, new, feed.Feed([], None, None))
    workdirs.claim(tmp_path, new)
    assert own_config.read_settings(tmp_path) == new


@pytest.mark.parametrize("saved, folder", [(30, None), (30, "8.orbax-checkpoint-tmp"), (None, "8")])
def test_a_run_that_lost_its_saved_steps_is_refused(tmp_path, saved, folder):
    make(tmp_path, saved=saved, folder=folder)
    with pytest.raises(UserError, match=f"had saved step {saved or '.'}, but there is no complete"):
        workdirs.check(tmp_path, SETTINGS)


def test_a_run_that_lost_its_config_is_refused(tmp_path):
    (make(tmp_path, saved=8) / "config.json").unlink()
    with pytest.raises(UserError, match=f"have lost its config.json, got {tmp_path}: restore it"):
        workdirs.check(tmp_path, SETTINGS)


def test_a_run_with_a_complete_step_may_resume(tmp_path):
    make(tmp_path, saved=8, folder="8")
    (tmp_path / "checkpoints" / "8" / "_CHECKPOINT_METADATA").touch()
    assert_accepted_untouched(tmp_path)


def test_a_claim_removes_what_a_killed_claim_left(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".partial-7-config.json").write_text("{")
    assert_accepted_untouched(tmp_path)
    with lock.held(tmp_path):
        workdirs.claim(tmp_path, SETTINGS)
        with pytest.raises(UserError, match="^workdir must not be written by another run, got"):
            lock.held(tmp_path).__enter__()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == settings_lib.to_json(SETTINGS) and config["run"]["total_steps"] == 400
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_workdir_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="workdir must be where you may write, got"):
        workdirs.check(tmp_path / "run", SETTINGS)


def test_a_warning_names_a_share_that_cannot_lock(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with lock.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert f"{tmp_path}/run cannot be locked, let no other run write to it: " in caplog.text


def test_a_workdir_that_cannot_be_made_is_refused():
    workdir = Path("/proc/none/run")  # root may write to /proc, but nothing can be made there
    workdirs.check(workdir, settings_lib.Settings())
    with pytest.raises(UserError, match="^workdir must be where a folder can be made, got /proc/"):
        with lock.held(workdir):
            pass


NOTHING = [".DS_Store", "._4", ".gitkeep", ".nfs0000000001", "lost+found", "Thumbs.db"]
NOTHING += ["slurm-123.out", "dit-7.err", "train.log", "@eaDir", "$RECYCLE.BIN"]


@pytest.mark.parametrize("name", NOTHING)
def test_files_of_systems_and_logs_may_be_in_a_new_workdir(tmp_path, name):
    (tmp_path / name).touch()
    assert_accepted_untouched(tmp_path)


def test_a_refused_workdir_names_the_file_in_the_way(tmp_path):
    for name in (".DS_Store", "slurm-123.out", "letters.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"run of dit-train, got {tmp_path} with letters.txt$"):
        workdirs.check(tmp_path, SETTINGS)
