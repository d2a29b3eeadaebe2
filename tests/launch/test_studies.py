"""The scripts that train several runs and compare them, with a Python of the tests."""

import functools
import shutil

import pytest

# dit-train saves steps 2 and 4, dit-evaluate writes a receipt or a sweep, STOP ends a run.
STUDY = r"""
case "${0##*/} $1" in
  dit-train*) [ "${STOP:-}" != "${2##*/}" ] || exit 42
    mkdir -p "$2/checkpoints/2" "$2/checkpoints/4" ;;
  dit-evaluate\ --study*) echo "the table" ;;
  dit-evaluate\ --sweep*) out=${4#--out=}
    mkdir -p "$out" && touch "$out/sweep.json" ;;
  dit-evaluate*) mkdir -p "$2" && touch "$2/receipt.json"
    kept=${2%/scores/*}/evaluation/classifier
    [ -e "$kept" ] || { mkdir -p "$kept" && echo "of $2" > "$kept/weights"; } ;;
esac
"""


@pytest.fixture
def start(clone, put_python, run, tmp_path):
    """start(script, *flags, **settings) -> the ended process, its calls of our commands."""
    put_python(STUDY)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{split}-{kind}-ubyte").touch()
    base = {"WORKDIR": str(tmp_path / "study"), "STEPS": "4", "EVERY": "2"}

    def call(script, *flags, **settings):
        (tmp_path / "calls").write_text("")
        done = run(clone / "launch" / script, *flags, **base | settings)
        calls = (tmp_path / "calls").read_text().splitlines()
        return done, [line for line in calls if line.startswith("dit-")]

    return call


@pytest.fixture
def study(start, tmp_path):
    """start of scaling.sh with data."""
    return functools.partial(start, "scaling.sh", DATA=str(tmp_path))


@pytest.fixture
def compare(start):
    """start of objectives.sh."""
    return functools.partial(start, "objectives.sh")


