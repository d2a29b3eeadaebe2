import importlib.util
import json

import numpy as np
import pytest
import wandb
import wandb_files
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.runs import loggers, record

EVERYTHING = {"images": 0, "scalars": 0, "tensors": 0}  # to be read, instead of some of it
PICTURE = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def line(step, loss):
    return {"step": step, "loss": loss, "images_per_second": 10.0 * step, "saved": None}


def log(workdir, start, steps, *names, picture_at=()):
    """Logs steps as a run does that goes on from `start`, into metrics.jsonl too."""
    settings = settings_lib.read({"run": {"loggers": list(names)}})
    workdir.mkdir(exist_ok=True)
    path = workdir / "metrics.jsonl"
    lines = [each for each in record.read(path) if each["step"] <= start]
    with loggers.open_all(settings, workdir, start, lines) as opened:
        for step in steps:
            lines.append(line(step, 1 / step))
            opened.scalars(lines[-1])
            if step in picture_at:
                opened.image(step, PICTURE)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def read_tensorboard(workdir):
    """(events, {name: {step: value}}) of TensorBoard's own reader; a step may be there once."""
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"), EVERYTHING)
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    for name, found in scalars.items():
        steps = [each.step for each in found]
        assert steps == sorted(set(steps)), name
    return events, {name: {x.step: x.value for x in found} for name, found in scalars.items()}


def expected(workdir, name):
    return {each["step"]: np.float32(each[name]) for each in record.read(workdir / "metrics.jsonl")}


def check_tensorboard(workdir):
    events, scalars = read_tensorboard(workdir)
    assert scalars.keys() == {"loss", "images_per_second"}  # saved is None
    for name in scalars:
        assert scalars[name] == expected(workdir, name)
    return events


def check_wandb(workdir):
    wandb.teardown()  # as at the end of a process: its own process writes after a run's end too
    rows = wandb_files.history(workdir / "wandb")
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    for name in ("loss", "images_per_second"):
        found = {row["_step"]: np.float32(row[name]) for row in rows}
        assert found == expected(workdir, name)
    return rows


def test_tensorboard_has_the_numbers_of_the_record_the_samples_and_the_settings(tmp_path):
    log(tmp_path / "run", 0, range(1, 8), "tensorboard", picture_at=(4,))
    events = check_tensorboard(tmp_path / "run")
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (4, 8, 8)
    (text,) = [each for tag in events.Tags()["tensors"] for each in events.Tensors(tag)]
    assert b'"loggers": [' in text.tensor_proto.string_val[0]


def test_tensorboard_has_every_step_once_after_a_killed_run(tmp_path):
    log(tmp_path, 0, range(1, 8), "tensorboard", picture_at=(4, 6))
    (tmp_path / "samples").mkdir()
    PICTURE.save(tmp_path / "samples" / "0000004.png")
    log(tmp_path, 4, range(5, 10), "tensorboard")  # as one killed after step 7 that saved step 4
    events = check_tensorboard(tmp_path)
    assert [each.step for each in events.Images("samples")] == [4]


@pytest.mark.parametrize("check", [check_tensorboard, check_wandb])
def test_a_logger_that_is_added_later_gets_what_the_record_has(tmp_path, check):
    log(tmp_path, 0, range(1, 8))
    log(tmp_path, 7, range(8, 10), "tensorboard", "wandb")
    check(tmp_path)


def test_wandb_has_the_numbers_of_the_record_the_samples_and_the_settings(tmp_path):
    log(tmp_path, 0, range(1, 8), "wandb", picture_at=(4,))
    rows = check_wandb(tmp_path)
    (row,) = [row for row in rows if any("samples" in name for name in row)]
    assert row["_step"] == 4
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))
    (config,) = wandb_files.configs(tmp_path / "wandb")
    assert config["run"]["loggers"] == ["wandb"] and config["model"]["size"] == "XL"


def test_wandb_has_every_step_once_after_a_killed_run(tmp_path):
    log(tmp_path, 0, range(1, 8), "wandb")
    first = json.loads((tmp_path / "wandb.json").read_text())
    assert first["step"] == 7
    log(tmp_path, 4, range(5, 10), "wandb")
    assert json.loads((tmp_path / "wandb.json").read_text()) == first | {"step": 9}
    check_wandb(tmp_path)


def test_wandb_without_an_account_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # it reads the environment once
    with pytest.raises(
        UserError, match="^run.loggers must be able to start, got 'wandb': "
    ) as info:
        log(tmp_path / "run", 0, [1], "wandb")
    assert "WANDB_MODE=offline" in str(info.value) and "\n" not in str(info.value)
    wandb.teardown()


@pytest.mark.parametrize("name", settings_lib.LOGGERS)
def test_a_logger_that_is_not_installed_is_one_line(monkeypatch, tmp_path, name):
    loggers.check([name], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"got '{name}': pip install dit_jax\[{name}\]$"):
        loggers.check([name], tmp_path)


def test_tensorboard_needs_a_workdir_on_a_disk(bucket_path):
    loggers.check(["wandb"], bucket_path)
    with pytest.raises(
        UserError, match="^run.loggers must be without tensorboard in a bucket, got"
    ):
        loggers.check(["tensorboard"], bucket_path)


def test_a_run_that_starts_at_0_again_is_another_run_of_wandb(tmp_path):
    log(tmp_path, 0, range(1, 4), "wandb")
    first = json.loads((tmp_path / "wandb.json").read_text())
    log(tmp_path, 0, range(1, 3), "wandb")  # as one that was killed before its first save
    second = json.loads((tmp_path / "wandb.json").read_text())
    assert second["step"] == 2 and second["id"] != first["id"]


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, caplog):
    class Full:
        def scalars(self, *given):
            raise OSError("no space left")

        image = close = scalars

    with loggers.Loggers([Full()]) as opened:
        opened.scalars(line(1, 0.5))
    assert "Full could not be written: no space left" in caplog.text


def test_the_names_of_loggers_are_the_same_everywhere():
    assert tuple(loggers.LOGGERS) == tuple(loggers.PACKAGES) == settings_lib.LOGGERS
    with pytest.raises(UserError, match="run.loggers must be a list of tensorboard or wandb, got"):
        settings_lib.read({"run": {"loggers": ["tensorbord"]}})
