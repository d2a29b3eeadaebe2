"""Parameters of a DiT <-> the state dict of the official PyTorch code, bit for bit.

A state dict is {official name: NumPy array}, PyTorch is not needed. Names and shapes are those of
https://github.com/facebookresearch/DiT; the designs that it never released (in-context,
cross-attention, adaLN) are named in the same way.
Shapes: D hidden size, C channels, p patch size, T tokens.
"""

import re
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dit_jax.errors import UserError
from dit_jax.models import dit, layers

MODULES = {  # ours: the official module; * is the block's number, our leading axis
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
RANKS = {  # axes of what the config is read off
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
FLOATS = tuple(map(jax.numpy.dtype, ("float32", "float16", "bfloat16")))  # that float32 holds
MAX_NAMES = 10  # in a message


def read_config(state_dict, *, num_heads=0, num_classes=0):
    """The DiTConfig that the shapes of an official state dict tell.

    The number of heads leaves no trace: it is that of the size in `SIZES` with this depth and
    hidden size, or num_heads. The label table has a row for the null label unless num_classes, if
    given, says otherwise.
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
            "which are of no size of the paper"
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
    plain = patch_size**2 * in_channels
    if outputs not in (plain, 2 * plain):
        raise UserError(
            f"final_layer.linear.weight must have {plain} or, with a learned variance, "
            f"{2 * plain} rows for patch {patch_size} and {in_channels} channels, got {outputs}"
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
        learn_sigma=outputs == 2 * plain,
        conditioning=_conditioning(state_dict, hidden_size),
    )


def _read_patches(state_dict):
    """D, C, p of the arrays that every DiT has; UserError where one has no such shape."""
    for name, rank in RANKS.items():
        if np.ndim(state_dict[name]) != rank:
            shape = np.shape(state_dict[name])
            raise UserError(f"{name} must have {rank} axes, got shape {shape}")
        if 0 in np.shape(state_dict[name]):
            raise UserError(f"{name} must not be empty, got shape {np.shape(state_dict[name])}")
    hidden_size, in_channels, *patch = np.shape(state_dict["x_embedder.proj.weight"])
    if patch[0] != patch[1]:
        raise UserError(f"x_embedder.proj.weight must be of square patches, got {patch}")
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
    """H, W of the grid, square if it can be, whose position table this is. table (1, T, D)."""
    table = np.asarray(table, np.float32)
    _, tokens, hidden_size = table.shape
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for rows, columns in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if _is_close(table, layers.position_table((rows, columns), hidden_size)[None]):
            return rows * patch_size, columns * patch_size
    raise UserError(f"pos_embed must be the sin-cos table of a grid of {tokens} patches")


def from_official(state_dict, config):
    """The parameters that an official state dict holds: a nested dict of float32 NumPy arrays.

    Takes the arrays out of the dict one by one, so that a large one is not in memory twice. The
    position table is no parameter of ours: it is compared with the one that the model makes.
    """
    table = _position_table(config)  # (1, T, D)
    leaves = _leaves(config)
    shapes = {name: leaf.official_shape for leaf in leaves for name in leaf.names}
    _check_shapes("state dict", state_dict, shapes | {"pos_embed": table.shape})
    for name, x in state_dict.items():
        if x.dtype not in FLOATS:
            raise UserError(f"{name} must be of {', '.join(map(str, FLOATS))}, got {x.dtype}")
    if not _is_close(state_dict.pop("pos_embed"), table):
        rows, columns = (extent // config.patch_size for extent in config.input_size)
        raise UserError(f"pos_embed must be the sin-cos table of {rows} x {columns} patches")
    params = {}
    for leaf in leaves:
        parts = []
        for name in leaf.names:
            check_finite(name, state_dict[name])
            parts.append(_from_official(leaf.path, state_dict.pop(name), config))
        x = np.stack(parts) if leaf.stacked else np.array(parts[0], order="C")
        params[leaf.path] = x.astype(np.float32, copy=False)
    return traverse_util.unflatten_dict(params, sep="/")


def to_official(params, config):
    """The official state dict of our parameters: {name: NumPy array}, the position table too.

    Takes the arrays out of params one by one, so that a large one is not in memory twice.
    """
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


class _Leaf(NamedTuple):
    """One array of our parameters and the official ones in it."""

    path: str
    shape: tuple[int, ...]
    names: list[str]  # one for each block if stacked, else one
    official_shape: tuple[int, ...]  # of each of them

    @property
    def stacked(self):
        return self.path.startswith("blocks/")


def _leaves(config):
    """The `_Leaf`s of a config."""
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
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
    """One array of ours, of one block, in the official layout."""
    if path == "x_embedder/proj/kernel":  # a convolution there
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
    """Whether queries, keys and values have an axis of their own in our array."""
    return "/qkv/" in path or "/kv/" in path


def _position_table(config):
    rows, columns = (extent // config.patch_size for extent in config.input_size)
    return layers.position_table((rows, columns), config.hidden_size)[None]  # (1, T, D)


def check_finite(name, x):
    if not np.isfinite(x).all():
        raise UserError(f"{name} must be finite, got NaN or infinity in it")


def _is_close(table, expected):
    """Whether a position table is the expected one, in float32 or rounded to half precision."""
    table = np.asarray(table, np.float32)
    rounded = (expected.astype(dtype).astype(np.float32) for dtype in FLOATS)
    return any(np.allclose(table, x, rtol=0, atol=1e-5) for x in rounded)


def _check_core(state_dict):
    """UserError where names that every DiT has are missing, with those that no DiT has."""
    patterns = {f"{name}.{kind}" for name in MODULES.values() for kind in ("weight", "bias")}
    core = {name for name in patterns if "adaLN" not in name and "cross_attn" not in name}
    core = {name.replace("*", "0") for name in core} | {"pos_embed"}
    core.remove("y_embedder.embedding_table.bias")
    if any(name.startswith("transformer_blocks.") for name in state_dict):
        raise UserError("state dict must be official, got diffusers' names: from-diffusers DIR OUT")
    if core - state_dict.keys():
        known = {name: re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in state_dict}
        strange = {name for name, key in known.items() if key not in patterns | {"pos_embed"}}
        check_names("state dict", "a DiT", strange | (core & state_dict.keys()), core)


def check_names(what, whose, names, expected):
    """UserError unless both sets of names are the same, with at most ten of those that are not."""
    missing, surplus = expected - names, names - expected
    if missing or surplus:
        raise UserError(
            f"{what} must have the names of {whose}: "
            f"missing {_enumerate(missing)}; surplus {_enumerate(surplus)}"
        )


def _check_shapes(what, arrays, shapes):
    """UserError unless the arrays have just these names and shapes."""
    check_names(what, "the config", arrays.keys(), shapes.keys())
    for name, shape in shapes.items():
        actual = tuple(np.shape(arrays[name]))
        if actual != shape:
            raise UserError(f"{name} must have shape {shape}, got {actual}")


def _enumerate(names):
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(sorted(map(str, names))[:MAX_NAMES]) or "none") + more
