"""Snapshots of the averages of a run, and checkpoints made of them."""

import functools
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import dit_jax
from configs import digits
from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.cli import ema, evaluate, verify
from dit_jax.convert import native
from dit_jax.models import dit
from dit_jax.runs import averages, build, run, sweeps
from dit_jax.train import power_ema
from dit_jax.train.state import TrainState

LAST = 24
WIDTHS = (0.05, 0.1, 0.15)


def settings(**train):
    """A run of 24 steps with a snapshot every 6."""
    config = digits.get_config("Pi/4")
    config.train.update({"batch_size": 16, "warmup_steps": 2, "decay_steps": LAST})
    config.train.update({"ema_snapshot_every": 6} | train)
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


@pytest.fixture(autouse=True, scope="module")
def on_one_device():
    """Runs train on one device, without samples and a report: a tenth of the time."""
    parts = functools.partial(build.parts, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.build, "parts", parts)
        patch.setattr(run.hooks, "make", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averages") / "run"
    train(workdir)
    return workdir


def test_every_snapshot_stays_and_checkpoints_have_the_averages(trained):
    assert steps.saved(trained / "averages") == [6, 12, 18, LAST]
    assert steps.saved(trained / "checkpoints") == [16, LAST]
    found = digests(trained / "checkpoints")[LAST]
    assert found["averages"] == digests(trained / "averages")[LAST]["averages"]
    wide, narrow = (
        {leaf[3:]: digest for leaf, digest in found["averages"].items() if leaf[:3] == start}
        for start in ("[0]", "[1]")
    )
    assert wide.keys() == narrow.keys() == found["params"].keys() and wide != narrow


@pytest.mark.slow  # a fast test of the same: train/test_muon.py
def test_the_run_without_averages_learns_the_same(trained, tmp_path):
    train(tmp_path / "plain", ema_snapshot_every=0)
    plain, found = (digests(path / "checkpoints")[LAST] for path in (tmp_path / "plain", trained))
    assert plain.keys() == {"params", "ema", "opt_state"}
    assert plain == {name: found[name] for name in plain}
    assert not (tmp_path / "plain" / "averages").exists()


def test_a_resumed_run_saves_what_is_missing_and_deletes_what_comes_later(tmp_path):
    def state(step):
        average = {"x": jax.numpy.full(3, step, jax.numpy.float32)}
        return TrainState(np.int32(step), None, None, None, (average,))

    def open_saver():
        return averages.Saver(settings(), {"model": {}}, tmp_path)

    with open_saver() as saver:
        saver.begin(state(0))
        for step in (6, 12):
            saver.save(step, state(step))
        saver.complete(18, state(18))
        assert steps.saved(tmp_path / "averages") == [6, 12, 18]  # nothing is under way
    before = digests(tmp_path / "averages")
    steps.delete(tmp_path / "averages", 12)  # as if the disk had been full
    with open_saver() as saver:
        saver.begin(state(12))
        saver.save(12, state(12))  # a second time: does nothing
        saver.complete(16, state(16))  # no step of a snapshot
    found = digests(tmp_path / "averages")
    assert found == {step: before[step] for step in (6, 12)}
    assert store.read_meta(tmp_path / "averages", 12)["ema_widths"] == [0.05, 0.1]


@pytest.mark.slow  # the test before does the same without training
@pytest.mark.parametrize("stop_after", [12, 13])  # at a snapshot, and between two
def test_a_stopped_run_resumes_to_the_same_snapshots(trained, tmp_path, stop_after):
    with pytest.raises(run.Stopped):
        train(tmp_path / "run", stop_after=stop_after)
    folder = tmp_path / "run" / "averages"
    assert steps.saved(folder) == [6, 12]  # before the checkpoint of that step
    if stop_after == 12:  # as if the disk had been full
        steps.delete(folder, 12)
    # As if a killed run had come further, or had diverged there.
    shutil.copytree(trained / "averages" / "24", folder / "99")
    train(tmp_path / "run")
    for name in ("averages", "checkpoints"):
        found, expected = (digests(path / name) for path in (tmp_path / "run", trained))
        assert found[LAST] == expected[LAST]
        assert name == "checkpoints" or found == expected


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(a run whose parameters walked at random, {width: their average, "last": the last})."""
    path, chosen = tmp_path_factory.mktemp("walk") / "run", settings()
    model = build.parts(chosen).model
    shapes = jax.eval_shape(lambda: dit.init(model, jax.random.key(0)))
    rng, exponents = np.random.default_rng(0), [power_ema.exponent_of(width) for width in WIDTHS]
    x = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    averages = [x for _ in WIDTHS]
    about = {"model": model._asdict(), "config": settings_lib.to_json(chosen)}
    about |= {"data_sha256": "abc", "ema_widths": [0.05, 0.1]}
    with store.open_writer(background=False) as writer:
        for k in range(1, LAST + 1):
            x = jax.tree.map(lambda x: x + rng.normal(size=x.shape), x)
            for i, exponent in enumerate(exponents):
                weight = 1 - (1 - 1 / k) ** (exponent + 1)
                averages[i] = jax.tree.map(lambda a, x, w=weight: a + w * (x - a), averages[i], x)
            if k % 6 == 0:
                items = {"averages": (single(averages[0]), single(averages[1]))}
                store.save(writer, path / "averages", k, items, about)
        store.save(writer, path / "checkpoints", LAST, {"ema": single(x)}, about)
    return path, dict(zip(WIDTHS, averages, strict=True)) | {"last": x}


def single(tree):
    return jax.tree.map(np.float32, tree)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs))


def test_widths_are_reconstructed(call, walk, tmp_path):
    """The tracked ones but for rounding, another with the error that is printed."""
    path, known = walk
    code, said, _ = call(ema, path, "--width=0.05,0.1,0.15", f"--out={tmp_path}")
    assert code == 0
    lines = [line.split(": expected error ") for line in said.splitlines()]
    assert [name for name, _ in lines] == [f"{tmp_path}/{width}" for width in WIDTHS]
    errors = [float(error.removesuffix("%")) / 100 for _, error in lines]
    assert max(errors[:2]) < 1e-6 and 0.04 < errors[2] < 0.05
    for width, error in zip(WIDTHS, errors, strict=True):
        made = dit_jax.load(tmp_path / f"{width}").params
        off = distance(made, known[width]) / distance(known[width], known["last"])
        # Rounded to float32; and 24 steps are not yet the integral that the error is for.
        assert off < (1e-6 if width < 0.15 else 2 * error)


def test_what_was_made_opens_as_every_checkpoint(walk, tmp_path):
    run, _ = walk
    ((path, _),) = averages.write(run, [0.15], tmp_path)
    opened = dit_jax.load(path)
    assert (opened.step, opened.weights, opened.settings) == (LAST, "ema", settings())
    assert native.read(path).model == opened.config
    meta = store.read_meta(path, LAST)
    assert meta["average"]["width"] == 0.15 and meta["average"]["tracked"] == [0.05, 0.1]
    assert meta["data_sha256"] == "abc" and "ema_widths" not in meta
    before = (path / str(LAST)).stat().st_mtime_ns
    averages.write(run, [0.15], tmp_path)  # it is there already
    assert (path / str(LAST)).stat().st_mtime_ns == before
    averages.write(run, [0.1], tmp_path, step=12)
    assert steps.saved(tmp_path / "0.1") == [12]


def test_verify_reads_the_snapshots(call, walk, tmp_path):
    shutil.copytree(walk[0], tmp_path / "run")
    code, said, _ = call(verify, tmp_path / "run")
    assert "averages/6 " in said and "arrays of averages" in said and "averages/12" in said
    largest = max((tmp_path / "run/averages/12").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:50])
    code, said, _ = call(verify, tmp_path / "run")
    (line,) = [line for line in said.splitlines() if line.startswith("averages/12 ")]
    assert code == 1 and "DAMAGED" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["{run}", "--width=0.3"], "width must be above 0 and below 0.2887, got 0.3"),
        (["{run}", "--width=0"], "width must be above 0 and below 0.2887, got 0.0"),
        (["{run}", "--width=wide"], "width must be numbers, as 0.05,0.1, got 'wide'"),
        (["{run}", "--width=0.1,0.10"], "width must be given once each, got 0.1, 0.1"),
        (
            ["{run}", "--width=0.1,0.01"],
            "width must be one that snapshots of 4 steps can give, got 0.01: the result would be "
            "off by 346% of its distance to the last parameters",
        ),
        (
            ["{run}", "--width=0.1", "--step=20"],
            "step must be one of the snapshots' 6, 12, 18, 24, got 20",
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
def test_wrong_use_is_one_line(call, walk, tmp_path, args, message):
    args = [arg.format(run=walk[0]) for arg in args]
    code, said, errors = call(ema, *args, f"--out={tmp_path}/out")
    assert code == 2 and said == "" and not (tmp_path / "out").exists()
    (line,) = errors.splitlines()
    assert message.format(run=walk[0]) in line


def test_averages_are_not_written_into_the_run_itself(call, walk):
    code, _, errors = call(ema, walk[0], "--width=0.1", f"--out={walk[0]}/")
    assert code == 2 and "--out must be another folder than the run" in errors


def test_a_snapshot_of_a_diverged_run_is_named(walk, tmp_path):
    run, known = walk
    shutil.copytree(run / "averages", tmp_path / "averages")
    meta = store.read_meta(run / "averages", LAST)
    bad = (single(jax.tree.map(lambda x: x * np.nan, known["last"])),) * 2
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path / "averages", 27, {"averages": bad}, meta)
    with pytest.raises(
        ValueError, match="step must be of a snapshot before the run diverged, got 27"
    ):
        averages.write(tmp_path, [0.1], tmp_path / "out")


def test_a_sweep_of_widths_judges_each_average(call, walk, tmp_path, monkeypatch):
    """Without judging: what is judged, and where the classifier is kept."""
    asked, path = [], str(walk[0])

    def judge(request, out, command, *, kept_in):
        asked.append((request.samples, str(out), str(kept_in)))
        dit_jax.load(request.samples)
        scores = {"Frechet distance": {"value": 2.0 - len(asked), "deviation": None}}
        return {"scores": scores, "samples": {"path": request.samples}}

    monkeypatch.setattr(sweeps.evaluate, "run", judge)
    flags = ["--sweep=ema_width=0.05,0.15", f"--out={tmp_path}"]
    code, _, errors = call(evaluate, *flags, path)
    assert code == 0, errors
    assert asked == [
        (f"{tmp_path}/run/averages/{width}", f"{tmp_path}/run/ema_width={width}", path)
        for width in (0.05, 0.15)
    ]
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    code, _, errors = call(evaluate, "--sweep=ema_width=0.5", f"--out={tmp_path}", path)
    assert code == 2 and "ema_width must be above 0 and below 0.2887, got 0.5" in errors
    code, _, errors = call(evaluate, "--sweep=ema_width=0.01", f"--out={tmp_path}", path)
    assert code == 2 and "width must be one that snapshots of 4 steps" in errors
    code, _, errors = call(evaluate, *flags, "--weights=params", path)
    assert code == 2 and "--weights must be ema with --sweep=ema_width, got params" in errors


def test_widths_are_judged_with_each_value_of_another_option(call, walk, tmp_path, monkeypatch):
    asked = []

    def judge(request, out, command, *, kept_in):
        asked.append((request.samples, request.sampling, out.name))
        scores = {"Frechet distance": {"value": 2.0 - len(asked), "deviation": None}}
        return {"scores": scores, "samples": {"path": request.samples}}

    monkeypatch.setattr(sweeps.evaluate, "run", judge)
    flags = ["--sweep=cfg_scale=1,2", "--sweep=ema_width=0.05,0.1", f"--out={tmp_path}"]
    code, text, errors = call(evaluate, *flags, walk[0])
    assert code == 0, errors
    assert asked == [
        (
            f"{tmp_path}/run/averages/{width}",
            {"cfg_scale": scale},
            f"cfg_scale={scale},ema_width={width}",
        )
        for scale in (1.0, 2.0)
        for width in (0.05, 0.1)
    ]
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert rows == [["run/cfg_scale=1.0", "1", "0"], ["run/cfg_scale=2.0", "-1", "-2"]]
    assert (tmp_path / "sweep.png").exists()


def test_the_snapshots_of_a_run_are_found_without_jax(walk):
    code = f"""if True:
        import sys
        from dit_jax.runs import snapshots
        print(snapshots.find({str(walk[0])!r}).widths, "jax" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(0.05, 0.1) False\n"
