"""dit-train with data in a bucket: like data on a disk, also after kills and when data move."""

import json
import logging
import signal

import jax
import latent_cache
import pytest
from small_run import (
    SHORT_LAST,
    assert_same_end,
    digests,
    finish_pod,
    start_pod,
    wait_for_save,
)

from dit_jax.cli import train, verify
from dit_jax.models import dit

LATENTS = ("--config.data.source=latents", "--config.data.space=latents")
TINY = (
    *("--config=configs/digits.py:Xs/4", *LATENTS),
    *("--config.train.batch_size=16", "--config.train.warmup_steps=0"),
    *("--config.train.decay_steps=0", "--config.run.log_every=1", "--config.run.sample_every=100"),
)


@pytest.fixture
def data(tmp_path):
    """A cache of 40 latents on a disk."""
    return latent_cache.write(tmp_path / "data")


@pytest.fixture
def remote(data, bucket_path):
    """The same in a bucket."""
    return latent_cache.upload(data, bucket_path)


@pytest.fixture
def train_to(call, caplog, monkeypatch, tmp_path):
    """train_to(step, workdir, path) -> what a tiny run, or its one line of error, logs."""
    monkeypatch.setitem(dit.SIZES, "Xs", (2, 16, 2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(step, workdir, path, code=0):
        caplog.set_level(logging.INFO)
        caplog.clear()
        steps = f"--config.run.total_steps={step}"
        place = (f"--config.data.path={path}", f"--workdir={workdir}")
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
            got, _, errors = call(train, *TINY, *place, steps)
        assert got == code, errors
        return errors if code else caplog.text

    return run


@pytest.mark.slow
def test_a_run_from_a_bucket_resumes_and_moves_like_one_from_a_disk(
    call, data, remote, storage, tmp_path, train_to
):
    text = train_to(6, tmp_path / "whole", data)
    assert "data: 40 examples, 2.5 batches per epoch, 2.4 epochs in 6 steps" in text
    run = tmp_path / "run"
    assert f"copying {remote} to {tmp_path}/cache/dit_jax/" in train_to(2, run, remote)
    storage.allow(read=lambda name: "array_record" not in name)
    assert "copying" not in train_to(4, run, remote)
    assert digests(run, 4).keys() == {"params", "ema", "opt_state"}
    elsewhere = data.rename(tmp_path / "elsewhere")
    assert f"data.path was '{remote}' and is '{elsewhere}'" in train_to(6, run, elsewhere)
    assert digests(run, 6) == digests(tmp_path / "whole", 6)
    train_to(6, tmp_path / "whole", remote)  # finished: config.json stays
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["data"]["path"] == str(data)

    latent_cache.write(data, seed=1)
    line = train_to(8, run, data, code=2)
    assert (
        f"dit-train: data.path must hold what the run in {run} was trained on, got {data}" in line
    )
    config = run / "config.json"  # written before the first save with the new path
    config.write_text(config.read_text().replace(str(elsewhere), str(data)))
    assert call(verify, run)[0] == 0


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.model.num_classes=9", "model.num_classes must be 10 for latents, got 9"),
        ("--config.model.in_channels=3", "model.in_channels must be 1 for"),
        ("--config.data.split=test", "data.split must be train, as in gs://tests/"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_data_are_copied(
    refuse, remote, tmp_path, monkeypatch, flag, message
):
    monkeypatch.setitem(dit.SIZES, "Xs", (2, 16, 2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = (f"--config.data.path={remote}", f"--workdir={tmp_path}/run")
    assert message in refuse(train, *TINY, *place, flag)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_damage_in_the_copy_ends_a_run_with_one_line_and_the_same_command_goes_on(
    remote, tmp_path, train_to
):
    train_to(2, tmp_path / "whole", remote)
    (copy,) = (tmp_path / "cache" / "dit_jax").iterdir()
    for shard in copy.glob("*array_record*"):
        content = bytearray(shard.read_bytes())
        content[500:564] = bytes(x ^ 1 for x in content[500:564])  # in one of eight examples
        shard.write_bytes(content)
    (line,) = train_to(2, tmp_path / "run", remote, code=2).splitlines()[-1:]
    assert (
        "its shard is damaged" in line and "this is a copy, which the same command compares" in line
    )
    train_to(2, tmp_path / "run", remote)
    assert digests(tmp_path / "run", 2) == digests(tmp_path / "whole", 2)


def test_dit_verify_checks_data_in_a_bucket(call, data, remote):
    code, out, _ = call(verify, remote)
    assert code == 0 and "no damage found" in out and out.count("0.1 MB") == 5
    name = max(path.name for path in data.glob("*array_record*"))
    (remote / name).write_bytes(bytes((data / name).stat().st_size))
    code, out, _ = call(verify, remote)
    assert code == 1 and f"DAMAGED: {remote}/{name} is damaged: its sha256 is not" in out


@pytest.mark.slow
def test_two_processes_train_from_a_bucket_bit_identically_after_kills(
    data, remote, storage, bucket_path, tmp_path
):
    """Killed while they copy, and again while they train; one refusal ends both."""
    finish_pod(start_pod(tmp_path / "whole", 2, *LATENTS, f"--config.data.path={data}"))
    run, cache = tmp_path / "run", tmp_path / "cache"
    options = (*LATENTS, f"--config.data.path={remote}", f"--config.data.cache={cache}")

    def kill_when(happens):
        workers = start_pod(run, 2, *options)

        def may(name):
            if happens(name):
                for worker in workers:
                    worker.kill()
                return False
            return True

        storage.allow(read=may)
        for worker in workers:
            worker.communicate(timeout=280)
            assert worker.returncode == -signal.SIGKILL

    storage.allow(read=lambda name: "00002" not in name)
    errors = finish_pod(start_pod(run, 2, *options), code=2)
    assert all("dit-train: data.path must be readable, got gs://" in text for text in errors)
    read = []
    kill_when(lambda name: "00002" in name and (read.append(name) or len(read) == 2))
    storage.allow()
    (folder,) = cache.iterdir()
    assert not (folder / "manifest.json").exists()
    workers = start_pod(run, 2, *options)
    wait_for_save(workers[0], run)
    for worker in workers:
        worker.kill()
        worker.communicate()
    storage.allow(read=lambda name: "array_record" not in name)
    first, second = finish_pod(start_pod(run, 2, *options))
    assert f"resuming {run} from step " in first and f"reading {remote} from its copy" in first
    assert second == ""
    assert_same_end(run, tmp_path / "whole", SHORT_LAST)
