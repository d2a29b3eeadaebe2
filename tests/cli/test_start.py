"""How commands start: --help and a wrong flag are answered before anything large is imported."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax import settings
from dit_jax.cli import encode
from dit_jax.data import latents
from dit_jax.diffusion import samplers

CLI = Path(__file__).parents[2] / "dit_jax" / "cli"
COMMANDS = sorted(set(path.stem for path in CLI.glob("*.py")) - {"__init__", "command"})
LARGE = {"jax", "numpy", "flax", "optax", "orbax", "grain", "torch", "sklearn", "scipy", "PIL"}


def start(name, *words):
    """(exit code, stdout, stderr, seconds of CPU) of a command in another process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"dit_jax.cli.{name}", *words], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_its_work_after_the_flags(name):
    code = f"import sys, dit_jax.cli.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not LARGE & {module.split(".")[0] for module in done.stdout.split()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_typo_are_answered_within_a_second(name):
    code, out, errors, seconds = start(name, "--help")
    assert (code, errors) == (0, "") and "dit-" in out
    assert seconds < 1
    code, out, errors, seconds = start(name, "--no_such_flag=1")
    assert (code, out) == (2, "") and errors.startswith(f"dit-{name}: Unknown command line flag")
    assert seconds < 1


def test_names_that_flags_offer_are_those_of_the_work():
    assert settings.SAMPLERS == tuple(samplers.SAMPLERS)
    assert encode.DTYPES == latents.DTYPES