def test_scaling_trains_and_scores_each_model_and_design_then_plots(study, tmp_path):
    settings = {"MODELS": " Ti/4 Pi/2", "DESIGNS": "adaln adaln_zero", "SAMPLES": "30"}
    done, calls = study("--config.seed=1", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the table\nthe study took 0 min" in done.stdout
    expected = []
    for model, design, name in [
        *(("Ti/4", "adaln_zero", "Ti-4"), ("Pi/2", "adaln_zero", "Pi-2")),
        ("Ti/4", "adaln", "Ti-4-adaln"),
    ]:
        path = tmp_path / "study" / name
        expected += [
            f"dit-train configs/scaling.py:{model} {path} --config.data.path={tmp_path} "
            f"--config.model.conditioning={design} --config.run.total_steps=4 "
            "--config.run.checkpoint_every=2 --config.seed=1",
            f"dit-evaluate {path}/checkpoints/2 {path}/scores/2 --num_samples=30",
            f"dit-evaluate {path}/checkpoints/4 {path}/scores/4 --num_samples=30",
        ]
    workdir = tmp_path / "study"
    assert calls == [*expected, f"dit-evaluate --study={workdir} --out={workdir}/plots"]


def test_all_runs_of_scaling_are_judged_by_one_classifier(study, tmp_path):
    study(MODELS="Ti/4 Pi/2 Pi/7", DESIGNS="adaln")
    files = list((tmp_path / "study").glob("*/evaluation/*/*"))
    assert {path.read_text() for path in files} == {f"of {tmp_path}/study/Ti-4/scores/2\n"}
    assert {path.parts[-2] for path in files} == {"classifier"} and len(files) == 4


def test_scaling_skips_what_is_done(study, tmp_path):
    settings = {"MODELS": "Ti/4", "DESIGNS": ""}
    assert len(study(**settings)[1]) == 4
    assert [line.split()[1] for line in study(**settings)[1]] == [f"--study={tmp_path}/study"]
    run = tmp_path / "study" / "Ti-4"
    (run / "scores" / "2" / "receipt.json").unlink()
    _, calls = study(**settings)
    assert calls[0].startswith(f"dit-evaluate {run}/checkpoints/2 ") and len(calls) == 2


def test_scaling_trains_again_without_the_last_step_and_leaves_out_damaged_ones(study, tmp_path):
    settings = {"MODELS": "Ti/4", "DESIGNS": ""}
    study(**settings)
    run = tmp_path / "study" / "Ti-4"
    shutil.rmtree(run / "scores")
    shutil.rmtree(run / "checkpoints" / "2")
    assert [line.split()[1] for line in study(**settings)[1][:-1]] == [f"{run}/checkpoints/4"]
    shutil.rmtree(run / "checkpoints" / "4")
    assert study(**settings)[1][0].startswith("dit-train configs/scaling.py:Ti/4 ")


def test_scaling_ends_with_the_code_of_a_stopped_run(study):
    done, calls = study(MODELS="Ti/4 Ti/7", STOP="Ti-7")
    assert done.returncode == 42
    words = [line.split()[0] for line in calls]
    assert words == ["dit-train", "dit-evaluate", "dit-evaluate", "dit-train"]


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"MODELS": "Ti4"}, "MODELS must be models such as Ti/4, separated by spaces, got 'Ti4'"),
        ({"MODELS": "Ti/4,Ti/2"}, "MODELS must be models such as Ti/4, "),
        ({"DESIGN_MODEL": "Ti/0"}, "DESIGN_MODEL must be a model such as Ti/4, got 'Ti/0'"),
        (
            {"DESIGNS": "film"},
            "DESIGNS must be of in_context, cross_attention, adaln, adaln_zero, ",
        ),
        ({"STEPS": "0"}, "STEPS must be a whole number of at least 1, got '0'"),
        ({"EVERY": "3"}, "STEPS must be divisible by EVERY 3, got 4"),
        ({"WORKDIR": "gs://a/b"}, "WORKDIR must be on a local disk, got gs://a/b"),
    ],
)
def test_a_wrong_setting_of_scaling_is_one_line(study, tmp_path, settings, rule):
    done, calls = study(**settings)
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert done.stderr.startswith(f"scaling.sh: {rule}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_pixels_trains_and_scores_each_design_of_each_model_then_plots(start, tmp_path):
    settings = {"MODELS": "Ti/7 Pi/4", "DESIGNS": "jit_x0 plain_noise", "SAMPLES": "30"}
    done, calls = start("pixels.sh", "--config.seed=1", DATA=str(tmp_path), **settings)
    assert (done.returncode, done.stderr) == (0, "")
    plain = (
        "--config.model.norm=layer --config.model.mlp=gelu --config.model.position=sincos "
        "--config.model.qk_norm=false --config.model.bottleneck=0 "
        "--config.model.class_tokens=0 --config.model.class_tokens_from=0 "
    )
    expected, workdir = [], tmp_path / "study"
    for model, name in [("Ti/7", "Ti-7"), ("Pi/4", "Pi-4")]:
        for design, flags in [
            ("jit_x0", ""),
            ("plain_noise", f"{plain}--config.diffusion.prediction=noise "),
        ]:
            path = workdir / f"{name}-{design}"
            expected += [
                f"dit-train configs/pixels.py:{model} {path} --config.data.path={tmp_path} {flags}"
                "--config.run.total_steps=4 --config.run.checkpoint_every=2 --config.seed=1",
                f"dit-evaluate {path}/checkpoints/2 {path}/scores/2 --num_samples=30",
                f"dit-evaluate {path}/checkpoints/4 {path}/scores/4 --num_samples=30",
            ]
    assert calls == [*expected, f"dit-evaluate --study={workdir} --out={workdir}/plots"]


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"MODELS": "Ti7"}, "MODELS must be models such as Ti/4, separated by spaces, got 'Ti7'"),
        ({"DESIGNS": "jit"}, "DESIGNS must be of jit_x0, plain_x0, jit_noise, plain_noise, with "),
        ({"STEPS": "5"}, "STEPS must be divisible by EVERY 2, got 5"),
    ],
)
def test_a_wrong_setting_of_pixels_is_one_line(start, settings, rule):
    done, calls = start("pixels.sh", **settings)
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert done.stderr.startswith(f"pixels.sh: {rule}") and done.stderr.count("\n") == 1


COMMON = (
    "--config.train.learning_rate=1e-3 --config.train.decay_steps=0 --config.sampling.sampler=ddim "
    "--config.sampling.num_steps=50 --config.sampling.cfg_scale=1 "
    "--config.run.keep_checkpoints=1000 --config.run.total_steps=4 --config.run.checkpoint_every=2"
)


def trained(calls):
    """The names of the runs that were trained, in order."""
    return [line.split()[2].rpartition("/")[2] for line in calls if line.startswith("dit-train ")]


