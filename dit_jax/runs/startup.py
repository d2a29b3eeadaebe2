"""What a start of training costs, until its first step ends: measured in new processes.

A child process times its phases and prints them as JSON: `python -m dit_jax.runs.startup TIME
SETTINGS`, with the time in seconds since 1970 at which it was started. This module imports jax only
there, so that the parent leaves the devices to its children.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError

PHASES = ("imports", "devices", "state", "tracing", "compiling", "first_step")


def measure(settings):
    """{name: seconds} of the phases of a start and of their total, then with what it left on disk.

    cold_*: without compiled programs on disk. warm_*: again, with jax's persistent compilation
    cache as the cold one has left it. UserError if the step cannot run.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            seconds = start(settings, folder)
            seconds["total"] = sum(seconds.values())
            figures |= {f"{kind}_{name}_seconds": x for name, x in seconds.items()}
    return figures


def start(settings, cache):
    """{phase: seconds} of a child process whose compiled programs are kept in the folder cache."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # hides what XLA says of the cache on CPUs
    }
    text = json.dumps(settings_lib.to_json(settings))
    command = [sys.executable, "-m", "dit_jax.runs.startup", str(time.time()), text]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(lines[-1].removeprefix("dit_jax.errors.UserError: "))
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """The seconds of phases that follow each other."""

    def __init__(self, started):
        self.seconds, self._last = {}, started

    def end(self, phase):
        """Ends a phase, which began when the one before ended."""
        now = time.time()
        self.seconds[phase], self._last = now - self._last, now


def run_phases(settings, clock):
    """Starts training on a random batch, until its first step has ended."""
    import jax

    from dit_jax.machine import devices, prng
    from dit_jax.runs import bench, build

    clock.end("imports")
    jax.devices()
    clock.end("devices")
    parts, key = build.parts(settings), prng.key(settings.seed)
    state, batch = parts.create_state(key), bench.random_batch(settings, parts.mesh)
    jax.block_until_ready(state)
    clock.end("state")
    lowered = parts.jit_step().lower(state, batch, key)
    clock.end("tracing")
    compiled = lowered.compile()
    devices.check_memory(compiled)
    clock.end("compiling")
    jax.block_until_ready(compiled(state, batch, key))
    clock.end("first_step")


def main():
    clock = Clock(float(sys.argv[1]))
    run_phases(settings_lib.read(json.loads(sys.argv[2])), clock)
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
