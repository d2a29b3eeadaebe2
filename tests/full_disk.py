"""Simulates a full disk by a limit on file size: both make the system call `write` fail."""

import subprocess


def expect_one_line(command):
    """Runs a command whose files may not exceed 32 KB: expects one error line and exit code 2."""
    limited = ["bash", "-c", 'ulimit -f 32; exec "$@"', "bash", *command]
    done = subprocess.run(limited, stderr=subprocess.PIPE, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot be written: write() failed: File too large" in last
    assert "Traceback" not in done.stderr
