"""The allocator keeps memory, in processes of their own: it cannot be set back."""

import os
import subprocess
import sys

import pytest

from dit_jax.machine import allocator

FAULTS = """
import resource
import numpy as np
from dit_jax.machine import allocator
print(allocator.keep_memory())
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [np.ones(2**20) for _ in range(4)]  # 8 MiB each
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment):
    """(whether the options were set, page faults of what allocates ten times 32 MiB)."""
    names = [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    options = {"env": clean | environment, "capture_output": True, "text": True, "check": True}
    kept, faults = subprocess.run([sys.executable, "-c", FAULTS], **options).stdout.split()
    return kept == "True", int(faults)


def test_buffers_are_not_given_back_and_got_again():
    kept, faults = run()
    left, more = run(DIT_KEEP_MEMORY="0")
    assert (kept, left) == (True, False)
    assert faults < more / 4 and more > 40  # at least one for each buffer, also of huge pages


@pytest.mark.parametrize(
    "name, value", [("MALLOC_ARENA_MAX", "4"), ("LD_PRELOAD", ""), (allocator.SWITCH, "0")]
)
def test_what_the_user_chose_stays(name, value, monkeypatch, tmp_path):
    monkeypatch.setenv(name, value)
    assert not allocator.keep_memory(tmp_path)


@pytest.mark.parametrize("name", allocator.ACCELERATORS)
def test_a_machine_with_an_accelerator_is_left_alone(name, tmp_path):
    (tmp_path / name).touch()
    assert not allocator.keep_memory(tmp_path)
