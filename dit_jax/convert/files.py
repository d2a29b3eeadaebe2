"""Reads and writes the files of the converters: state dicts, output folders, digests.

A state dict is {name: NumPy array}. Reading never runs code from a file. Output is written to a
temporary folder first, so a failure leaves nothing half-written. Only .pt files need PyTorch.
"""

import argparse
import contextlib
import functools
import importlib
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import ml_dtypes  # gives NumPy bfloat16, in which safetensors then returns arrays
import numpy as np

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import disk

# Added to names by parallel wrappers, torch.compile, Lightning and libraries of averages.
PREFIXES = re.compile(r"^((module|_orig_mod|model|ema_model)\.)+")
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_unfinished = []  # folders of `scratch`
INDEX = ".index.json"  # ends the name of the list of the files of a sharded state dict
SETS = {  # --weights: the keys under which training scripts save that set
    "ema": ("ema", "state_dict_ema", "model_ema", "ema_state_dict"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
DIFFUSERS_WEIGHTS = tuple(
    f"diffusion_pytorch_model{end}"
    for end in (
        *(".safetensors", ".bin", f".safetensors{INDEX}", f".bin{INDEX}"),
        *(".fp16.safetensors", ".fp16.bin"),
    )
)


def require(name):
    """Imports a module of the extra [convert]. UserError with the install command if missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} must be installed: pip install dit_jax[convert]") from error


def read_state_dict(path, weights="ema", *, part=""):
    """Returns the state dict of a .pt or .safetensors file, without the `PREFIXES` of names.

    A .pt holds a bare state dict, or a dict of a training script. `weights`, a key of `SETS`,
    selects a set of parameters in the second case; None selects the first. A path that ends with
    `INDEX` stands for the files that it lists. part: if names start with it, only those arrays are
    read, and their names lose it.
    """
    readers = {}  # name in the file: function that reads the array
    for file in parts(path):
        open_file = _open_safetensors if file.suffix == ".safetensors" else _open_pt
        readers |= open_file(file, weights)
    names = {name: PREFIXES.sub("", name) for name in readers}
    names.pop("n_averaged", None)  # a counter of torch.optim.swa_utils
    inside = {name: x for name, x in names.items() if x.startswith(part)}
    state_dict = {}
    for name, short in (inside or names).items():
        short = short.removeprefix(part)
        if short in state_dict:
            raise UserError(f"{path} must hold {short} once, got it with several prefixes")
        state_dict[short] = readers.pop(name)()
    return state_dict


def parts(path):
    """Lists the files of a state dict: its own path, or the files that an index names."""
    path = Path(path)
    if not path.name.endswith(INDEX):
        check_suffix(path)
    if not path.is_file():
        raise UserError(f"checkpoint must be a file, got {path}")
    if not path.name.endswith(INDEX):
        return [path]
    names = disk.read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise UserError(f"{path} must have a weight_map from names to files")
    files = [path.parent / name for name in sorted(set(names.values()))]
    for file in files:
        check_suffix(file)
        if not file.is_file():
            raise UserError(f"{path} needs {file.name}, which is missing")
    return files


def write_state_dict(path, state_dict, args=None):
    """Writes a .pt or .safetensors file that `load_state_dict(strict=True)` accepts.

    args: what `read_args` reads, texts. With them, a .pt is a dict of a training script.
    """
    check_suffix(path)
    path = Path(path)
    if path.suffix == ".safetensors":
        require("safetensors.numpy").save_file(state_dict, path, args or None)
        path.chmod(0o644)  # safetensors lets only the owner read it
    else:
        torch = require("torch")
        tensors = {name: torch.from_numpy(x) for name, x in state_dict.items()}
        torch.save({"ema": tensors, "args": args} if args else tensors, path)


def diffusers_weights(folder):
    """Returns the path of the weights in a diffusers folder. UserError if there are none."""
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} must contain {' or '.join(DIFFUSERS_WEIGHTS[:2])}")


def groups(path):
    """Lists the parameter sets ("ema", "model") in a .pt of a training script, else []."""
    return list(_sets(_load_pt(Path(path)))) if _is_pickle(path) else []


def read_args(path):
    """Returns {name: value} of the arguments that a training script saved in a file, else {}."""
    if Path(path).suffix == ".safetensors":
        return _use_safetensors(path, lambda file: file.metadata()) or {}
    loaded = _load_pt(Path(path)) if _is_pickle(path) else None
    args = loaded.get("args") if isinstance(loaded, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(args) if isinstance(args, dict) else {}


def _is_pickle(path):
    return Path(path).suffix not in (".safetensors", ".json")


def check(command, source, out, options):
    """UserError if a command of dit-convert cannot write to `out` or has a wrong --weights.

    source: the path that it reads, None if it is downloaded. options: the flags of dit-convert.
    """
    folder = command != "to-torch" or options.bundle
    if folder:
        check_folder(out)
    elif not out.suffix:
        raise UserError(
            f"OUT must end with {', '.join(SUFFIXES)}, or --bundle must be given, got {out}"
        )
    else:
        check_suffix(out)
    if command.startswith("to-"):
        check_weights(options.weights)
    check_output(out, source=source, folder=folder, overwrite=options.overwrite)


def check_weights(weights):
    """UserError unless it is a set of parameters that a run has."""
    if weights not in ("ema", "params"):
        raise UserError(f"weights must be ema or params, got {weights!r}")


def check_suffix(path):
    """UserError unless the path ends like a state dict."""
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"file must end with {', '.join(SUFFIXES)}, got {path}")


def check_folder(path):
    """UserError if the path of an output folder ends like a state dict."""
    if Path(path).suffix in SUFFIXES:
        raise UserError(f"output must be a folder name without {Path(path).suffix}, got {path}")


@contextlib.contextmanager
def scratch(**options):
    """Yields a temporary folder of `tempfile.mkdtemp(**options)`, which is deleted at the end."""
    folder = Path(tempfile.mkdtemp(**options))
    _unfinished.append(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        _unfinished.remove(folder)


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
    with contextlib.ExitStack() as stack:
        try:
            options = {"prefix": f".partial-{path.name}-", "dir": path.parent}
            parent = stack.enter_context(scratch(**options))
        except OSError as error:
            raise UserError(
                f"output must be in a writable directory, got {path}: {error.strerror}"
            ) from error
        yield parent / path.name
        # Check again: another conversion may have written `path` in the meantime.
        check_output(path, source=source, folder=folder, overwrite=overwrite)
        for new in sorted(parent.iterdir()):  # sorted: a file before its report
            _remove(path.parent / new.name)
            new.rename(path.parent / new.name)


def remove_unfinished():
    """Removes what `scratch` made, for a process that ends without an exception."""
    for parent in _unfinished:
        shutil.rmtree(parent, ignore_errors=True)


def check_output(path, *, source, folder, overwrite):
    """UserError unless a conversion of `source`, which may be None, may write to `path`."""
    target, read = path.resolve(), source and Path(source).resolve()
    if read and (target.is_relative_to(read) or read.is_relative_to(target)):
        raise UserError(f"output must be separate from the input {source}, got {path}")
    if not path.parent.is_dir():
        raise UserError(f"output must be in an existing directory, got {path}")
    disk.check_writable(path, "output")
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
    """Returns {name: sha256} for a file, or for every file in a folder or in an index."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if path.name.endswith(INDEX):
        files += parts(path)
    root = path if path.is_dir() else path.parent
    return {str(file.relative_to(root)): disk.sha256(file) for file in files}


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_safetensors(path, weights):
    """Returns {name: function that reads the array} of a .safetensors file."""
    read = functools.partial(_use_safetensors, path)
    names = read(lambda file: list(file.keys()))
    # Opened again for each array: the pages of a mapped file count as memory.
    return {name: lambda name=name: read(lambda file: file.get_tensor(name)) for name in names}


def _use_safetensors(path, use):
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return use(file)
    except (AttributeError, TypeError) as error:  # float8
        raise UserError(
            f"{path} must have types that NumPy supports, got {_first_line(error)}"
        ) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error


def _open_pt(path, weights):
    """Returns {name: function that reads the array} of the chosen set in a .pt file."""
    tensors = _choose(_load_pt(path), weights, path)  # mapped: only names were read
    if sum(x.nbytes for x in tensors.values()) > path.stat().st_size / 2:
        # The pages of a mapped file count as memory until the last tensor is freed.
        tensors = _choose(_load_pt(path, mmap=False), weights, path)
    return {name: functools.partial(_to_numpy, name, x) for name, x in tensors.items()}


class _Ignored:
    """Stands for an object in a pickle that is no tensor, so that no code of its class runs."""

    def __init__(self, *args, **options):
        pass

    def __setstate__(self, state):
        pass


def _load_pt(path, *, mmap=True):
    """Returns the content of a .pt; objects of unknown classes are `_Ignored`."""
    torch, ignored = require("torch"), {}
    while True:
        try:
            with (
                torch.serialization.safe_globals([argparse.Namespace, *ignored.values()]),
                warnings.catch_warnings(action="ignore"),  # about pickles not written by PyTorch
            ):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is None and not ignored:
                raise UserError(f"{path} is truncated or not a PyTorch file") from error
            name = refused[1] if refused else list(ignored)[-1]
            if refused is None or name in ignored:  # PyTorch refuses it even as an `_Ignored`
                raise _could_run_code(path, name) from error
            module, _, kind = name.rpartition(".")
            fields = {"__module__": module or "builtins"}
            ignored[name] = type(kind, (_Ignored,), fields)
        except PermissionError:
            raise
        except Exception as error:  # PyTorch raises half a dozen types for a broken file
            if not mmap or "mmap" not in str(error):
                raise UserError(f"{path} is truncated or not a PyTorch file") from error
            mmap = False  # the format before PyTorch 1.6 cannot be mapped


def _could_run_code(path, name):
    return UserError(f"{path} must contain only tensors, got {name}, which could run code")


def _sets(loaded):
    """Returns {key of `SETS`: its state dict} of the content of a .pt; {} if it is bare."""
    if not isinstance(loaded, dict):
        return {}
    found = {
        kind: [loaded[key] for key in keys if isinstance(loaded.get(key), dict)]
        for kind, keys in SETS.items()
    }
    return {kind: dicts[0] for kind, dicts in found.items() if dicts}


def _choose(loaded, weights, path):
    """Returns the tensors of a loaded .pt; `weights` selects the set if it has several."""
    torch, sets = require("torch"), _sets(loaded)
    weights = weights or next(iter(sets), None)
    if sets and weights not in sets:
        raise UserError(
            f"weights must be {' or '.join(sets)} for {path}, got {weights}: "
            f"use --weights={next(iter(sets))}"
        )
    chosen = sets[weights] if sets else loaded
    for x in (chosen, *(chosen.values() if isinstance(chosen, dict) else ())):
        if isinstance(x, _Ignored):
            raise _could_run_code(path, f"{type(x).__module__}.{type(x).__name__}")
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
    torch, x = require("torch"), x.detach()
    try:
        if x.dtype == torch.bfloat16:  # unknown to PyTorch's numpy()
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy().view(np.ndarray)
    except TypeError as error:  # float8
        raise UserError(f"{name} must have a type that NumPy supports, got {x.dtype}") from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
