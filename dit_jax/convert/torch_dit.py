"""Converts the parameters of a DiT to and from the official PyTorch state dict, bit for bit.

A state dict is {official name: NumPy array}; this module does not need PyTorch. Names and shapes
follow https://github.com/facebookresearch/DiT. The designs that were never released (in-context,
cross-attention, adaLN) get names of the same style.
Shapes: D hidden size, C channels, p patch size, T tokens.
"""

import re
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from dit_jax.errors import UserError
from dit_jax.machine import prng
from dit_jax.models import dit, layers

MODULES = {  # our module: official module; * is the index of the block, our leading axis
    "x_embedder/proj": "x_embedder.proj",
    "t_embedder/fc1": "t_embedder.mlp.0",
    "t_embedder/fc2": "t_embedder.mlp.2",
    "y_embedder/embedding_table": "y_embedder.embedding_table",
    "blocks/attn/qkv": "blocks.*.attn.qkv",
    "blocks/attn/proj": "blocks.*.attn.proj",
    "blocks/cross_attn/q": "blocks.*.cross_attn.q",
    "blocks/cross_attn/kv": "blocks.*.cross_attn.kv",
    "blocks/cross_attn/proj": "blocks.*.cross_attn.proj",
    "blocks/mlp/fc1": "blocks.*.mlp.fc1",
    "blocks/mlp/fc2": "blocks.*.mlp.fc2",
    "blocks/adaLN_modulation": "blocks.*.adaLN_modulation.1",
    "final_layer/adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_layer/linear": "final_layer.linear",
}
PARAMETERS = {"kernel": "weight", "embedding": "weight", "bias": "bias"}
RANKS = {  # number of axes of the arrays that `read_config` uses
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
FLOATS = tuple(map(jax.numpy.dtype, ("float32", "float16", "bfloat16")))  # exact in float32
FLOAT64 = np.dtype("float64")  # rounded to float32
MAX_NAMES = 10  # in an error message


def read_config(state_dict, *, num_heads=0, num_classes=0):
    """Infers the DiTConfig from the shapes of an official state dict.

    The shapes do not determine the number of heads. It is num_heads, or else the value in `SIZES`
    for this depth and hidden size. The last row of the label table belongs to the null label unless
    num_classes equals the number of rows.
    """
    _check_core(state_dict)
    hidden_size, in_channels, patch_size = _read_patches(state_dict)
    blocks = filter(None, (re.match(r"blocks\.(\d+)\.", name) for name in state_dict))
    depth = 1 + max(int(match[1]) for match in blocks)
    heads = {(size[0], size[1]): size[2] for size in dit.SIZES.values()}
    num_heads = num_heads or heads.get((depth, hidden_size), 0)
    if not num_heads:
        raise UserError(
            f"num_heads must be given for depth {depth} and hidden size {hidden_size}, "
            "because no size of the paper has them"
        )
    if hidden_size % num_heads:
        raise UserError(f"num_heads must divide hidden size {hidden_size}, got {num_heads}")
    rows = np.shape(state_dict["y_embedder.embedding_table.weight"])[0]
    num_classes = num_classes or max(rows - 1, 1)
    if num_classes not in (rows, rows - 1):
        raise UserError(
            f"num_classes must be {rows - 1} or {rows} for a label table of {rows} rows, "
            f"got {num_classes}"
        )
    outputs = np.shape(state_dict["final_layer.linear.weight"])[0]
    noise_rows = patch_size**2 * in_channels
    if outputs not in (noise_rows, 2 * noise_rows):
        raise UserError(
            f"final_layer.linear.weight must have {noise_rows} or, with a learned variance, "
            f"{2 * noise_rows} rows for patch {patch_size} and {in_channels} channels, "
            f"got {outputs}"
        )
    return dit.DiTConfig(
        _input_size(state_dict["pos_embed"], patch_size),
        patch_size,
        in_channels,
        depth,
        hidden_size,
        num_heads,
        num_classes,
        null_label=rows > num_classes,
        learn_sigma=outputs == 2 * noise_rows,
        conditioning=_conditioning(state_dict, hidden_size),
    )


def _read_patches(state_dict):
    """Returns D, C, p. UserError if an array of `RANKS` has a wrong shape."""
    for name, rank in RANKS.items():
        if np.ndim(state_dict[name]) != rank:
            shape = np.shape(state_dict[name])
            raise UserError(f"{name} must have {rank} axes, got shape {shape}")
        if 0 in np.shape(state_dict[name]):
            raise UserError(f"{name} must not be empty, got shape {np.shape(state_dict[name])}")
    hidden_size, in_channels, *patch = np.shape(state_dict["x_embedder.proj.weight"])
    if patch[0] != patch[1]:
        raise UserError(f"x_embedder.proj.weight must have square patches, got {patch}")
    return hidden_size, in_channels, patch[0]


def _conditioning(state_dict, hidden_size):
    modulation = state_dict.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is None:
        return "cross_attention" if "blocks.0.cross_attn.q.weight" in state_dict else "in_context"
    chunks = {4: "adaln", 6: "adaln_zero"}
    outputs = np.shape(modulation)[0]
    if outputs not in (4 * hidden_size, 6 * hidden_size):
        raise UserError(
            f"blocks.0.adaLN_modulation.1.weight must have 4 or 6 x {hidden_size} rows, "
            f"got {outputs}"
        )
    return chunks[outputs // hidden_size]


def _input_size(table, patch_size):
    """Finds the input_size (H, W) of a position table (1, T, D); tries square grids first."""
    table = np.asarray(table, np.float32)
    _, tokens, hidden_size = table.shape
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for rows, columns in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if _is_close(table, layers.position_table((rows, columns), hidden_size)[None]):
            return rows * patch_size, columns * patch_size
    raise UserError(f"pos_embed must be the sin-cos table of a grid of {tokens} patches")


def from_official(state_dict, config):
    """Converts an official state dict to our parameters, a nested dict of float32 NumPy arrays.

    Empties the state dict array by array, so that a large one is not in memory twice. Our model
    computes the position table, so this function only checks it.
    """
    check(config)
    leaves = _leaves(config)
    shapes = {name: leaf.official_shape for leaf in leaves for name in leaf.names}
    shapes["pos_embed"] = _position_table(config).shape
    _check_shapes("state dict", state_dict, shapes)
    for name, x in state_dict.items():
        _check_dtype(name, x)
    exact_position_table(state_dict.pop("pos_embed"), config)
    params = {}
    for leaf in leaves:
        parts = [
            _from_official(leaf.path, to_float32(name, state_dict.pop(name)), config)
            for name in leaf.names
        ]
        params[leaf.path] = np.stack(parts) if leaf.stacked else np.array(parts[0], order="C")
    return traverse_util.unflatten_dict(params, sep="/")


def to_official(params, config):
    """Converts our parameters to an official state dict, which includes the position table.

    Empties params array by array, so that a large tree is not in memory twice.
    """
    check(config)
    leaves = _leaves(config)
    flat = traverse_util.flatten_dict(params, sep="/")
    _check_shapes("params", flat, {leaf.path: leaf.shape for leaf in leaves})
    params.clear()
    state_dict = {"pos_embed": _position_table(config)}
    for leaf in leaves:
        x = np.asarray(flat.pop(leaf.path), np.float32)
        check_finite(leaf.path, x)
        for name, part in zip(leaf.names, x if leaf.stacked else [x], strict=True):
            state_dict[name] = np.array(_to_official(leaf.path, part, config), order="C")
    return state_dict


def check(config):
    """UserError unless the official code has such a DiT: on two axes, of the paper's parts."""
    if len(config.input_size) != 2:
        raise UserError(f"input_size must have two axes for PyTorch, got {config.input_size}")
    if config.parts:
        name, value = next(iter(config.parts.items()))
        rule = f"{config._field_defaults[name]} for PyTorch, as in the paper's DiT"
        raise UserError(f"{name} must be {rule}, got {value}")
    if config.conditioning == "in_context_zero":
        raise UserError("conditioning must be one of the paper's for PyTorch, got in_context_zero")


def fields(config):
    """{name: value} of the fields of a DiTConfig that PyTorch's DiT takes: `torch_model.DiT`."""
    check(config)
    return {k: x for k, x in config._asdict().items() if k not in config._field_defaults}


class _Leaf(NamedTuple):
    """One array of our parameters and the official arrays that it stacks."""

    path: str
    shape: tuple[int, ...]
    names: list[str]  # official: one for each block if stacked, else one
    official_shape: tuple[int, ...]  # of each official array

    @property
    def stacked(self):
        return self.path.startswith("blocks/")


def _leaves(config):
    """Lists the `_Leaf`s of a config."""
    params = jax.eval_shape(lambda: dit.init(config, prng.key(0)))
    leaves = []
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        module, parameter = path.rsplit("/", 1)
        name = f"{MODULES[module]}.{PARAMETERS[parameter]}"
        if "*" in name:
            names = [name.replace("*", str(i)) for i in range(config.depth)]
        else:
            names = [name]
        part = np.empty(x.shape[1:] if "*" in name else x.shape, np.float32)
        official_shape = _to_official(path, part, config).shape
        leaves.append(_Leaf(path, x.shape, names, official_shape))
    return leaves


def _to_official(path, x, config):
    """Converts one of our arrays, of one block, to the official layout."""
    if path == "x_embedder/proj/kernel":  # a convolution in the official code
        p = config.patch_size
        return x.reshape(p, p, config.in_channels, -1).transpose(3, 2, 0, 1)  # (D, C, p, p)
    if _is_joined(path):  # (D, count, D) or (count, D)
        x = x.reshape(*x.shape[:-2], -1)
    return x.T if path.endswith("/kernel") else x


def _from_official(path, x, config):
    """The inverse of `_to_official`."""
    if path == "x_embedder/proj/kernel":
        return x.transpose(2, 3, 1, 0).reshape(-1, config.hidden_size)  # (p*p*C, D)
    x = x.T if path.endswith("/kernel") else x
    return x.reshape(*x.shape[:-1], -1, config.hidden_size) if _is_joined(path) else x


def _is_joined(path):
    """Returns True if our array has a separate axis for queries, keys and values."""
    return "/qkv/" in path or "/kv/" in path


def _position_table(config):
    rows, columns = (extent // config.patch_size for extent in config.input_size)
    return layers.position_table((rows, columns), config.hidden_size)[None]  # (1, T, D)


def exact_position_table(table, config):
    """Returns the table (1, T, D) that our model computes; UserError if `table` is another.

    `table` may be rounded to half precision.
    """
    exact = _position_table(config)
    if not _is_close(table, exact):
        rows, columns = (extent // config.patch_size for extent in config.input_size)
        raise UserError(f"pos_embed must be the sin-cos table of {rows} x {columns} patches")
    return exact


def to_float32(name, x):
    """Returns an array as float32; UserError if it holds no such numbers."""
    _check_dtype(name, x)
    with np.errstate(over="ignore"):  # a float64 above the range becomes infinite: refused below
        x = x.astype(np.float32, copy=False)
    check_finite(name, x)
    return x


def log_dtypes(state_dict):
    """Says how arrays of other types become float32."""
    for dtype in sorted({str(x.dtype) for x in state_dict.values()} - {"float32"}):
        how = "rounded" if dtype == str(FLOAT64) else "without loss"
        logging.info("arrays of %s become float32, %s", dtype, how)


def _check_dtype(name, x):
    allowed = (*FLOATS, FLOAT64)
    if x.dtype not in allowed:
        raise UserError(f"{name} must be {', '.join(map(str, allowed))}, got {x.dtype}")


def check_finite(name, x):
    """UserError if x contains NaN or infinity."""
    if not np.isfinite(x).all():
        raise UserError(f"{name} must be finite, got NaN or infinity")


def _is_close(table, expected):
    """Returns True if the tables agree, in float32 or rounded to half precision."""
    table = np.asarray(table, np.float32)
    rounded = (expected.astype(dtype).astype(np.float32) for dtype in FLOATS)
    return any(np.allclose(table, x, rtol=0, atol=1e-5) for x in rounded)


def _check_core(state_dict):
    """UserError if a name that every DiT has is missing; lists the names that no DiT has."""
    patterns = {f"{name}.{kind}" for name in MODULES.values() for kind in ("weight", "bias")}
    core = {name for name in patterns if "adaLN" not in name and "cross_attn" not in name}
    core = {name.replace("*", "0") for name in core} | {"pos_embed"}
    core.remove("y_embedder.embedding_table.bias")
    if any(name.endswith("encoder.conv_in.weight") for name in state_dict):
        raise UserError(
            "state dict must be a DiT, got an autoencoder: use dit-convert vae FILE OUT"
        )
    if any(name.startswith("transformer_blocks.") for name in state_dict):
        raise UserError(
            "state dict must have official names, got names of diffusers: use "
            "dit-convert from-diffusers DIR OUT"
        )
    if core - state_dict.keys():
        keys = {name: re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in state_dict}
        surplus = {name for name, key in keys.items() if key not in patterns | {"pos_embed"}}
        check_names("state dict", "a DiT", surplus | (core & state_dict.keys()), core)


def check_names(what, whose, names, expected):
    """UserError unless both sets are equal; lists up to `MAX_NAMES` missing and surplus names."""
    missing, surplus = expected - names, names - expected
    if missing or surplus:
        raise UserError(
            f"{what} must have the names of {whose}: "
            f"missing {_enumerate(missing)}; surplus {_enumerate(surplus)}"
        )


def _check_shapes(what, arrays, shapes):
    """UserError unless the arrays have exactly these names and shapes."""
    check_names(what, "the config", arrays.keys(), shapes.keys())
    for name, shape in shapes.items():
        actual = tuple(np.shape(arrays[name]))
        if actual != shape:
            raise UserError(f"{name} must have shape {shape}, got {actual}")


def _enumerate(names):
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(sorted(map(str, names))[:MAX_NAMES]) or "none") + more
