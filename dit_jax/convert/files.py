"""Reads and writes the files of the converters: state dicts, output folders, digests.

A state dict is {name: NumPy array}. Reading never runs code from a file. Output is written to a
temporary folder first, so a failure leaves nothing half-written. Only .pt files need PyTorch.
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

PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # added by parallel wrappers and torch.compile
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def require(name):
    """Imports a module of the extra [convert]. UserError with the install command if missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} must be installed: pip install dit_jax[convert]") from error


def read_state_dict(path, weights="ema"):
    """Returns the state dict of a .pt or .safetensors file, without the `PREFIXES` of names.

    A .pt file holds either a bare state dict or the dict of the official training script, {"model",
    "ema", "opt", "args"}. In the second case, `weights` ("ema" or "model") selects the set.
    """
    check_suffix(path)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint must be a file, got {path}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pt
    return {PREFIXES.sub("", name): x for name, x in read(path, weights).items()}


def write_state_dict(path, state_dict):
    """Writes a .pt or .safetensors file that `load_state_dict(strict=True)` accepts."""
    check_suffix(path)
    path = Path(path)
    if path.suffix == ".safetensors":
        require("safetensors.numpy").save_file(state_dict, path)
        path.chmod(0o644)  # safetensors lets only the owner read it
    else:
        torch = require("torch")
        torch.save({name: torch.from_numpy(x) for name, x in state_dict.items()}, path)


def diffusers_weights(folder):
    """Returns the path of the weights in a diffusers folder. UserError if there are none."""
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} must contain {' or '.join(DIFFUSERS_WEIGHTS)}")


def groups(path):
    """Lists the parameter sets ("ema", "model") in a .pt of the official script, else []."""
    return _groups(_load_pt(Path(path), mmap=True)) if Path(path).suffix != ".safetensors" else []


def check_suffix(path):
    """UserError unless the path ends like a state dict."""
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"file must end with {', '.join(SUFFIXES)}, got {path}")


def check_folder(path):
    """UserError if the path of an output folder ends like a state dict."""
    if Path(path).suffix in SUFFIXES:
        raise UserError(f"output must be a folder name without {Path(path).suffix}, got {path}")


@contextlib.contextmanager
def temporary_output(path, *, source, folder, overwrite):
    """Yields a temporary path with the name of `path`; moves it to `path` at the end.

    If the caller raises, the temporary output is deleted and `path` keeps its content; `discard`
    has the same effect. folder: True if the output is a folder; else it is a file, and its report
    PATH.parity.json moves with it. source: the input of the conversion. `overwrite` replaces a file
    by a file, or a folder that is empty or contains a parity.json.
    """
    path = Path(path)
    check_output(path, source=source, folder=folder, overwrite=overwrite)
    try:
        parent = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"output must be in a writable directory, got {path}: {error.strerror}"
        ) from error
    try:
        yield parent / path.name
        # Check again: another conversion may have written `path` in the meantime.
        check_output(path, source=source, folder=folder, overwrite=overwrite)
        for new in sorted(parent.iterdir()):  # sorted: a file before its report
            _remove(path.parent / new.name)
            new.rename(path.parent / new.name)
    finally:
        _remove(parent)


def check_output(path, *, source, folder, overwrite):
    """UserError unless a conversion of `source` may write to `path`."""
    target, read = path.resolve(), Path(source).resolve()
    if target.is_relative_to(read) or read.is_relative_to(target):
        raise UserError(f"output must be separate from the input {source}, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"output must be in an existing directory, got {path}")
    if steps.latest(path.parent) is not None:
        raise UserError(f"output must not be in a folder of checkpoint steps, got {path}")
    for old in [path] if folder else [path, report_path(path)]:
        if (old.exists() or old.is_symlink()) and not overwrite:
            raise UserError(f"output must not exist unless --overwrite is given, got {old}")
        if old.is_symlink():
            raise UserError(f"output to overwrite must not be a symbolic link, got {old}")
        if old.exists() and old.is_dir() != folder:
            kind = "folder" if folder else "file"
            raise UserError(f"output to overwrite must be a {kind}, got {old}")
    if path.is_dir() and any(path.iterdir()) and not (path / "parity.json").is_file():
        raise UserError(f"output to overwrite must be empty or written by dit-convert, got {path}")


def discard(temporary):
    """Deletes the output of `temporary_output`, so that its path keeps the old content."""
    for new in temporary.parent.iterdir():
        _remove(new)


def report_path(path):
    """Returns the path of the parity report of a file: PATH.parity.json."""
    return path.with_name(f"{path.name}.parity.json")


def digests(path):
    """Returns {name: sha256} for a file, or for every file in a folder."""
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
        for name in names:  # reopen for each array: the pages of a mapped file count as memory
            with safetensors.safe_open(path, "numpy") as file:
                state_dict[name] = file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # float8
        raise UserError(
            f"{path} must have types that NumPy supports, got {_first_line(error)}"
        ) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    return state_dict


def _read_pt(path, weights):
    tensors = _load_pt(path, mmap=True)  # reads only the names
    group = _choose(tensors, weights, path)
    if sum(x.nbytes for x in group.values()) > path.stat().st_size / 2:
        # The pages of a mapped file count as memory until the last tensor is freed.
        group = _choose(_load_pt(path, mmap=False), weights, path)
    return {name: _to_numpy(name, x) for name, x in group.items()}


def _load_pt(path, *, mmap):
    torch = require("torch")
    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),  # the script's "args"
            warnings.catch_warnings(action="ignore"),  # about pickles not written by PyTorch
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} must contain only tensors, got {refused[1]}, which could run code"
            ) from error
        raise UserError(f"{path} is truncated or not a PyTorch file") from error
    except PermissionError:
        raise
    except Exception as error:  # PyTorch raises half a dozen types for a broken file
        if mmap and "mmap" in str(error):  # the format before PyTorch 1.6 cannot be mapped
            return _load_pt(path, mmap=False)
        raise UserError(f"{path} is truncated or not a PyTorch file") from error


def _groups(loaded):
    """Lists the parameter sets in the content of a .pt."""
    names = ("ema", "model") if isinstance(loaded, dict) else ()
    return [name for name in names if isinstance(loaded.get(name), dict)]


def _choose(loaded, weights, path):
    """Returns the tensors of a loaded .pt; `weights` selects the set if it has several."""
    torch = require("torch")
    names = _groups(loaded)
    if names and weights not in names:
        raise UserError(
            f"weights must be {' or '.join(names)} for {path}, got {weights}: "
            f"use --weights={names[0]}"
        )
    chosen = loaded[weights] if names else loaded
    if not isinstance(chosen, dict) or not all(
        isinstance(name, str) and torch.is_tensor(x) for name, x in chosen.items()
    ):
        keys = list(map(str, chosen))[:10] if isinstance(chosen, dict) else []
        content = f"a dict of {', '.join(keys)}" if keys else type(chosen).__name__
        raise UserError(f"{path} must contain a state dict, got {content}")
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
        raise UserError(f"{name} must have a type that NumPy supports, got {x.dtype}") from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
