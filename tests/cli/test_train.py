"""Runs of dit-train in other processes: killed, stopped, resumed, damaged, refused."""

import http.server
import json
import logging
import random
import shutil
import signal
import threading

import numpy as np
import pytest
from small_run import (
    LAST,
    SMALL,
    assert_same_end,
    finish,
    kill,
    losses,
    read_until,
    start,
    wait_for,
    wait_for_step,
)
from tensorboard.backend.event_processing import event_accumulator

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps
from dit_jax.cli import train
from dit_jax.machine import disk
from dit_jax.runs import history


def test_a_run_writes_config_record_curve_samples_and_checkpoints(reference):
    assert json.loads((reference / "config.json").read_text())["model"]["size"] == "Pi"
    assert (reference / "loss.png").stat().st_size > 5000
    grids = sorted(path.name for path in (reference / "samples").iterdir())
    assert grids == ["0000030.png", "0000060.png"]
    assert sorted(int(p.name) for p in (reference / "checkpoints").iterdir()) == [56, 60]
    first, last = (
        np.mean([losses(reference)[s][0] for s in steps]) for steps in ((1, 2), (59, 60))
    )
    assert last < 0.6 * first


@pytest.mark.slow  # test_faults.py has the kills during saves
def test_resume_is_bit_identical_after_kills_at_random_moments(reference, tmp_path):
    seed = random.randrange(1000)
    print(f"seed of the moments: {seed}")
    for moment in sorted(random.Random(seed).sample(range(1, LAST - 2), 5)):
        process = start(tmp_path / "run")
        wait_for_step(process, tmp_path / "run", moment)
        kill(process)
    finish(start(tmp_path / "run"))
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_resumes_bit_identically(reference, tmp_path, signum):
    logged = "--config.run.loggers=tensorboard"
    process = start(tmp_path / "run", logged)
    wait_for_step(process, tmp_path / "run", 26)  # in the second epoch, between two saves
    report = tmp_path / "run" / "report.html"
    assert "<b>running</b>" in report.read_text()  # since the first save
    process.send_signal(signum)
    errors = finish(process, code=42)
    assert "which is saved: the same command resumes from there" in errors
    stopped = steps.latest(tmp_path / "run" / "checkpoints")
    assert 26 <= stopped < LAST
    assert f"<b>stopped at step {stopped}</b>" in report.read_text()
    assert f"resuming {tmp_path}/run from step {stopped}" in finish(start(tmp_path / "run", logged))
    assert_same_end(tmp_path / "run", reference)
    events = [(each["event"], each["step"]) for each in history.read(tmp_path / "run")]
    assert events == [
        *(("started", 0), ("stopped", stopped), ("resumed", stopped), ("finished", LAST))
    ]
    text = report.read_text()
    assert f"resumed from step {stopped} on 1 x cpu" in text and "<b>finished</b>" in text
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [each.step for each in events.Scalars("loss")] == list(range(1, LAST + 1))


