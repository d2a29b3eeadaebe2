"""launch/tpu.sh against a gcloud that plays a pod of two workers, whose homes are folders here.

What the scripts send to the workers is really run there; only uv and dit-train are played too.
"""

import shutil
import subprocess
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
# In $FAKE: coming, the states that a new request goes through, one a look; states, those that are
# left; vm, those of the VM; refusal, why create fails.
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
# The nth training of a worker ends as line n of $FAKE/endings says.
DIT_TRAIN = r"""
echo "dit-train $*"
count="$FAKE/trainings-$(basename "$HOME")"
echo "$*" >> "$count"
ending=$(sed -n "$(wc -l < "$count")p" "$FAKE/endings")
[[ $ending =~ ^(un|pre) && $HOME = */1 ]] && exit 1  # what befalls a pod is told by one worker
case $ending in
  preempted) echo SUSPENDED > "$FAKE/states" && exit 1 ;;
  preempted-vm) echo PREEMPTED > "$FAKE/vm" && exit 134 ;;
  unhealthy) printf 'REPAIRING\nREADY\n' > "$FAKE/vm" && exit 134 ;;
  unreachable) touch "$FAKE/unreachable" ;;
  rebooted) kill -9 $PPID ;;
  waits) trap 'exit 42' TERM; for _ in {1..200}; do sleep 0.05; done ;;
  *) exit "$ending" ;;
esac
"""


@pytest.fixture
def pod(put, run, tmp_path):
    """pod(command, ...): the finished process. play(states=, endings=) sets what will happen."""
    put("gcloud", GCLOUD)
    put("uv", UV)
    put("dit-train", DIT_TRAIN)
    play(tmp_path)
    stash = ["git", "stash", "create"]  # a commit of the files as they are now, if they differ
    made = subprocess.run(stash, cwd=LAUNCH, capture_output=True, text=True).stdout.strip()

    def call(command, *flags):
        if command in ("run", "babysit"):
            flags = flags or [FLAG]
        return run("tpu.sh", command, *flags, **{**SETTINGS, "COMMIT": made or "HEAD"})

    return call


def play(tmp_path, states="ACTIVE", endings="0"):
    """The states of a request, one a look, and how the trainings end; the last state stays."""
    (tmp_path / "coming").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "endings").write_text(endings.replace(" ", "\n") + "\n")


def count(tmp_path, call):
    """How often gcloud was called so."""
    return (tmp_path / "calls").read_text().count(f"compute tpus {call}")


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
def test_a_dry_run_prints_the_lines_and_runs_nothing(run, check_golden, command):
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
def test_every_machine_has_its_image_and_price(run, kind, capacity, runtime):
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
        (["run"], {"WORKDIR": "gs:///a"}, "or start with gs://BUCKET, got 'gs:///a'"),
        (["run"], {"WORKDIR": "gs://my bucket/a"}, "gs://BUCKET, got 'gs://my bucket/a'"),
        (
            ["create"],
            {"NAME": "My pod"},
            "NAME must be of small letters, digits and -, got 'My pod'",
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
        (["run", FLAG, "--workdir=/a"], {}, "--workdir must be given as WORKDIR, got the flag"),
        (["create"], {"TYPE": "v9-8"}, "RUNTIME must be set for TYPE v9-8"),
        (["setup"], {"COMMIT": "no-such"}, "got no-such"),
        (["status", "now"], {}, "status takes nothing more, got 'now'"),
        (["start"], {}, "logs, attach, stop, delete, babysit, got 'start'"),
        ([], {}, "logs, attach, stop, delete, babysit, got ''"),
    ],
)
def test_wrong_use_is_one_line(run, words, settings, message):
    done = run("tpu.sh", *words, **{**SETTINGS, **settings})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tpu.sh: ") and done.stderr.endswith(message + "\n")
    assert done.stderr.count("\n") == 1


