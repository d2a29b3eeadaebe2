"""Checks of a model's fields, and of those of its arithmetic, that need no jax."""

from dit_jax.errors import UserError

SIZES = {  # depth, hidden size, heads: table 1 of the paper; Pi to XS are ours, for tiny images
    "Pi": (2, 64, 2),
    "Na": (3, 96, 3),
    "Ti": (4, 128, 4),
    "XS": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),  # of MeanFlow
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
CONDITIONS = ("t", "h", "omega", "t_min", "t_max", "y")  # as `conditions.of`
DESIGNS = ("in_context", "cross_attention", "adaln", "adaln_zero")  # as `blocks.BLOCKS`
ARITHMETIC = {  # as `layers.DTYPES`, `attention.ATTENTIONS` and `layers.REMAT_POLICIES`
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
    "remat": ("none", "dots", "full"),
}


def check(
    *,
    size,
    patch_size,
    input_size,
    in_channels,
    num_classes,
    null_label,
    learn_sigma,
    conditioning,
    conditions,
    velocity_head,
):
    """UserError if the fields of a `settings.Model` do not fit together."""
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if conditioning not in DESIGNS:
        raise UserError(f"conditioning must be one of {', '.join(DESIGNS)}, got {conditioning!r}")
    if not set(conditions) <= set(CONDITIONS) or len(set(conditions)) < len(conditions):
        raise UserError(
            f"conditions must be different names of {', '.join(CONDITIONS)}, got {conditions}"
        )
    if velocity_head and learn_sigma:
        raise UserError(
            "velocity_head must be false for a model that learns the variance, got true"
        )
    if patch_size < 1:
        raise UserError(f"patch_size must be at least 1, got {patch_size}")
    if not _is_size(input_size):
        raise UserError(f"input_size must be whole numbers of at least 1, got {input_size!r}")
    if any(extent % patch_size for extent in input_size):
        raise UserError(
            f"input_size must be divisible by patch_size {patch_size}, got {tuple(input_size)}"
        )
    for name, value in {"in_channels": in_channels, "num_classes": num_classes}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def _is_size(size):
    extents = size if isinstance(size, (tuple, list)) else ()
    return len(extents) > 0 and all(isinstance(x, int) and x >= 1 for x in extents)


def check_arithmetic(*, automatic=(), **chosen):
    """UserError for a name that is not in ARITHMETIC; automatic: fields that may be "auto"."""
    for name, value in chosen.items():
        names = (*(["auto"] if name in automatic else []), *ARITHMETIC[name])
        if value not in names:
            raise UserError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_forward(attention):
    """UserError if a network with this attention cannot be differentiated forward."""
    if attention == "cudnn":
        raise UserError("attention must be auto or xla for a loss with a jvp, got cudnn")


def check_heads(size, tensor):
    """UserError unless `mesh.tensor` devices can share the heads of a model of this size."""
    heads = SIZES[size][2]
    if heads % tensor:
        raise UserError(f"mesh.tensor must divide the {heads} heads of {size}, got {tensor}")


def vae_downsampling(channels):
    """The factor by which latents are smaller than images, from the channels of a VAEConfig."""
    return 2 ** (len(channels) - 1)