def test_a_second_signal_ends_the_process_without_a_save(tmp_path):
    process = start(tmp_path / "run", "--config.run.checkpoint_every=1000")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    read_until(process, "stopping after this step; once more leaves without saving")
    process.send_signal(signal.SIGTERM)
    finish(process, code=-signal.SIGTERM)
    assert steps.latest(tmp_path / "run" / "checkpoints") is None


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server: after four requests it announces maintenance."""

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        self.server.asked += 1
        notice = self.server.asked > 4 and self.path.endswith("/instance/maintenance-event")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"TERMINATE_ON_HOST_MAINTENANCE" if notice else b"NONE")

    def log_message(self, *_):
        pass


def test_a_notice_of_maintenance_saves_like_a_signal(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        server.asked = 0
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        errors = finish(start(tmp_path / "run", "--config.run.total_steps=100000"), code=42)
        server.shutdown()
    assert "maintenance-event TERMINATE_ON_HOST_MAINTENANCE: stopping after this step" in errors
    assert "which is saved: the same command resumes from there" in errors


def test_a_signal_before_the_first_step_exits_with_42(tmp_path):
    process = start(tmp_path / "run")
    wait_for(process, (tmp_path / "run" / ".lock").exists)
    process.send_signal(signal.SIGTERM)
    last = finish(process, code=42).splitlines()[-1]
    assert last == "dit-train: interrupted with nothing new to save: start the same command again"


def test_a_workdir_that_another_run_holds_is_refused(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    with disk.locked(tmp_path / "run", "workdir"):
        line = refuse(train, *SMALL, f"--workdir={tmp_path}/run")
    assert f"workdir must not be written by another run, got {tmp_path}/run" in line


def test_a_finished_run_ends_at_once_without_a_restore(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(LAST) / "params")
    before = (run / "config.json").read_bytes()
    errors = finish(start(run, "--config.run.total_steps=20"))  # less than it has
    expected = f"it is at step {LAST}, and run.total_steps is 20. To train it further, set "
    assert f"{run} is trained already: {expected}" in errors and "compiled" not in errors
    assert (run / "config.json").read_bytes() == before


def test_a_run_whose_rate_has_decayed_names_the_way_to_train_on(call, reference, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    run = shutil.copytree(reference, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["train"] |= {"warmup_steps": 5, "decay_steps": 50}
    (run / "config.json").write_text(json.dumps(config))
    assert call(train, "--workdir", run, "--config.run.total_steps=60")[0] == 0
    assert (
        f"run.total_steps is 60. To train it further, start another run with --init_from={run}: "
        "the learning rate of this one is 0 after train.decay_steps 50"
    ) in caplog.text


@pytest.mark.parametrize("config", [[], ["--config.run.total_steps=5"]])
def test_a_new_run_without_a_config_is_refused(refuse, tmp_path, config):
    line = refuse(train, f"--workdir={tmp_path}/new", *config)
    assert line == (
        f"dit-train: --config must be given for a new run, and there is none in {tmp_path}/new"
    )
    assert not (tmp_path / "new").exists()


def test_a_wrong_field_or_a_corrupt_config_of_a_workdir_alone_is_refused(
    refuse, reference, tmp_path
):
    line = refuse(train, f"--workdir={reference}", "--config.run.total_step=5")
    assert line == (
        "dit-train: config has no field run.total_step; did you mean --config.run.total_steps? "
        "--help lists all fields"
    )
    (tmp_path / "config.json").write_text("{")
    line = refuse(train, f"--workdir={tmp_path}")
    assert line.startswith(f"dit-train: {tmp_path}/config.json must be the config of a run, but it")


DIGITS = "--config=configs/digits.py"
RANDOM = "--config.data.source=synthetic"


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--config=configs/imagenet256.py:XXL/2", RANDOM],
            "model.size must be one of Pi, Na, Ti, XS, S, B, M, L, XL, H, G, got",
        ),
        (
            ["--config=configs/imagenet256.py:XL2"],
            "a variant must be SIZE/PATCH, such as XL/2, got 'XL2'",
        ),
        (
            ["--config=configs/imagenet256.py:XL/3", RANDOM],
            "input_size must be divisible by patch_size 3",
        ),
        (["--config=configs/imagenet256.py:XL/0", RANDOM], "patch_size must be at least 1, got 0"),
        (["--config=configs/imagenet512.py"], "data.path must be given: what dit-prepare or dit-"),
        (["--config=configs/none.py"], "a Python file that exists, got configs/none.py"),
        (["--config", "configs/none.py"], "a Python file that exists, got configs/none.py"),
        (["--config=~none/none.py"], "config must be a Python file that exists, got ~none/none"),
        (["--config=README.md"], "config must be a Python file that runs, got README.md: "),
        (["--config="], "config must not be empty"),
        (["--config", "configs/digits.py", "--config.seed=-1"], "seed must be in 0 .. 4294967295"),
        (["--config=digits"], "got digits; did you mean "),
        (["--config=mine.py"], "configs has digits.py, "),
        (["DiT-XL/2"], "data.path must be given"),
        (["--config=xl/2", "--config.seed=-1"], "seed must be in 0 .. 4294967295, got -1"),
        (
            ["configs/imagenet256.py:dit-b/3", RANDOM],
            "model.input_size must be divisible by patch_size 3",
        ),
        (
            [DIGITS, "--run.total_steps=3"],
            "is no flag --run.total_steps; did you mean --config.run",
        ),
        (
            [DIGITS, DIGITS],
            "config must be given once, got configs/digits.py and configs/digits.py",
        ),
        ([DIGITS, "a", "b", "c"], "takes CONFIG WORKDIR, got 'a b c'"),
        ([DIGITS, "--config.seed=4294967296"], "seed must be in 0 .. 4294967295, got 4294967296"),
        ([DIGITS, "--config.model.layers=3"], "config has no field model.layers"),
        ([DIGITS, "--config.nothing.at=3"], "config has no field nothing"),
        (
            [DIGITS, "--config.run.total_step=3"],
            "config has no field run.total_step; did you mean --config.run.total_steps?",
        ),
        ([DIGITS, "--config.model=S"], "config.model must be set field by field, as --config.mod"),
        ([DIGITS, "--config.model.null_label=maybe"], "null_label must be true or false, got 'ma"),
        ([DIGITS, "--config.model.input_size=8"], "must be (8, 8) for digits, got (8,)"),
        ([DIGITS, "--config.model.input_size=(8, 8, 8)"], "for digits, got (8, 8, 8)"),
        ([DIGITS, "--config.model.input_size=(8.0, 8)"], "input_size must be whole numbers of at"),
        ([DIGITS, "--config.model.input_size=(0, 8)"], "of at least 1, got (0, 8)"),
        (
            [DIGITS, "--config.sampling.cfg_interval=5"],
            "cfg_interval must be two numbers, first <= last, got (5,)",
        ),
        ([DIGITS, "--config.sampling.cfg_interval=(0, 999.5)"], "in 0 .. 999, got (0, 999.5)"),
        ([DIGITS, "--config.sampling.cfg_scale=nan"], "sampling.cfg_scale must be finite, got nan"),
        ([DIGITS, "--config.train.learning_rate=inf"], "train.learning_rate must be finite, got"),
        ([DIGITS, "--config.train.weight_decay=nan"], "train.weight_decay must be finite, got nan"),
        ([DIGITS, "--config.train.eps=0"], "train.eps must be above 0, got 0.0"),
        ([DIGITS, "--config.seed.x=3"], "config has no field seed.x; --help lists"),
        ([DIGITS, "--config.seed=x"], "config.seed must be a whole number, got"),
        ([DIGITS, "--config.run.spike_factor=x"], "run.spike_factor must be a number, got 'x'"),
        (
            [DIGITS, "--config.data.source=mnist"],
            "data.source must be one of digits, fashion, images",
        ),
        (
            [DIGITS, "--config.model.num_classes=5"],
            "model.num_classes must be 10 for digits, got 5",
        ),
        ([DIGITS, "--config.model.in_channels=3"], "in_channels must be 1 for digits, got 3"),
        (
            [DIGITS, "--config.train.batch_size=100"],
            "divisible by 8 (mesh.data x mesh.fsdp) x 1 accum",
        ),
        (
            [DIGITS, "--config.train.batch_size=16000000000"],
            "train.batch_size must fit into the memory of a host, ",
        ),
        ([DIGITS, "--config.train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
        ([DIGITS, "--config.run.total_steps=0"], "total_steps must be in 1 .. 2147483647, got 0"),
        ([DIGITS, "--config.run.total_steps=2147483648"], "be in 1 .. 2147483647, got 2"),
        ([DIGITS, "--config.run.num_samples=10001"], "num_samples must be at most 10000, got"),
        ([DIGITS, "--config.run.score_samples=50001"], "samples must be at most 50000, got"),
        ([DIGITS, "--config.run.log_every=0"], "run.log_every must be at least 1, got 0"),
        ([DIGITS, "--config.train.learning_rate=0.0"], "learning_rate must be above 0, got 0.0"),
        ([DIGITS, "--config.train.ema_decay=1.0"], "train.ema_decay must be in [0, 1), got 1.0"),
        ([DIGITS, "--config.train.warmup_steps=-1"], "steps must be in 0 .. 2147483647, got"),
        ([DIGITS, "--config.train.decay_steps=3"], "decay_steps must be 0 or above warmup_steps"),
        ([DIGITS, "--config.model.null_label=False"], "class_dropout_prob must be 0 without"),
        ([DIGITS, "--config.compute.dtype=float16"], "dtype must be one of float32, bfloat16"),
        ([DIGITS, "--config.compute.remat=some"], "remat must be one of none, dots, full, got"),
        ([DIGITS, "--config.compute.attention=cudnn"], "'cudnn' only on a GPU in bfloat16"),
        ([DIGITS, "--config.diffusion.schedule=cubic"], "schedule must be one of linear, squared_"),
        ([DIGITS, "--config.diffusion.num_steps=1"], "num_steps must be at least 2, got 1"),
        ([DIGITS, "--config.sampling.num_steps=ten"], "num_steps must be a whole number, as"),
        ([DIGITS, "--config.data.source="], "config.data.source must not be empty"),
        ([DIGITS, "stray"], "config must be given once, got the word stray and --config too"),
        ([DIGITS, "--steps=3"], "there is no flag --steps; did you mean --config."),
        ([], "--config must be given"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(refuse, tmp_path, args, message):
    workdir = tmp_path / "new"
    assert message in refuse(train, *args, f"--workdir={workdir}")
    assert not workdir.exists()


def test_a_workdir_of_another_run_is_refused(refuse, reference):
    options = [o for o in SMALL if "accumulation" not in o]
    before = (reference / "config.json").read_text()
    line = refuse(train, *options, "--config.seed=4", f"--workdir={reference}")
    assert "workdir must not hold a run of another config" in line
    assert (
        "seed 0, got 4 (and 1 more); only mesh.*, run.*, sampling.*, compute.attention, "
        "compute.remat, compute.unroll, data.cache may change when a run is resumed, and data.path "
        "and data.vae if they hold the same: use another --workdir, and to start from what this "
        f"run has learned, --init_from={reference}"
    ) in line
    assert (reference / "config.json").read_text() == before


def test_a_folder_of_other_things_is_refused(refuse, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    line = refuse(train, DIGITS, f"--workdir={tmp_path}")
    assert f"new, empty or a run of dit-train, got {tmp_path} with letters.txt" in line


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_workdir_that_is_or_is_under_a_file_is_refused(refuse, tmp_path, inside):
    (tmp_path / "file").touch()
    line = refuse(train, DIGITS, f"--workdir={tmp_path}/file{inside}")
    assert f"workdir must not be or lie under a file, got {tmp_path}/file{inside}" in line


def test_an_empty_workdir_is_refused(refuse):
    assert "workdir must not be empty" in refuse(train, DIGITS, "--workdir=")


def largest_array(step):
    """The file with most of the parameters of a step."""
    files = (path for path in (step / "params").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(x, marks=pytest.mark.slow) for x in ("cut", "deleted"))]
)
def test_a_corrupt_step_is_set_aside_and_the_run_resumes_from_the_one_before(
    reference, tmp_path, damage
):
    run = shutil.copytree(reference, tmp_path / "run")
    path = largest_array(run / "checkpoints" / str(LAST))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data if damage == "flipped" else data[:100])
    if damage == "deleted":
        path.unlink()
    errors = finish(start(run, "--config.run.total_steps=64"))
    assert f"checkpoint {run}/checkpoints/{LAST} " in errors
    assert f"moved to {run}/damaged/{LAST}, resuming from an older step" in errors
    assert f"resuming {run} from step 56" in errors
    assert (run / "damaged" / str(LAST) / "meta").is_dir()
    assert steps.latest(run / "checkpoints") == 64
    again = losses(run)
    assert all(again[step] == loss for step, loss in losses(reference).items())  # bit-identical


def test_an_incomplete_step_is_set_aside_by_a_workdir_alone_with_its_own_config(
    reference, tmp_path
):
    run = shutil.copytree(reference, tmp_path / "run")
    (run / "checkpoints" / str(LAST) / "_CHECKPOINT_METADATA").unlink()
    errors = finish(start(run, config=()))
    assert f"step {LAST} is incomplete and was moved to {run}/damaged/{LAST}" in errors
    assert f"resuming {run} from step 56" in errors
    assert_same_end(run, reference)
    assert (run / "config.json").read_bytes() == (reference / "config.json").read_bytes()


def test_a_run_whose_only_step_is_corrupt_is_refused_and_not_changed(refuse, reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(LAST))
    largest = largest_array(run / "checkpoints" / "56")
    largest.write_bytes(largest.read_bytes()[:100])
    config = (run / "config.json").read_bytes()
    options = (*SMALL, "--config.run.total_steps=100", f"--workdir={run}")
    assert f"checkpoint {run}/checkpoints/56 cannot be read: " in refuse(train, *options)
    assert (run / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", '{"seed": 0', "config.json must be the config of a run, but it is damaged"),
        ("config.json", "[]", "config.json must be the config of a run, but it is damaged"),
        ("metrics.jsonl", '{"step": 1}\noops\n', "line 2 of {run}/metrics.jsonl must be a record"),
        ("metrics.jsonl", "\0\0\n", "line 1 of {run}/metrics.jsonl must be a record"),
    ],
)
def test_a_corrupt_config_or_record_is_refused(refuse, reference, tmp_path, name, text, message):
    shutil.copy(reference / "config.json", tmp_path)
    (tmp_path / name).write_text(text)
    assert message.format(run=tmp_path) in refuse(train, *SMALL, f"--workdir={tmp_path}")


def test_help_shows_an_example_and_names_the_fields_file(call):
    code, out, _ = call(train, "--help")
    assert code == 0
    assert "dit-train configs/digits.py runs/digits" in out and "--workdir" in out
    assert "configs/base.py explains every field" in " ".join(out.split())
    for name in settings_lib.defaults():
        assert f"--config.{name}=" in out
    assert "None" not in out