def test_gcloud_has_to_be_there(run, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = run("tpu.sh", "status", **SETTINGS, PATH=str(tmp_path / "bin"))
    assert done.returncode == 2
    assert done.stderr == (
        "tpu.sh: gcloud must be on the PATH: https://cloud.google.com/sdk/docs/install\n"
    )


def test_help_lists_the_commands_and_the_settings(run):
    done = run("tpu.sh", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("babysit", "WORKDIR", "--dry-run", "Exit codes"))
    assert "set -euo" not in done.stdout


def test_a_pod_is_made_set_up_and_trained_on(pod, tmp_path):
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
    assert pod("status").stdout == "pod: not there\n"


def test_the_workdir_may_be_a_path(run):
    settings = {**SETTINGS, "WORKDIR": "/mnt/share/xl2"}
    assert "--workdir=/mnt/share/xl2" in run("tpu.sh", "run", FLAG, "--dry-run", **settings).stdout


def test_a_training_is_stopped(pod, tmp_path):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    wait_for(pod, "training: running")
    again = pod("run")
    assert again.returncode == 2 and "dit-train runs already" in again.stderr
    assert "stop it first" in pod("setup").stderr
    assert pod("stop").returncode == 0
    wait_for(pod, "training: stopped")
    assert "no dit-train runs here" in pod("stop").stderr


def test_only_the_commit_that_was_set_up_is_trained(pod, tmp_path):
    pod("create"), pod("setup")
    (tmp_path / "workers" / "1" / "dit_jax" / "COMMIT").write_text("another\n")
    done = pod("run")
    assert done.returncode == 2
    assert done.stderr.startswith("tpu.sh: run: tpu_worker.sh: commit ")
    assert "is not set up here" in done.stderr


def test_babysit_trains_on_a_healthy_pod(pod, tmp_path):
    done = pod("babysit", "--config=configs/digits.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dit-train ended with 0" in done.stdout
    assert count(tmp_path, "queued-resources create") == 1
    assert count(tmp_path, "queued-resources delete") == 0


def test_babysit_waits_for_a_slow_pod(pod, tmp_path):
    play(tmp_path, "CREATING WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = pod("babysit")
    assert done.returncode == 0
    assert done.stdout.count("pod: WAITING_FOR_RESOURCES") == 1  # said once


@pytest.mark.parametrize("end", ["preempted", "preempted-vm", "unreachable"])
def test_babysit_replaces_a_pod_that_vanished(pod, tmp_path, end):
    play(tmp_path, endings=f"{end} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (0, "")
    assert count(tmp_path, "queued-resources delete") == 1
    assert count(tmp_path, "queued-resources create") == 2
    assert count(tmp_path, "tpu-vm scp") == 2
    assert len((tmp_path / "trainings-0").read_text().splitlines()) == 2


@pytest.mark.parametrize("end, setups", [("42", 1), ("rebooted", 2), ("unhealthy", 2)])
def test_babysit_trains_again_on_a_pod_that_is_still_there(pod, tmp_path, end, setups):
    play(tmp_path, endings=f"{end} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (0, "")
    assert count(tmp_path, "tpu-vm scp") == setups
    assert count(tmp_path, "queued-resources delete") == 0
    assert len((tmp_path / "trainings-1").read_text().splitlines()) == 2


@pytest.mark.parametrize("code", [1, 2, 3, 137])
def test_babysit_ends_where_another_start_mends_nothing(pod, tmp_path, code):
    play(tmp_path, endings=f"{code} 0")
    done = pod("babysit")
    assert (done.returncode, done.stderr) == (code, "")
    assert len((tmp_path / "trainings-0").read_text().splitlines()) == 1


def test_babysit_forgets_how_an_earlier_training_ended(pod, tmp_path):
    play(tmp_path, endings="3 0")
    assert pod("babysit").returncode == 3
    assert pod("babysit").returncode == 0
    assert count(tmp_path, "queued-resources delete") == 0


def test_a_stop_ends_babysit(pod, environment, tmp_path):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    settings = {**environment, **SETTINGS, "TMPDIR": str(tmp_path), "POLL": "0.1"}
    script = ["bash", "launch/tpu.sh", "babysit", FLAG]
    with subprocess.Popen(script, env=settings, stdout=subprocess.PIPE, text=True) as babysit:
        assert "training: running" in babysit.stdout.readline()
        assert pod("stop").returncode == 0
        assert babysit.wait(timeout=30) == 42


@pytest.mark.parametrize("command", ["create", "babysit"])
def test_a_refused_pod_is_one_line_with_the_reason(pod, tmp_path, command):
    (tmp_path / "refusal").write_text("RESOURCE_EXHAUSTED: Quota 'TPUV3' exhausted. Limit 0")
    done = pod(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "tpu.sh: create: ERROR: (gcloud.compute.tpus.create) RESOURCE_EXHAUSTED: Quota 'TPUV3'"
    )
    assert done.stderr.count("\n") == 1


def test_a_request_that_failed_ends_babysit(pod, tmp_path):
    play(tmp_path, "PROVISIONING FAILED")
    done = pod("babysit")
    assert done.returncode == 2
    assert done.stderr == "tpu.sh: Google cannot meet the request, it FAILED\n"


def test_a_pod_that_cannot_be_set_up_is_given_up(pod, tmp_path):
    (tmp_path / "no-registry").touch()
    done = pod("babysit")
    assert done.returncode == 2
    assert done.stdout.count("error: no registry") == 3
    assert done.stderr == "tpu.sh: gave up on the pod, which is still there and costs money\n"


def test_a_commit_that_cannot_be_packed_is_one_line_and_not_sent(pod, put, tmp_path):
    pod("create")
    put(
        "git",
        '[ "$3" != archive ] || { echo "fatal: no space left" >&2; exit 1; }\n/usr/bin/git "$@"\n',
    )
    done = pod("setup")
    assert done.returncode == 2
    assert done.stderr.startswith("tpu.sh: setup: fatal: no space left")
    assert count(tmp_path, "tpu-vm scp") == 0


@pytest.mark.parametrize("after", ["boot", "pid"])
def test_a_pid_of_before_the_machine_was_started_anew_is_lost(pod, tmp_path, after):
    play(tmp_path, endings="waits")
    pod("create"), pod("setup"), pod("run")
    wait_for(pod, "training: running")
    for worker in "01":
        (tmp_path / "workers" / worker / "dit_run" / after).write_text("999999999\n")
    assert "training: lost" in pod("status").stdout


def test_a_gcloud_that_knows_no_project_is_quoted(put, run):
    put("gcloud", "echo 'ERROR: (gcloud) You do not have permission' >&2\nexit 1\n")
    for words in (["status"], ["logs"], ["stop"], ["delete"], ["babysit", FLAG]):
        done = run("tpu.sh", *words, **SETTINGS)
        assert done.returncode == 2
        assert "ERROR: (gcloud) You do not have permission" in done.stderr


def test_the_image_without_uv_gets_it(pod, put, tmp_path):
    shutil.move(tmp_path / "bin" / "uv", tmp_path / "uv")
    install = 'mkdir -p "$HOME/.local/bin" && cp "$FAKE/uv" "$HOME/.local/bin"'
    put("curl", f"echo '{install}'\n")
    assert pod("babysit").returncode == 0
