"""Fits the parameters of one DiT to another, so that training can start from them.

The size, the conditioning, the parts and the channels must agree. The label table takes rows and
grows or shrinks; the patch embedding and the final layer are resized. A new condition starts at 0.
The position table is computed and no parameter, so any input size fits.

Shapes: L labels, p and q old and new patch size, C channels, D hidden size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.machine import words

SIZE = ("depth", "hidden_size", "num_heads")
PARTS = (
    *("norm", "mlp", "position", "qk_norm", "bottleneck", "class_tokens", "class_tokens_from"),
    "head_depth",
)


def check(source, target):
    """UserError if the parameters of one DiTConfig cannot be fitted to the other."""
    old, new = ([getattr(config, name) for name in SIZE] for config in (source, target))
    if old != new:
        raise UserError(f"model.size must have {_size(old)} as in init_from, got {_size(new)}")
    for name in ("conditioning", "in_channels", *PARTS):
        old, new = getattr(source, name), getattr(target, name)
        if old != new:
            raise UserError(f"model.{name} must be {old} as in init_from, got {new}")
    for name, of, is_learned in (  # what the learned tokens and the learned table depend on
        ("conditions", "conditions", target.conditioning == "in_context_zero"),
        ("input_size", "token_grid", target.position == "learned_rope"),
    ):
        if is_learned and getattr(source, of) != getattr(target, of):
            old, new = getattr(source, name), getattr(target, name)
            raise UserError(f"model.{name} must be {old} as in init_from, got {new}")
    axes = len(source.input_size)
    if axes != len(target.input_size):
        raise UserError(
            f"model.input_size must have {axes} axes as in init_from, got {target.input_size}"
        )


def _size(numbers):
    return ", ".join(f"{name} {number}" for name, number in zip(SIZE, numbers, strict=True))


def adapt(params, source, target, rows):
    """The parameters of the DiTConfig `target`, from those of `source`; can be jitted.

    rows: for each class of the target the class of the source whose embedding it takes, or None.
    """
    first = "proj1" if source.bottleneck else "proj"
    left = {f"{name}_embedder" for name in source.conditions if name not in target.conditions}
    new = [name for name in target.conditions if name not in source.conditions]
    kept = {name: each for name, each in params.items() if name not in left}
    like = params.get("t_embedder", params.get("h_embedder"))
    kept |= {f"{name}_embedder": _new_embedder(like) for name in new}
    embedder = params["x_embedder"]
    kept["x_embedder"] = embedder | {first: _embed_patches(embedder[first], source, target)}
    kept["y_embedder"] = _label_embedder(params["y_embedder"], source, target, rows)
    for name in ("final_layer", "velocity_layer"):
        if name in kept:
            linear = _predict_patches(kept[name]["linear"], source, target)
            kept[name] = kept[name] | {"linear": linear}
    return kept


def _new_embedder(embedder):
    """The embedder of a new condition: a copy of the one given, with zeros in its last layer."""
    return embedder | {"fc2": jax.tree.map(jnp.zeros_like, embedder["fc2"])}


def _label_embedder(embedder, source, target, rows):
    if "tokens" in embedder:
        return embedder | {"embedder": _label_embedder(embedder["embedder"], source, target, rows)}
    return {"embedding_table": _label_table(embedder["embedding_table"], source, target, rows)}


def _label_table(table, source, target, rows):
    """Takes the rows, and starts the others and the null label from the source's null label.

    A source without a null label has the mean of its rows instead.
    """
    old = table["embedding"]  # (L, D)
    null = old[-1] if source.null_label else old.mean(axis=0)
    index = [len(old) if row is None else row for row in rows] + [len(old)] * target.null_label
    return {"embedding": jnp.concatenate([old, null[None]])[np.array(index)]}


def _embed_patches(linear, source, target):
    """FlexiViT's resize (Beyer et al. 2023, eq. 5): of patches x enlarged to B x, the same tokens.

    The kernel w becomes pinv(B^T) w; where patches shrink, the tokens are as close as possible.
    """
    p, q, rank = source.patch_size, target.patch_size, len(source.input_size)
    if p == q:
        return linear
    kernel = linear["kernel"]
    matrix = np.linalg.pinv(resize_matrix(p, q).T)  # (q, p)
    patch = kernel.reshape(*(p,) * rank, -1, kernel.shape[-1])  # (p, p, C, D)
    patch = _along(matrix, patch, range(rank))  # (q, q, C, D)
    return linear | {"kernel": patch.reshape(-1, kernel.shape[-1])}


def _predict_patches(linear, source, target):
    """The linear map of a final layer: its patches are resized, a new second half starts at 0."""
    p, q, rank = source.patch_size, target.patch_size, len(source.input_size)
    matrix, channels = resize_matrix(p, q), target.head_channels
    second = [(config.learn_sigma, config.velocity_head) for config in (source, target)]
    kept = channels if second[0] == second[1] else source.in_channels

    def fit(x):
        """(..., p*p*C) -> (..., q*q*C)"""
        axes = range(x.ndim - 1, x.ndim - 1 + rank)
        patch = x.reshape(*x.shape[:-1], *(p,) * rank, -1)  # (..., p, p, C)
        if p != q:
            patch = _along(matrix, patch, axes)  # (..., q, q, C)
        patch = patch[..., :kept]
        patch = jnp.pad(patch, [(0, 0)] * (patch.ndim - 1) + [(0, channels - kept)])
        return patch.reshape(*x.shape[:-1], -1)

    return {name: fit(x) for name, x in linear.items()}


def _along(matrix, x, axes):
    """The matrix (q, p) applied to each of these axes of x, all of length p."""
    matrix = np.float32(matrix)
    for axis in axes:
        x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision="highest"), 0, axis)
    return x


def resize_matrix(old, new):
    """Linear interpolation along an axis, averaging where it shrinks: (new, old), float64.

    The same as `jax.image.resize`.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    distances = np.abs(centers[:, None] - np.arange(old))
    weights = np.maximum(0, 1 - distances / max(1, old / new))
    return weights / weights.sum(axis=1, keepdims=True)


