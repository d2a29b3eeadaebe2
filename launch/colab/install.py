"""Installs dit_jax and what it lacks into the Python of a notebook.

What is there already and new enough stays as it is, most of all jax: Colab's fits its accelerator.
What is missing comes in the versions of pins.txt.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("pins.txt")
EXTRA = "convert"
TPUS = (Path("/dev/accel0"), Path("/dev/vfio/0"))


class Failed(Exception):
    """What the reader of a notebook can mend; shown in one line."""


def install():
    """Installs what is missing; Failed if pip cannot."""
    if not version("dit_jax"):
        print("installing dit_jax (only once)")
        _pip("--no-deps", "--editable", ROOT)
    present, missing = requirements(metadata.requires("dit_jax"))
    if not missing:
        return
    pins = choose_pins(missing, accelerator())
    print("installing", *pins, "(only once)")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        print(*(f"{name}=={version(name)}" for name in present), sep="\n", file=constraints)
        constraints.flush()
        _pip(*pins, "--constraint", constraints.name)


def requirements(texts):
    """(names that are installed, names that are missing or too old) of requirements of dit_jax."""
    from packaging.requirements import Requirement

    present, missing = [], []
    for requirement in map(Requirement, texts):
        if requirement.marker and not requirement.marker.evaluate({"extra": EXTRA}):
            continue
        found = version(requirement.name)
        is_met = found and requirement.specifier.contains(found, prereleases=True)
        (present if is_met else missing).append(normal(requirement.name))
    return present, missing


def read_pins():
    """{name: version} of pins.txt."""
    lines = PINS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def choose_pins(names, accelerator):
    """The arguments of pip for packages that are missing. accelerator: an extra of jax, or ""."""
    extras = {"jax": f"[{accelerator}]" if accelerator else ""}
    pins = read_pins()
    return [f"{name}{extras.get(name, '')}=={pins[name]}" for name in names]


def accelerator():
    """The extra of jax for this machine: "cuda12", "tpu" or ""."""
    if has_gpu():
        return "cuda12"
    return "tpu" if any(path.exists() for path in TPUS) else ""


def has_gpu():
    """Whether this machine has NVIDIA's driver."""
    return shutil.which("nvidia-smi") is not None


def version(name):
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def normal(name):
    """The name of a package as pins.txt writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip(*words):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failed(f"pip cannot install; is there a network? It says: {reason}")
