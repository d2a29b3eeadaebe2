"""What the first cell of a notebook does (`begin`), and what other cells use (`run`, `download`).

It computes nothing with jax: a TPU belongs to one process, which is the notebook's kernel or a
command.
"""

import functools
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from launch.colab import install
from launch.colab.install import Failed

DRIVE = Path("/content/drive")
STOPPED = 42  # the exit code of a command that has saved what it did
MENU = "On Colab: Runtime > Change runtime type > T4 GPU or v5e-1 TPU, then Run all."
SHORT = (  # flags of dit-train with configs/digits.py, in a rehearsal
    *("--config.model.size=Pi", "--config.run.total_steps=10", "--config.run.log_every=5"),
    *("--config.train.batch_size=16", "--config.train.warmup_steps=0"),
    *("--config.train.decay_steps=0", "--config.run.sample_every=5"),
    *("--config.run.num_samples=20", "--config.sampling.num_steps=ddim10"),
)
OFFER = (
    "Run this cell again to go on, or tick SMOKE in the first cell to rehearse without downloads"
)
CHUNK = 2**20  # bytes


class Stopped(Failed):
    """A command was stopped, and will go on."""


def begin(keep_files="on this machine", *, smoke=False):
    """Installs what is missing, says which machine this is; returns (smoke, runs, device).

    smoke: a rehearsal; SMOKE=1 in the environment asks for one too. runs: the folder of all files;
    RUNS in the environment names another one. device: "tpu", "gpu" or "cpu".
    """
    os.environ.setdefault("STARTED_IN", os.getcwd())
    os.chdir(install.ROOT)  # configs/ and runs/ are named from here
    _show_errors_in_one_line()
    install.install()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that commands fit too
    smoke = smoke or os.environ.get("SMOKE") == "1"
    runs = Path(os.environ.get("RUNS") or _folder(keep_files)).absolute()
    runs = runs / "smoke" if smoke else runs
    runs.mkdir(parents=True, exist_ok=True)
    device = look()
    print(f"Files are kept in {runs}.")
    if smoke:
        print("SMOKE: a rehearsal. The models are random or hardly trained, so they draw noise.")
    return smoke, runs, device


def _folder(keep_files):
    if keep_files != "on Google Drive":
        return "runs"
    if "google.colab" not in sys.modules:
        print("Google Drive needs Colab: files stay on this machine.")
        return "runs"
    from google.colab import drive

    drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" / "dit_jax"


def find(path):
    """The Path that a form names, from the folder of the notebook, else from that of the clone."""
    path = Path(path.strip()).expanduser()
    in_notebook = Path(os.environ.get("STARTED_IN", "."), path).absolute()
    return in_notebook if in_notebook.exists() else path.absolute()


def need(value, title):
    """Failed, unless the cell of this title has made a value since the notebook began anew."""
    if value is None:
        raise Failed(f"run the cell {title!r} again: it belongs to what was chosen before")


def _show_errors_in_one_line():
    """Makes IPython show Failed, dit_jax's UserError and the stop button without a traceback."""
    from IPython import get_ipython

    from dit_jax.errors import UserError

    def show(shell, kind, error, traceback, tb_offset=None):
        line = f"{kind.__name__}: {error}".removesuffix(": ")
        print(line, file=sys.stderr)
        return [line]

    if shell := get_ipython():
        shell.set_custom_exc((Failed, UserError, KeyboardInterrupt), show)


def look():
    """Prints which devices jax finds, and how to get faster ones; returns "tpu", "gpu" or "cpu"."""
    found = _find_devices()
    if isinstance(found, str):
        os.environ["JAX_PLATFORMS"] = "cpu"
        print(f"jax cannot use the accelerator of this machine: {found}")
        found = ["cpu", 1, "cpu", 0]
    backend, count, kind, memory = found
    versions = f"Python {sys.version.split()[0]}, jax {install.version('jax')}"
    if backend != "cpu":
        print(f"This machine has {count} x {kind} with {memory / 1e9:.0f} GB; {versions}.")
        return backend
    print(f"This machine has no TPU or GPU that jax can use; {versions}.")
    print(f"Everything works on the CPU too, with fewer images and more patience. {MENU}")
    if install.has_gpu() and not os.environ.get("JAX_PLATFORMS"):
        print("This jax does not see the NVIDIA GPU: install jax[cuda12], then restart.")
    return "cpu"


@functools.cache  # later the kernel may hold the TPU
def _find_devices():
    """What devices.py prints, or why it cannot."""
    command = [sys.executable, "-m", "launch.colab.devices"]
    options = {"cwd": install.ROOT, "capture_output": True, "text": True}
    # A kernel asks for colours, and Python 3.13 has them in tracebacks.
    done = subprocess.run(command, env=os.environ | {"PYTHON_COLORS": "0"}, **options)
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    if done.returncode:
        asked = os.environ.get("JAX_PLATFORMS")
        told = f" (JAX_PLATFORMS is {asked})" if asked else ""
        return lines[-1].removeprefix("RuntimeError: ") + told
    return json.loads(done.stdout.splitlines()[-1])


def run(*words, device=None):
    """Runs a command such as `dit-train` and shows its lines; Failed if it does not end well.

    device: "cpu" keeps it off the accelerator, which the kernel may hold. The stop button stops it.
    """
    name, *arguments = (str(word) for word in words)
    print("$", shlex.join([name, *arguments]), flush=True)
    module = name.replace("dit-", "dit_jax.cli.", 1)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": install.ROOT}
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment | ({"JAX_PLATFORMS": device} if device else {}),
        text=True,
        errors="replace",
        **options,
    ) as process:
        try:
            code = _show_lines(process)
        except KeyboardInterrupt:  # in most notebooks the command has got this signal too
            process.terminate()
            code = _show_lines(process) or STOPPED
    if code == STOPPED:
        raise Stopped(f"{name} has saved what it did: run this cell again to go on")
    if code:
        raise Failed(f"{name} ended with exit code {code}; the line above says why")


def _show_lines(process):
    """Prints the lines of a process as they come; returns its exit code."""
    for line in process.stdout:
        print(line, end="", flush=True)
    return process.wait()


def download(url, path):
    """Downloads a file, unless it is there; returns its path. A second call resumes a first one.

    Failed if it cannot be had whole.
    """
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, part)
    except OSError as error:  # no network, a full disk, a refusal
        raise Failed(f"{url} cannot be downloaded: {error}. {OFFER}") from None
    part.rename(path)
    return path


def _fetch(url, part):
    """Writes the rest of a file; OSError if it ends too early."""
    from tqdm.auto import tqdm

    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left, or what is there belongs to another file
            raise
        part.unlink()
        return _fetch(url, part)
    with response:
        if response.status != 206:  # the server sends it from its beginning
            begun = 0
        rest = int(response.headers["Content-Length"])
        options = {"initial": begun, "total": begun + rest, "unit": "B", "unit_scale": True}
        with open(part, "ab" if begun else "wb") as file, tqdm(desc=part.stem, **options) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if size != begun + rest:
        raise OSError(f"{size} of {begun + rest} bytes came")