def describe(source, target, rows):
    """What `adapt` takes and what it changes, as lines of text."""
    taken = sum(row is not None for row in rows)
    left, new = source.num_classes - taken, len(rows) - taken
    changed = []
    if list(rows) != list(range(source.num_classes)) or source.null_label != target.null_label:
        start = "the null label" if source.null_label else "the mean of all labels"
        changed.append(
            f"label table: {words.count(taken, 'label')} taken, {left} left out, {new} new from "
            f"{start}"
        )
    if source.patch_size != target.patch_size:
        changed.append(
            f"patch embedding and final layer: resized from patch size {source.patch_size} to "
            f"{target.patch_size}"
        )
    start = "without effect" if target.adaptive else "as a token of zeros"
    for name in (each for each in target.conditions if each not in source.conditions):
        changed.append(f"condition {name}: new, starts {start}")
    for name in (each for each in source.conditions if each not in target.conditions):
        changed.append(f"condition {name}: left out")
    if source.velocity_head != target.velocity_head:
        word = "new, starts at 0" if target.velocity_head else "left out"
        changed.append(f"velocity head in the final layer: {word}")
    if source.learn_sigma != target.learn_sigma:
        word = "new, starts at 0" if target.learn_sigma else "left out"
        changed.append(f"variance in the final layer: {word}")
    if source.token_grid != target.token_grid:
        grids = (" x ".join(map(str, config.token_grid)) for config in (source, target))
        changed.append("position table: computed anew, from {} to {} tokens".format(*grids))
    rest = "everything else" if changed else "everything"
    return [*changed, f"{rest}: taken as it is"]
