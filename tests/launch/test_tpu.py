"""launch/tpu.sh with a fake gcloud: a pod of two workers, whose home directories are local.

The commands that the script sends to the workers really run. uv and dit-train are fakes too.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SETTINGS = {
    "NAME": "dit",
    "ZONE": "europe-west4-a",
    "PROJECT": "my-project",
    "TYPE": "v3-32",
    "WORKDIR": "gs://my-bucket/xl2",
    "COMMIT": "HEAD",
    "POLL": "0",
}
FLAG = "--config=configs/imagenet256.py:XL/2"
# Files in $FAKE: coming, the states of a new request, one per describe; states, the remaining ones;
# vm, the states of the VM; refusal, why create fails.
GCLOUD = r"""
echo "$*" >> "$FAKE/calls"
refuse() { echo "ERROR: (gcloud.compute.tpus.$1) $2" >&2; exit 1; }
there() { [ -e "$FAKE/states" ] || refuse "$1" "NOT_FOUND: Resource 'dit' was not found"; }
case "$3 $4" in
  'queued-resources create')
    [ ! -e "$FAKE/refusal" ] || refuse create "$(cat "$FAKE/refusal")"
    [ ! -e "$FAKE/states" ] || refuse create "ALREADY_EXISTS: Resource 'dit' already exists"
    mkdir -p "$FAKE/workers/0" "$FAKE/workers/1"
    cp "$FAKE/coming" "$FAKE/states"
    echo READY > "$FAKE/vm"
    ;;
  'queued-resources describe')
    there describe
    head -n 1 "$FAKE/states"
    [ "$(wc -l < "$FAKE/states")" = 1 ] || sed -i 1d "$FAKE/states"
    ;;
  'queued-resources delete')
    there delete
    rm -rf "$FAKE/states" "$FAKE/workers" "$FAKE/unreachable"
    ;;
  'tpu-vm describe')
    head -n 1 "$FAKE/vm"
    [ "$(wc -l < "$FAKE/vm")" = 1 ] || sed -i 1d "$FAKE/vm"
    ;;
  'tpu-vm scp')
    for home in "$FAKE"/workers/*; do cp "$5" "$home/${6#dit:}"; done
    ;;
  'tpu-vm ssh')
    [ "$(cat "$FAKE/states")" = ACTIVE ] && [ ! -e "$FAKE/unreachable" ] || refuse ssh "[255]"
    code=0
    for worker in 0 1; do
      [[ $6 =~ =(all|$worker)$ ]] || continue
      (cd "$FAKE/workers/$worker" && HOME=$PWD bash -c "${7#--command=}") || code=$?
      [ "$code" = 0 ] || echo "##### Command execution on worker $worker failed" >&2
    done
    exit "$code"
    ;;
esac
"""
UV = r"""
[ "$1" != venv ] || { mkdir -p .venv/bin && cp "$FAKE/bin/dit-train" .venv/bin; }
[ ! -e "$FAKE/no-registry" ] || { echo "error: no registry" >&2; exit 1; }
"""
# Line n of $FAKE/endings is how the nth training of a worker ends.
DIT_TRAIN = r"""
echo "dit-train $*"
count="$FAKE/trainings-$(basename "$HOME")"
echo "$*" >> "$count"
ending=$(sed -n "$(wc -l < "$count")p" "$FAKE/endings")
[[ $ending =~ ^(un|pre) && $HOME = */1 ]] && exit 1  # only worker 0 changes the pod's state
case $ending in
  preempted) echo SUSPENDED > "$FAKE/states" && exit 1 ;;
  preempted-vm) echo PREEMPTED > "$FAKE/vm" && exit 134 ;;
  unhealthy) printf 'REPAIRING\nREADY\n' > "$FAKE/vm" && exit 134 ;;
  unreachable) touch "$FAKE/unreachable" ;;
  rebooted) kill -9 $PPID ;;
  waits) trap 'exit 42' TERM; touch "$HOME/waits"; for _ in {1..600}; do sleep 0.05; done ;;
  *) exit "$ending" ;;
