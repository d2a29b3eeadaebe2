"""Files and folders of the converters: state dicts read and written, nothing half-written.

A state dict is {name: NumPy array}. Reading never runs code that a file may hold. PyTorch is needed
for .pt alone.
"""

import argparse
import contextlib
import importlib
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import disk

KINDS = {True: "folder", False: "file"}
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of parallel wrappers and torch.compile
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def require(name):
    """The module of the extra [convert]; UserError, with the line to type, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} must be installed: pip install dit_jax[convert]") from error


def read_state_dict(path, weights="ema"):
    """The state dict of a .pt or .safetensors file.

    A .pt is a bare state dict or what the official training script saves, {"model", "ema", "opt",
    "args"}: then `weights`, "ema" or "model", says which. `PREFIXES` of names are dropped.
    """
    check_suffix(path)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint must be a file, got {path}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pt
    return {PREFIXES.sub("", name): x for name, x in read(path, weights).items()}


def write_state_dict(path, state_dict):
    """Writes a .pt or .safetensors file that `load_state_dict(strict=True)` takes."""
    check_suffix(path)
    path = Path(path)
    if path.suffix == ".safetensors":
        require("safetensors.numpy").save_file(state_dict, path)
        path.chmod(0o644)  # it is its owner's alone otherwise
    else:
        torch = require("torch")
        torch.save({name: torch.from_numpy(x) for name, x in state_dict.items()}, path)


def groups(path):
    """The sets of parameters in a file of the official training script; none in another one."""
    return _groups(_load_pt(Path(path), mmap=True)) if Path(path).suffix != ".safetensors" else []


def check_suffix(path):
    """UserError unless the path is that of a state dict by its name."""
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"file must end with {', '.join(SUFFIXES)}, got {path}")


def check_folder(path):
    """UserError where a folder to write would have the name of a state dict."""
    if Path(path).suffix in SUFFIXES:
        raise UserError(f"output must be a folder, without {Path(path).suffix}, got {path}")


@contextlib.contextmanager
def written_aside(path, *, source, folder, overwrite):
    """A place of the same name to write to, moved to `path` at the end; removed if anything fails.

    What removes the place itself leaves `path` as it was. folder: whether it will be one, or else a
    file with PATH.parity.json, of the same place, beside it. source: what is read meanwhile.
    Replaced, if `overwrite`, is a file by a file, and a folder that is empty or has a parity.json.
    """
    path = Path(path)
    check_output(path, source=source, folder=folder, overwrite=overwrite)
    try:
        place = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"output must be where you may write, got {path}: {error.strerror}"
        ) from error
    try:
        yield place / path.name
        check_output(path, source=source, folder=folder, overwrite=overwrite)  # still
        for new in sorted(place.iterdir()):  # the report after what it is about
            _remove(path.parent / new.name)
            new.rename(path.parent / new.name)
    finally:
        _remove(place)


def check_output(path, *, source, folder, overwrite):
    """UserError unless a conversion of `source` may write to `path`."""
    there, read = path.resolve(), Path(source).resolve()
    if there.is_relative_to(read) or read.is_relative_to(there):
        raise UserError(f"output must be apart from what is read, {source}, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"output must be in a directory that exists, got {path}")
    if steps.latest(path.parent) is not None:
        raise UserError(f"output must not be among the steps of a run, got {path}")
    for old in [path] if folder else [path, report_of(path)]:
        if (old.exists() or old.is_symlink()) and not overwrite:
            raise UserError(f"output must not exist, or --overwrite be given, got {old}")
        if old.is_symlink():
            raise UserError(f"output to overwrite must be no symbolic link, got {old}")
        if old.exists() and old.is_dir() != folder:
            raise UserError(f"output to overwrite must be a {KINDS[folder]}, got {old}")
    if path.is_dir() and any(path.iterdir()) and not (path / "parity.json").is_file():
        raise UserError(f"output to overwrite must be a folder of dit-convert's own, got {path}")


def discard(aside):
    """Leaves the output of `written_aside` as it was."""
    for new in aside.parent.iterdir():
        _remove(new)


def report_of(path):
    """Where the report about a file lies."""
    return path.with_name(f"{path.name}.parity.json")


def digests(path):
    """{name: sha256} of a file, or of every file of a folder."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return {str(file.relative_to(root)): disk.sha256(file) for file in files}


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_safetensors(path, weights):
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
        state_dict = {}
        for name in names:  # opened anew each time: the pages of a mapped file count as memory
            with safetensors.safe_open(path, "numpy") as file:
                state_dict[name] = file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # of types that NumPy has not
        raise UserError(f"{path} must hold plain floats, got {_first_line(error)}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is cut short or no safetensors file: {error}") from error
    return state_dict


def _read_pt(path, weights):
    tensors = _load_pt(path, mmap=True)  # nothing is read yet but the names
    group = _choose(tensors, weights, path)
    if sum(x.nbytes for x in group.values()) > path.stat().st_size / 2:
        # The pages of a mapped file count as memory until the last tensor is gone.
        group = _choose(_load_pt(path, mmap=False), weights, path)
    return {name: _to_numpy(name, x) for name, x in group.items()}


def _load_pt(path, *, mmap):
    torch = require("torch")
    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),  # of the script's "args"
            warnings.catch_warnings(action="ignore"),  # of pickles that PyTorch did not write
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} was not opened: beside tensors it holds {refused[1]}, which may run code"
            ) from error
        raise UserError(f"{path} is cut short or no file of PyTorch's") from error
    except PermissionError:
        raise
    except Exception as error:  # PyTorch raises half a dozen types for a broken file
        if mmap and "mmap" in str(error):  # the format before PyTorch 1.6 cannot be mapped
            return _load_pt(path, mmap=False)
        raise UserError(f"{path} is cut short or no file of PyTorch's") from error


def _groups(loaded):
    """The names of the sets of parameters in what a .pt holds."""
    names = ("ema", "model") if isinstance(loaded, dict) else ()
    return [name for name in names if isinstance(loaded.get(name), dict)]


def _choose(loaded, weights, path):
    """The tensors of a loaded .pt, those of the average or of the model where it has both."""
    torch = require("torch")
    have = _groups(loaded)
    if have and weights not in have:
        raise UserError(
            f"weights must be {' or '.join(have)} for {path}, got {weights}: "
            f"give --weights={have[0]}"
        )
    chosen = loaded[weights] if have else loaded
    if not isinstance(chosen, dict) or not all(
        isinstance(name, str) and torch.is_tensor(x) for name, x in chosen.items()
    ):
        keys = list(map(str, chosen))[:10] if isinstance(chosen, dict) else []
        what = f"a dict of {', '.join(keys)}" if keys else type(chosen).__name__
        raise UserError(f"{path} must hold a state dict, got {what}")
    for name, x in chosen.items():
        if x.layout != torch.strided or x.is_meta or x.is_quantized:
            raise UserError(f"{name} must be a plain dense tensor, got {x.dtype}, {x.layout}")
    return chosen


def _to_numpy(name, x):
    x = x.detach()
    try:
        # NumPy has no bfloat16.
        return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy().view(np.ndarray)
    except TypeError as error:  # float8
        raise UserError(f"{name} must be of a type that NumPy has, got {x.dtype}") from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