def test_objectives_trains_and_scores_each_with_each_seed_then_samples_two(compare, tmp_path):
    settings = {"OBJECTIVES": " v velocity", "SEEDS": "3 5", "SAMPLES": "30"}
    settings |= {"SAMPLERS": "ddim  heun ddim", "NUM_STEPS": "10 20"}
    done, calls = compare("--config.train.batch_size=8", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the table\nthe study took 0 min" in done.stdout
    flags = {
        "v": "--config.diffusion.prediction=v",
        "velocity": "--config.diffusion.process=linear",
    }
    workdir, expected = tmp_path / "study", []
    for seed in (3, 5):
        for name in ("v", "velocity"):
            path = workdir / f"{name}-{seed}"
            expected += [
                f"dit-train configs/digits.py:Ti/2 {path} {flags[name]} --config.seed={seed} "
                f"{COMMON} --config.train.batch_size=8",
                f"dit-evaluate {path}/checkpoints/2 {path}/scores/2 --num_samples=30",
                f"dit-evaluate {path}/checkpoints/4 {path}/scores/4 --num_samples=30",
            ]
    expected.append(f"dit-evaluate --study={workdir} --out={workdir}/plots")
    expected += [
        "dit-evaluate --sweep=sampler=ddim,heun --sweep=num_steps=10,20 --num_samples=30 "
        f"--out={workdir}/samplers/{name} {workdir}/{name}"
        for name in ("v-3", "velocity-3")
    ]
    assert calls == expected


def test_objectives_skips_what_is_done_and_resumes_what_is_not(compare, tmp_path):
    settings = {"OBJECTIVES": "noise velocity", "SEEDS": "0"}
    assert len(compare(**settings)[1]) == 2 * 3 + 1 + 2
    study = f"dit-evaluate --study={tmp_path}/study --out={tmp_path}/study/plots"
    assert compare(**settings)[1] == [study]
    done, calls = compare(STOP="v-0", **settings | {"OBJECTIVES": "noise v velocity"})
    assert done.returncode == 42 and trained(calls) == ["v-0"]
    shutil.rmtree(tmp_path / "study" / "samplers")
    calls = compare(**settings)[1]
    assert [line.split()[-1].rpartition("/")[2] for line in calls[1:]] == ["noise-0", "velocity-0"]


@pytest.mark.parametrize(
    "flags, changed, name, advice",
    [
        ([], {"SAMPLES": "8"}, "SAMPLES must be '9'", "study"),
        (["--config.train.batch_size=8"], {}, "FLAGS must be ''", "study"),
        ([], {"SAMPLERS": "ddim"}, "SAMPLERS must be 'ddim heun'", "study/samplers"),
        ([], {"STEPS": "8"}, "STEPS must be '4'", "study/samplers"),
    ],
)
def test_objectives_keeps_the_settings_of_its_results(
    compare, tmp_path, flags, changed, name, advice
):
    settings = {"OBJECTIVES": "noise", "SEEDS": "0", "SAMPLES": "9", "SAMPLERS": "ddim heun"}
    assert compare(**settings)[0].returncode == 0
    done, _ = compare(*flags, **settings | changed)
    rule = f"objectives.sh: {name} as before, unless you delete {tmp_path}/{advice}, got "
    assert done.returncode == 2 and done.stderr.startswith(rule)
    assert compare(**settings)[0].returncode == 0


def test_objectives_takes_all_but_muon_and_three_seeds_by_default(compare):
    names = ["noise", "v", "x0_min_snr", "velocity", "velocity_logit_normal"]
    calls = compare(SAMPLERS="")[1]
    assert trained(calls) == [f"{name}-{seed}" for seed in range(3) for name in names]
    assert not any("--sweep" in line for line in calls)


def test_optimizers_are_compared_with_the_same_runs(compare):
    compare(OBJECTIVES="noise", SEEDS="0", SAMPLERS="")
    calls = compare(OBJECTIVES="adamw muon noise", SEEDS="0 1", SAMPLERS=" ")[1]
    assert trained(calls) == ["muon-0", "noise-1", "muon-1"]
    assert " --config.train.optimizer=muon --config.seed=0 " in calls[0]


def test_objectives_on_fashion_downloads_nothing_that_is_there(compare, tmp_path):
    settings = {"DATA_SET": "fashion", "DATA": str(tmp_path), "SEEDS": "0", "OBJECTIVES": "noise"}
    done, calls = compare(SAMPLERS="", **settings)
    assert (done.returncode, done.stderr) == (0, "") and "downloading" not in done.stdout
    train = f"dit-train configs/fashion.py:Ti/7 {tmp_path}/study/noise-0 --config.seed=0 {COMMON}"
    assert calls[0] == f"{train} --config.data.path={tmp_path}"


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"DATA_SET": "cifar"}, "DATA_SET must be digits or fashion, got 'cifar'"),
        ({"OBJECTIVES": "eps"}, "OBJECTIVES must be of noise, adamw, v, x0_min_snr, velocity, "),
        ({"OBJECTIVES": "v,noise"}, "OBJECTIVES must be of noise, "),
        ({"SEEDS": "-1"}, "SEEDS must be whole numbers, separated by spaces, got '-1'"),
        ({"SAMPLERS": "plms"}, "SAMPLERS must be of ddpm, ddim, euler, heun, sde, dpm2m, unipc, "),
        (
            {"NUM_STEPS": "5 1"},
            "NUM_STEPS must be whole numbers in 2 .. 1000, separated by spaces, ",
        ),
        ({"NUM_STEPS": "1001"}, "NUM_STEPS must be whole numbers in 2 .. 1000, "),
        ({"OBJECTIVES": ""}, "OBJECTIVES must be of noise, "),
        ({"SAMPLES": "5"}, "SAMPLES must be a whole number of at least 6, got '5'"),
        ({"STEPS": "5"}, "STEPS must be divisible by EVERY 2, got 5"),
        ({"SAMPLES": "many"}, "SAMPLES must be a whole number of at least 6, got 'many'"),
        ({"DATA": "x"}, "DATA must be set with DATA_SET=fashion only, got 'x'"),
        ({"WORKDIR": "gs://a/b"}, "WORKDIR must be on a local disk, got gs://a/b"),
    ],
)
def test_a_wrong_setting_of_objectives_is_one_line(compare, tmp_path, settings, rule):
    done, calls = compare(**settings)
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert done.stderr.startswith(f"objectives.sh: {rule}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()
