"""Snapshots of the averages of a run, and checkpoints made of them."""

import shutil

import jax
import numpy as np
import pytest

import dit_jax
from configs import digits
from dit_jax.checkpoint import steps, store
from dit_jax.cli import ema, evaluate, verify
from dit_jax.convert import native
from dit_jax.runs import averages, build, run, snapshots, sweeps

LAST = 24


def settings(**train):
    """A run of 24 steps with a snapshot every 3."""
    config = digits.get_config("Pi/4")
    config.train.update({"batch_size": 16, "warmup_steps": 2, "decay_steps": LAST})
    config.train.update({"ema_snapshot_every": 3} | train)
    config.sampling.num_steps = "2"
    config.run.update({"total_steps": LAST, "log_every": 1, "checkpoint_every": 8})
    config.run.update({"sample_every": 100, "num_samples": 2})
    return build.read(config)


def train(workdir, *, stop_after=None, **changed):
    """Trains to the end, or asks to stop after so many steps."""
    asked = []

    def stop_requested():
        asked.append(1)
        return len(asked) == stop_after

    run.run(settings(**changed), workdir, lambda: stop_requested)


def digests(directory):
    return {step: store.read_meta(directory, step)["digests"] for step in steps.saved(directory)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averages") / "run"
    train(workdir)
    return workdir


def test_every_snapshot_stays_and_checkpoints_have_the_averages(trained):
    assert steps.saved(trained / "averages") == list(range(3, LAST + 1, 3))
    assert steps.saved(trained / "checkpoints") == [16, LAST]
    found = digests(trained / "checkpoints")[LAST]
    assert found["averages"] == digests(trained / "averages")[LAST]["averages"]
    wide, narrow = (
        {leaf[3:]: digest for leaf, digest in found["averages"].items() if leaf[:3] == start}
        for start in ("[0]", "[1]")
    )
    assert wide.keys() == narrow.keys() == found["params"].keys() and wide != narrow


def test_the_run_without_averages_learns_the_same(trained, tmp_path):
    train(tmp_path / "plain", ema_snapshot_every=0)
    plain, found = (digests(path / "checkpoints")[LAST] for path in (tmp_path / "plain", trained))
    assert plain.keys() == {"params", "ema", "opt_state"}
    assert plain == {name: found[name] for name in plain}
    assert not (tmp_path / "plain" / "averages").exists()


@pytest.mark.parametrize("stop_after", [12, 13])  # at a snapshot, and between two
def test_a_stopped_run_resumes_to_the_same_snapshots(trained, tmp_path, stop_after):
    with pytest.raises(run.Stopped):
        train(tmp_path / "run", stop_after=stop_after)
    assert steps.latest(tmp_path / "run" / "averages") == (9 if stop_after == 12 else 12)
    # As if a killed run had come further, or had diverged there.
    shutil.copytree(trained / "averages" / "24", tmp_path / "run" / "averages" / "99")
    train(tmp_path / "run")
    for folder in ("averages", "checkpoints"):
        assert digests(tmp_path / "run" / folder) | {16: 0} == digests(trained / folder) | {16: 0}


def test_a_tracked_width_is_the_tracked_average(call, trained, tmp_path):
    code, said, _ = call(ema, trained, "--width=0.05,0.1,0.15", f"--out={tmp_path}")
    assert code == 0
    lines = [line.split(": expected error ") for line in said.splitlines()]
    assert [path for path, _ in lines] == [f"{tmp_path}/{width}" for width in (0.05, 0.1, 0.15)]
    assert float(lines[0][1]) < 1e-6 and 1e-3 < float(lines[2][1]) < 0.02
    last = flat(dit_jax.load(trained, weights="params").params)
    read = store.open_leaves(trained / "averages", LAST, "averages")
    for i, width in enumerate((0.05, 0.1)):
        made = flat(dit_jax.load(tmp_path / f"{width}").params)
        tracked = {leaf: read(f"[{i}]{leaf}") for leaf in made}
        off, distance = (
            np.sqrt(sum(np.sum((tracked[leaf] - x[leaf]) ** 2) for leaf in made))
            for x in (made, last)
        )
        assert 0 < distance and off < 1e-3 * distance


def flat(params):
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)
    }


