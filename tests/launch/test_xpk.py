"""launch/xpk/train.sh. A fake xpk logs its arguments."""

import pytest

SETTINGS = {
    "NAME": "xl2",
    "CLUSTER": "my-cluster",
    "ZONE": "us-east5-b",
    "PROJECT": "my-project",
    "TYPE": "v6e-16",
    "WORKDIR": "gs://my-bucket/xl2",
    "COMMIT": "HEAD",
}
FLAG = "--config=configs/imagenet256.py:XL/2"


def test_dry_run_prints_the_commands_without_running_them(run, check_golden):
    done = run("xpk/train.sh", FLAG, "--dry-run", **SETTINGS)
    assert (done.returncode, done.stderr) == (0, "")
    check_golden("xpk.txt", done.stdout)


@pytest.mark.parametrize("code", [0, 1])
def test_script_sends_the_commit_and_exits_with_the_code_of_xpk(put, run, tmp_path, code):
    put("xpk", f'printf "%s\\n" "$@" > "$FAKE/words"; exit {code}\n')
    done = run("xpk/train.sh", FLAG, "--config.name='a b'", **SETTINGS, MAX_RESTARTS="7")
    assert (done.returncode, done.stderr) == (code, "")
    words = (tmp_path / "words").read_text().splitlines()
    flags = dict(word[2:].split("=", 1) for word in words[2:])
    assert words[:2] == ["workload", "create"]
    assert flags["max-restarts"] == "7"
    assert flags["base-docker-image"] == "python:3.12"
    assert (tmp_path / flags["script-dir"] / "dit_jax" / "__init__.py").exists()
    assert not (tmp_path / flags["script-dir"] / ".git").exists()


@pytest.mark.parametrize("installs, code", [(True, 42), (False, 128)])
def test_worker_command_exits_with_the_code_of_dit_train(put, run, tmp_path, installs, code):
    """XPK runs `(command) &` and sends SIGTERM to that shell."""
    put("xpk", 'printf "%s\\n" "$@" | sed -n "s/^--command=//p" > "$FAKE/command"\n')
    run("xpk/train.sh", FLAG, "--config.name='a b'", **SETTINGS)
    put("pip", f"exit {0 if installs else 1}\n")
    put(
        "dit-train",
        'trap "exit 42" TERM; printf "%s\\n" "$@" > "$FAKE/flags"\n'
        "for _ in {1..200}; do sleep 0.05; done\n",
    )
    worker = tmp_path / "worker.sh"
    worker.write_text(
        f"({(tmp_path / 'command').read_text()}) & PID=$!\n"
        'while kill -0 $PID 2> /dev/null && [ ! -e "$FAKE/flags" ]; do sleep 0.05; done\n'
        "kill -TERM $PID 2> /dev/null; wait $PID\n"
    )
    assert run(worker).returncode == code
    if installs:
        flags = (tmp_path / "flags").read_text().splitlines()
        assert flags == ["--workdir=gs://my-bucket/xl2", FLAG, "--config.name='a b'"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"CLUSTER": ""}, "CLUSTER must be set: see --help"),
        (
            {"ZONE": "us-east5"},
            "ZONE must be a zone, such as europe-west4-a, not a region, got 'us-east5'",
        ),
        (
            {"WORKDIR": "s3://b/x"},
            "WORKDIR must be an absolute path or start with gs://BUCKET, got 's3://b/x'",
        ),
        (
            {"TYPE": "v3-32"},
            "TYPE must be a TPU of v4 or later, such as v5litepod-16 or v6e-16, got 'v3-32'",
        ),
        ({"GRACE": "soon"}, "GRACE must be a number of seconds, got 'soon'"),
        ({}, "xpk must be on the PATH: pip install xpk"),
    ],
)
def test_wrong_use_is_reported_in_one_line(run, settings, message):
    done = run("xpk/train.sh", FLAG, **{**SETTINGS, **settings})
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"launch/xpk/train.sh: {message}\n",
    )


@pytest.mark.parametrize(
    "word, rest", [("runs", " too"), ("--dryrun", ""), ("--configs=x", ""), ("-x", "")]
)
def test_an_unknown_argument_is_refused(run, word, rest):
    done = run("xpk/train.sh", FLAG, word, "--dry-run", **SETTINGS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"launch/xpk/train.sh: takes CONFIG and flags of dit-train, got '{word}'{rest}\n"
    )


def test_config_outside_the_commit_is_refused(run):
    done = run("xpk/train.sh", "--config=/tmp/mine.py:XL/2", "--dry-run", **SETTINGS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/xpk/train.sh: config must be a file of commit ")
    assert done.stderr.endswith(", got /tmp/mine.py\n")
