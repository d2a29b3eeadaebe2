"""launch/slurm/train.sh as Slurm runs it. Fakes of srun and scontrol log their arguments."""

import re
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sh"


@pytest.fixture
def job(put, run, tmp_path):
    """job(code, *flags): runs the script in a job in which srun exits with the code."""
    clone = tmp_path / "clone"
    (clone / "launch").mkdir(parents=True)
    (clone / "launch" / "environment.sh").write_text('echo "$EXTRAS" > "$FAKE/extras"\n')
    shutil.copy(SCRIPT.parents[1] / "common.sh", clone / "launch")
    spool = shutil.copy(SCRIPT, tmp_path / "slurm_script")
    put("scontrol", 'echo "$*" > "$FAKE/scontrol"; [ ! -e "$FAKE/refused" ]\n')

    def call(code, *flags, **more):
        put("srun", f'printf "%s\\n" "$@" > "$FAKE/srun"; exit {code}\n')
        settings = {
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(clone),
        }
        return run(spool, *flags, **settings, **more)

    return call


def test_srun_starts_dit_train_with_the_flags(job, tmp_path):
    done = job(0, "configs/imagenet256.py:XL/2", "/shared/xl2", "--config.name='a b'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--cpus-per-task=8",
        "--kill-on-bad-exit=0",
        "dit-train",
        "configs/imagenet256.py:XL/2",
        "/shared/xl2",
        "--config.name='a b'",
    ]
    assert (tmp_path / "extras").read_text() == "cuda\n"
    assert not (tmp_path / "scontrol").exists()


def test_extras_can_be_overridden_for_a_bucket(job, tmp_path):
    assert job(0, "--workdir=gs://my-bucket/xl2", EXTRAS="cuda,gcs").returncode == 0
    assert (tmp_path / "extras").read_text() == "cuda,gcs\n"
    assert "--workdir=gs://my-bucket/xl2" in (tmp_path / "srun").read_text().splitlines()


def test_exit_code_42_requeues_the_job(job, tmp_path):
    done = job(42, "/shared/xl2")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "dit-train was preempted: the job is requeued\n",
        "",
    )
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    (tmp_path / "refused").touch()
    done = job(42, "/shared/xl2")
    assert (done.returncode, done.stdout) == (42, "")
    assert done.stderr == (
        "launch/slurm/train.sh: dit-train was preempted and scontrol could not requeue the job: "
        "submit it again\n"
    )


@pytest.mark.parametrize("code", [1, 2, 3, 137])
def test_other_exit_codes_end_the_job(job, tmp_path, code):
    assert job(code, "/shared/xl2").returncode == code
    assert not (tmp_path / "scontrol").exists()


def test_sbatch_options_precede_the_first_command():
    """sbatch stops reading options at the first command."""
    text = SCRIPT.read_text()
    head = text[: re.search("^set ", text, re.M).start()]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, re.M))
    assert text.count("\n#SBATCH ") == len(options)
    assert options["signal"] == "TERM@300"  # to the step, not to the script
    assert options["gpus-per-node"] == options["ntasks-per-node"]  # one process per GPU
    assert options.keys() >= {"requeue", "time", "nodes", "output"}
    assert options["open-mode"] == "append"


def test_dry_run_prints_the_commands_without_running_them(run, check_golden):
    flags = ["--config=configs/imagenet256.py:XL/2", "--workdir=/shared/xl2"]
    done = run("slurm/train.sh", *flags, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    check_golden("slurm.txt", done.stdout)


def test_help_shows_the_sbatch_command(run):
    done = run("slurm/train.sh", "--help")
    assert done.returncode == 0
    assert "sbatch --nodes=2 launch/slurm/train.sh" in done.stdout


def test_wrong_use_is_reported_in_one_line(run, tmp_path):
    done = run("slurm/train.sh", "configs/digits.py", "/shared/x")
    assert done.returncode == 2
    assert done.stderr == (
        "launch/slurm/train.sh: must be started by sbatch: sbatch launch/slurm/train.sh FLAGS\n"
    )
    done = run("slurm/train.sh", "/shared/x", SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.stderr == (
        f"launch/slurm/train.sh: the job must be submitted from the clone, got {tmp_path}\n"
    )


@pytest.mark.parametrize("word, rest", [("runs", " too"), ("--step=3", "")])
def test_an_unknown_argument_is_refused(run, job, word, rest):
    words = ["configs/digits.py", "/shared/x", "--config.data.flip", "--config.seed", "3", word]
    line = f"takes CONFIG WORKDIR and flags of dit-train, got '{word}'{rest}\n"
    for done in (job(0, *words), run("slurm/train.sh", *words, "--dry-run")):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"launch/slurm/train.sh: {line}"


def test_a_wrong_config_or_field_is_told_by_the_dry_run(put, run):
    put("python3", f'exec {sys.executable} "$@"\n')
    for words, line in (
        (["configs/digit.py"], "config must be a Python file that exists, got configs/digit.py"),
        (["--config=no.py:S/2"], "config must be a Python file that exists, got no.py"),
        (
            ["configs/digits.py", "--config.run.totl=3"],
            "config has no field run.totl; did you mean run.total_steps?",
        ),
    ):
        done = run("slurm/train.sh", "--dry-run", *words, "--workdir=/tmp/x")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"launch/slurm/train.sh: {line}\n"
    for words in (["xl/2"], ["DiT-XL/2"], ["configs/digits.py:S/2"]):
        assert run("slurm/train.sh", "--dry-run", "/tmp/x", f"--config={words[0]}").returncode == 0


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("config", ["configs/digits.py:S/2", "--config=configs/digits.py"])
def test_a_missing_workdir_is_one_line(run, flags, config):
    done = run("slurm/train.sh", config, *flags, SLURM_JOB_ID="17")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "launch/slurm/train.sh: WORKDIR must be given, as CONFIG WORKDIR or as --workdir=WORKDIR\n"
    )