esac
"""


@pytest.fixture
def pod(put, run, tmp_path):
    """pod(command, ...): runs tpu.sh. `play` sets the states of the pod and the exit codes."""
    put("gcloud", GCLOUD)
    put("uv", UV)
    put("dit-train", DIT_TRAIN)
    play(tmp_path)
    stash = ["git", "stash", "create"]  # a commit of the working tree, if it has changes
    commit = subprocess.run(stash, cwd=LAUNCH, capture_output=True, text=True).stdout.strip()

    def call(command, *flags):
        if command in ("run", "babysit"):
            flags = flags or [FLAG]
        return run("tpu.sh", command, *flags, **{**SETTINGS, "COMMIT": commit or "HEAD"})

    return call


def play(tmp_path, states="ACTIVE", endings="0"):
    """Sets the states of a request, one per describe (the last one stays), and the endings."""
    (tmp_path / "coming").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "endings").write_text(endings.replace(" ", "\n") + "\n")


def count(tmp_path, call):
    """Number of gcloud calls that start with these words."""
    return (tmp_path / "calls").read_text().count(f"compute tpus {call}")


def wait_until_trapped(tmp_path):
    """Waits until a fake dit-train on each worker would answer a signal."""
    for _ in range(200):
        if len(list(tmp_path.glob("workers/*/waits"))) == 2:
            return
        time.sleep(0.05)
    raise AssertionError("dit-train did not start")


def wait_for(pod, word):
    for _ in range(100):
        if word in pod("status").stdout:
            return
        time.sleep(0.05)
    raise AssertionError(pod("status").stdout)


@pytest.mark.parametrize(
    "command",
    ["create", "setup", "run", "status", "logs", "attach", "stop", "delete", "babysit"],
)
def test_dry_run_prints_the_commands_without_running_them(run, check_golden, command):
    flags = [FLAG] if command in ("run", "babysit") else []
    done = run("tpu.sh", command, *flags, "--dry-run", **SETTINGS)
    assert (done.returncode, done.stderr) == (0, "")
    check_golden(f"tpu_{command}.txt", done.stdout)


@pytest.mark.parametrize(
    "kind, capacity, runtime",
    [
        ("v5litepod-16", "reserved", "--runtime-version=v2-alpha-tpuv5-lite --reserved --zone"),
        ("v6e-8", "on-demand", "--runtime-version=v2-alpha-tpuv6e --zone"),
        ("v5p-8", "spot", "--runtime-version=v2-alpha-tpuv5 --spot --zone"),
    ],
)
def test_type_and_capacity_choose_the_image_and_the_price(run, kind, capacity, runtime):
    settings = {**SETTINGS, "TYPE": kind, "CAPACITY": capacity}
    assert runtime in run("tpu.sh", "create", "--dry-run", **settings).stdout
    chosen = run("tpu.sh", "create", "--dry-run", RUNTIME="mine", **settings).stdout
    assert "--runtime-version=mine" in chosen


@pytest.mark.parametrize(
    "words, settings, message",
    [
        (["create"], {"TYPE": ""}, "TYPE must be set: see --help"),
        (["run"], {"WORKDIR": ""}, "WORKDIR must be set: see --help"),
        (["status"], {"ZONE": ""}, "ZONE must be set: see --help"),
        (
            ["run"],
            {"WORKDIR": "runs/a"},
            "WORKDIR must be an absolute path or start with gs://BUCKET, got 'runs/a'",
        ),
        (["run"], {"WORKDIR": "gs:///a"}, "digits, -, _ and ., got 'gs:///a'"),
        (
            ["run"],
            {"WORKDIR": "gs://My_Bucket/a"},
            "WORKDIR must be in a bucket whose name has 3 or more lower-case letters, digits, -, _ "
            "and ., got 'gs://My_Bucket/a'",
        ),
        (
            ["status"],
            {"ZONE": "europe-west4"},
            "ZONE must be a zone, such as europe-west4-a, not a region, got 'europe-west4'",
        ),
        (
            ["create"],
            {"NAME": "My pod"},
            "NAME must be lower-case letters, digits and -, starting with a letter and not ending "
            "with -, got 'My pod'",
        ),
        (["create"], {"POLL": "1m"}, "POLL must be a number of seconds, got '1m'"),
        (["logs"], {"TAIL": "x"}, "TAIL must be a number of lines, got 'x'"),
        (
            ["create"],
            {"CAPACITY": "free"},
            "CAPACITY must be spot, reserved or on-demand, got free",
        ),
        (
            ["run", "--dry-run"],
            {},
            "--config must be given, as --config=configs/imagenet256.py:XL/2",
        ),
        (["babysit", "--config", "configs/none.py"], {}, ", got configs/none.py"),
        (["babysit", "--config=configs:XL/2"], {}, ", got configs"),
        (["run", FLAG, "--workdir=/a"], {}, "WORKDIR, got a flag"),
        (
            ["create"],
            {"TYPE": "v9-8"},
            "as v3-32, or RUNTIME be set, got v9-8",
        ),
        (["setup"], {"COMMIT": "no-such"}, "got no-such"),
        (["run", FLAG, "runs"], {}, "takes CONFIG and flags of dit-train, got 'runs' too"),
        (["babysit", FLAG, "--steps=3"], {}, "CONFIG and flags of dit-train, got '--steps=3'"),
        (["babysit", FLAG, "--config.seed", "3", "4"], {}, "flags of dit-train, got '4' too"),
        (["status", "now"], {}, "status takes no flags, got 'now'"),
        (["start"], {}, "logs, attach, stop, delete, babysit, got 'start'"),
        ([], {}, "logs, attach, stop, delete, babysit, got ''"),
    ],
)
def test_wrong_use_is_reported_before_a_missing_gcloud(run, words, settings, message):
    done = run("tpu.sh", *words, **{**SETTINGS, **settings})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tpu.sh: ") and done.stderr.endswith(message + "\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("command", ["run", "babysit"])
def test_a_field_that_no_config_has_is_told_before_a_pod_costs_money(put, run, command, flags):
    put("python3", f'exec {sys.executable} "$@"\n')
    done = run("tpu.sh", command, FLAG, "--config.run.totl=3", *flags, **SETTINGS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tpu.sh: config has no field run.totl; did you mean run.total_steps?\n"


def test_missing_gcloud_is_reported(run):
    done = run("tpu.sh", "status", **SETTINGS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "tpu.sh: gcloud must be on the PATH: https://cloud.google.com/sdk/docs/install\n"
    )


def test_help_lists_the_commands_and_the_exit_codes(run):
    done = run("tpu.sh", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("babysit", "--dry-run", "Exit codes"))


def test_create_setup_and_run_train_on_all_workers(pod, tmp_path):
    play(tmp_path, states="PROVISIONING ACTIVE", endings="3")
    assert "pod: PROVISIONING" in pod("create").stdout
    assert pod("status").stdout == "pod: ACTIVE, READY, training: none\n"
    assert pod("setup").returncode == 0
    assert pod("run", "--config=configs/digits.py", "--config.name='a b'").stderr == ""
    wait_for(pod, "training: 3")
    for worker in "01":
        flags = (tmp_path / f"trainings-{worker}").read_text()
        assert (
            flags == "--workdir=gs://my-bucket/xl2 --config=configs/digits.py --config.name='a b'\n"
        )
        assert (tmp_path / "workers" / worker / "dit_jax" / "dit_jax" / "__init__.py").exists()
    assert pod("logs").stdout.startswith("dit-train --workdir=gs://my-bucket/xl2")
    assert pod("delete").returncode == 0
    assert pod("status").stdout == "pod: not found\n"


def test_workdir_may_be_a_path(run):
    settings = {**SETTINGS, "WORKDIR": "/mnt/share/xl2"}
    assert "--workdir=/mnt/share/xl2" in run("tpu.sh", "run", FLAG, "--dry-run", **settings).stdout


def test_stop_ends_the_training_once(pod, tmp_path):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    wait_for(pod, "training: running")
    again = pod("run")
    assert again.returncode == 2 and "dit-train is already running" in again.stderr
    assert "stop it first" in pod("setup").stderr
    wait_until_trapped(tmp_path)
    assert pod("stop").returncode == 0
    wait_for(pod, "training: stopped")
    assert "dit-train is not running here" in pod("stop").stderr


def test_run_refuses_a_commit_that_is_not_installed(pod, tmp_path):
    pod("create"), pod("setup")
    (tmp_path / "workers" / "1" / "dit_jax" / "COMMIT").write_text("another\n")
    done = pod("run")
    assert done.returncode == 2
    assert done.stderr.startswith("tpu.sh: run: tpu_worker.sh: commit ")
    assert "is not installed here" in done.stderr


def test_babysit_trains_on_a_healthy_pod(pod, tmp_path):
    done = pod("babysit", "--config=configs/digits.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dit-train exited with 0" in done.stdout
    assert count(tmp_path, "queued-resources create") == 1
    assert count(tmp_path, "queued-resources delete") == 0


def test_babysit_waits_for_a_slow_pod(pod, tmp_path):
    play(tmp_path, "CREATING WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = pod("babysit")
    assert done.returncode == 0
    assert done.stdout.count("pod: WAITING_FOR_RESOURCES") == 1  # printed once


@pytest.mark.parametrize("end", ["preempted", "preempted-vm", "unreachable"])
def test_babysit_replaces_a_lost_pod(pod, tmp_path, end):
    play(tmp_path, endings=f"{end} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (0, "")
    assert count(tmp_path, "queued-resources delete") == 1
    assert count(tmp_path, "queued-resources create") == 2
    assert count(tmp_path, "tpu-vm scp") == 2
    assert len((tmp_path / "trainings-0").read_text().splitlines()) == 2


@pytest.mark.parametrize("end, setups", [("42", 1), ("rebooted", 2), ("unhealthy", 2)])
def test_babysit_restarts_the_training_on_the_same_pod(pod, tmp_path, end, setups):
    play(tmp_path, endings=f"{end} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (0, "")
    assert count(tmp_path, "tpu-vm scp") == setups
    assert count(tmp_path, "queued-resources delete") == 0
    assert len((tmp_path / "trainings-1").read_text().splitlines()) == 2


@pytest.mark.parametrize("code", [1, 2, 3, 137])
def test_babysit_exits_with_the_code_of_a_final_failure(pod, tmp_path, code):
    play(tmp_path, endings=f"{code} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (code, "")
    assert len((tmp_path / "trainings-0").read_text().splitlines()) == 1


def test_babysit_ignores_the_exit_code_of_an_earlier_training(pod, tmp_path):
    play(tmp_path, endings="3 0")
    assert pod("babysit").returncode == 3
    assert pod("babysit").returncode == 0
    assert count(tmp_path, "queued-resources delete") == 0


def test_stop_ends_babysit_with_42(pod, environment, tmp_path):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    settings = {**environment, **SETTINGS, "TMPDIR": str(tmp_path), "POLL": "0.1"}
    script = ["bash", "launch/tpu.sh", "babysit", FLAG]
    with subprocess.Popen(script, env=settings, stdout=subprocess.PIPE, text=True) as babysit:
        assert "training: running" in babysit.stdout.readline()
        wait_until_trapped(tmp_path)
        assert pod("stop").returncode == 0
        assert babysit.wait(timeout=30) == 42


@pytest.mark.parametrize("command", ["create", "babysit"])
def test_refused_request_is_reported_in_one_line_with_the_reason(pod, tmp_path, command):
    (tmp_path / "refusal").write_text("RESOURCE_EXHAUSTED: Quota 'TPUV3' exhausted. Limit 0")
    done = pod(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "tpu.sh: create: ERROR: (gcloud.compute.tpus.create) RESOURCE_EXHAUSTED: Quota 'TPUV3'"
    )
    assert done.stderr.count("\n") == 1


def test_failed_request_ends_babysit(pod, tmp_path):
    play(tmp_path, "PROVISIONING FAILED")
    done = pod("babysit")
    assert done.returncode == 2
    assert done.stderr == "tpu.sh: Google could not provide the pod: the request FAILED\n"


def test_babysit_gives_up_after_three_failed_setups(pod, tmp_path):
    (tmp_path / "no-registry").touch()
    done = pod("babysit")
    assert done.returncode == 2
    assert done.stdout.count("error: no registry") == 3
    assert done.stderr == "tpu.sh: gave up after 3 failures; the pod still exists and costs money\n"


def test_failed_git_archive_is_reported_and_nothing_is_sent(pod, put, tmp_path):
    pod("create")
    put(
        "git",
        '[ "$3" != archive ] || { echo "fatal: no space left" >&2; exit 1; }\n'
        f'{shutil.which("git")} "$@"\n',
    )
    done = pod("setup")
    assert done.returncode == 2
    assert done.stderr.startswith("tpu.sh: setup: fatal: no space left")
    assert count(tmp_path, "tpu-vm scp") == 0


@pytest.mark.parametrize("changed", ["boot", "pid"])
def test_training_is_lost_after_a_restart_of_the_machine(pod, tmp_path, changed):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    wait_for(pod, "training: running")
    for worker in "01":
        (tmp_path / "workers" / worker / "dit_run" / changed).write_text("999999999\n")
    assert "training: lost" in pod("status").stdout


def test_stop_does_not_signal_a_reused_pid(pod, tmp_path):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    wait_until_trapped(tmp_path)
    files = [tmp_path / "workers" / worker / "dit_run" / "dit_train_pid" for worker in "01"]
    pids = [path.read_text() for path in files]
    with subprocess.Popen(["sleep", "60"]) as other:
        for path in files:
            path.write_text(f"{other.pid}\n")
        assert "dit-train is just starting or ending: try again" in pod("stop").stderr
        assert other.poll() is None
        other.kill()
    for path, pid in zip(files, pids, strict=True):
        path.write_text(pid)
    assert pod("stop").returncode == 0
    wait_for(pod, "training: stopped")


def test_error_of_gcloud_is_quoted(put, run):
    put("gcloud", "echo 'ERROR: (gcloud) You do not have permission' >&2\nexit 1\n")
    for words in (["status"], ["logs"], ["stop"], ["delete"], ["babysit", FLAG]):
        done = run("tpu.sh", *words, **SETTINGS)
        assert done.returncode == 2
        assert "ERROR: (gcloud) You do not have permission" in done.stderr


def test_setup_installs_a_missing_uv(pod, put, tmp_path):
    shutil.move(tmp_path / "bin" / "uv", tmp_path / "uv")
    install = 'mkdir -p "$HOME/.local/bin" && cp "$FAKE/uv" "$HOME/.local/bin"'
    put("curl", f"echo '{install}'\n")
    assert pod("babysit").returncode == 0
