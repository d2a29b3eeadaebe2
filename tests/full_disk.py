"""A disk that is full: a limit on the size of a file, since the system refuses to write in both."""

import subprocess


def expect_one_line(command):
    """Runs a command where no file may grow beyond 32 KB: one line, exit code 2."""
    limited = ["bash", "-c", 'ulimit -f 32; exec "$@"', "bash", *command]
    done = subprocess.run(limited, stderr=subprocess.PIPE, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot be written: write() failed: File too large" in last
    assert "Traceback" not in done.stderr