def test_what_was_made_opens_as_every_checkpoint(trained, tmp_path):
    ((path, _),) = averages.write(trained, [0.15], tmp_path)
    dit = dit_jax.load(path)
    assert (dit.step, dit.weights, dit.settings) == (LAST, "ema", settings())
    assert dit.sample([3], num_steps="2").shape == (1, 8, 8, 1)
    assert native.read(path).model == dit.config
    meta = store.read_meta(path, LAST)
    assert meta["average"]["width"] == 0.15 and meta["average"]["tracked"] == [0.05, 0.1]
    assert meta["data_sha256"] == store.read_meta(trained / "checkpoints", LAST)["data_sha256"]
    before = (path / str(LAST)).stat().st_mtime_ns
    averages.write(trained, [0.15], tmp_path)  # it is there already
    assert (path / str(LAST)).stat().st_mtime_ns == before
    averages.write(trained, [0.15], tmp_path, step=21)
    assert steps.saved(path) == [21, LAST]


def test_verify_reads_the_snapshots(call, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    code, said, _ = call(verify, tmp_path / "run")
    assert code == 0 and "averages/3 " in said and "arrays of averages" in said
    largest = max((tmp_path / "run/averages/9").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:50])
    code, said, _ = call(verify, tmp_path / "run")
    assert code == 1 and "averages/9 " in said and "1 of 12 is damaged" in said


@pytest.mark.parametrize(
    "args, message",
    [
        (["{run}", "--width=0.3"], "width must be above 0 and below 0.2887, got 0.3"),
        (["{run}", "--width=0"], "width must be above 0 and below 0.2887, got 0.0"),
        (["{run}", "--width=wide"], "width must be numbers, as 0.05,0.1, got 'wide'"),
        (["{run}", "--width=0.1,0.10"], "width must be given once each, got 0.1, 0.1"),
        (
            ["{run}", "--width=0.1,0.01"],
            "width must be one that 16 snapshots to step 24 can give, got 0.01: the result would "
            "be off by 109% of its distance to the last parameters",
        ),
        (
            ["{run}", "--width=0.1", "--step=20"],
            "step must be one of the snapshots' 3, 6, 9, 12, 15, 18, 21, 24, got 20",
        ),
        (
            ["{run}/checkpoints", "--width=0.1"],
            "RUN must be a run with snapshots of its averages, which train.ema_snapshot_every "
            "saves, got {run}/checkpoints",
        ),
        (["{run}"], "width must be given"),
        (["--width=0.1"], "takes RUN"),
    ],
)
def test_wrong_use_is_one_line(call, trained, tmp_path, args, message):
    args = [arg.format(run=trained) for arg in args]
    code, said, errors = call(ema, *args, f"--out={tmp_path}/out")
    assert code == 2 and said == "" and not (tmp_path / "out").exists()
    (line,) = errors.splitlines()
    assert message.format(run=trained) in line


def test_a_snapshot_of_a_diverged_run_is_named(trained, tmp_path):
    shutil.copytree(trained / "averages", tmp_path / "averages")
    meta = store.read_meta(trained / "averages", LAST)
    shapes = build.parts(settings()).abstract_state().averages
    bad = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), shapes)
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path / "averages", 27, {"averages": bad}, meta)
    with pytest.raises(
        ValueError, match="step must be of a snapshot before the run diverged, got 27"
    ):
        averages.write(tmp_path, [0.1], tmp_path / "out")


def test_a_sweep_of_widths_judges_each_average(call, trained, tmp_path, monkeypatch):
    """Without judging: what is judged, and where the classifier is kept."""
    asked = []

    def judge(request, out, command, *, kept_in):
        asked.append((request.samples, str(out), str(kept_in)))
        dit_jax.load(request.samples)
        scores = {"Frechet distance": {"value": 2.0 - len(asked), "deviation": None}}
        return {"scores": scores, "samples": {"path": request.samples}}

    monkeypatch.setattr(sweeps.evaluate, "run", judge)
    flags = ["--sweep=ema_width=0.05,0.15", f"--out={tmp_path}"]
    code, _, errors = call(evaluate, *flags, trained)
    assert code == 0, errors
    assert asked == [
        (f"{tmp_path}/run/averages/{width}", f"{tmp_path}/run/ema_width={width}", str(trained))
        for width in (0.05, 0.15)
    ]
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    code, _, errors = call(evaluate, "--sweep=ema_width=0.5", f"--out={tmp_path}", trained)
    assert code == 2 and "ema_width must be above 0 and below 0.2887, got 0.5" in errors
    code, _, errors = call(evaluate, "--sweep=ema_width=0.01", f"--out={tmp_path}", trained)
    assert code == 2 and "width must be one that 16 snapshots" in errors


def test_widths_are_found_without_jax(trained):
    found = snapshots.find(trained)
    assert found.widths == (0.05, 0.1) and found.steps == list(range(3, LAST + 1, 3))
