"""Parameters of a DiT <-> the state dict of the official PyTorch code, bit for bit.

A state dict is {official name: NumPy array}, PyTorch is not needed. Names and shapes are those of
https://github.com/facebookresearch/DiT; the designs that it never released (in-context,
cross-attention, adaLN) are named in the same way.
Shapes: D hidden size, C channels, p patch size, T tokens.
"""

from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

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
MAX_NAMES = 10  # in a message


def from_official(state_dict, config):
    """The parameters that an official state dict holds: a nested dict of float32 NumPy arrays.

    The position table is no parameter of ours: it is compared with the one that the model makes.
    """
    table = _position_table(config)  # (1, T, D)
    leaves = _leaves(config)
    shapes = {name: leaf.official_shape for leaf in leaves for name in leaf.names}
    _check_shapes("state_dict", state_dict, shapes | {"pos_embed": table.shape})
    arrays = {name: _as_float32(name, x) for name, x in state_dict.items()}
    if not np.allclose(arrays["pos_embed"], table, rtol=0, atol=1e-5):
        rows, columns = (extent // config.patch_size for extent in config.input_size)
        raise ValueError(f"pos_embed must be the sin-cos table of {rows} x {columns} patches")
    params = {}
    for leaf in leaves:
        parts = [_from_official(leaf.path, arrays[name], config) for name in leaf.names]
        params[leaf.path] = np.stack(parts) if leaf.stacked else np.array(parts[0], order="C")
    return traverse_util.unflatten_dict(params, sep="/")


def to_official(params, config):
    """The official state dict of our parameters: {name: NumPy array}, the position table too."""
    leaves = _leaves(config)
    params = traverse_util.flatten_dict(params, sep="/")
    _check_shapes("params", params, {leaf.path: leaf.shape for leaf in leaves})
    state_dict = {"pos_embed": _position_table(config)}
    for leaf in leaves:
        x = _as_float32(leaf.path, params[leaf.path])
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
    return x.T if path.endswith("/kernel") else x


def _from_official(path, x, config):
    """The inverse of `_to_official`."""
    if path == "x_embedder/proj/kernel":
        return x.transpose(2, 3, 1, 0).reshape(-1, config.hidden_size)  # (p*p*C, D)
    return x.T if path.endswith("/kernel") else x


def _position_table(config):
    rows, columns = (extent // config.patch_size for extent in config.input_size)
    return layers.position_table(rows, columns, config.hidden_size)[None]  # (1, T, D)


def _as_float32(name, x):
    x = np.asarray(x)
    if not np.can_cast(x.dtype, np.float32):
        raise ValueError(f"{name} must be float32 or narrower, got {x.dtype}")
    return x.astype(np.float32, copy=False)


def _check_shapes(what, arrays, shapes):
    """ValueError unless the arrays have just these names and shapes."""
    missing, surplus = shapes.keys() - arrays.keys(), arrays.keys() - shapes.keys()
    if missing or surplus:
        raise ValueError(
            f"{what} must have the names of the config: "
            f"missing {_enumerate(missing)}; surplus {_enumerate(surplus)}"
        )
    for name, shape in shapes.items():
        actual = tuple(np.shape(arrays[name]))
        if actual != shape:
            raise ValueError(f"{name} must have shape {shape}, got {actual}")


def _enumerate(names):
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(sorted(map(str, names))[:MAX_NAMES]) or "none") + more
