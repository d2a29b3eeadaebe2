"""Checks of a model's fields, and of those of its arithmetic, that need no jax."""

from dit_jax.errors import UserError

# depth, hidden size, heads: table 1 of the paper. Pi to XS are ours, for tiny images. H and G are
# those of JiT (Li & He 2025, https://arxiv.org/abs/2511.13720).
SIZES = {
    "Pi": (2, 64, 2),
    "Na": (3, 96, 3),
    "Ti": (4, 128, 4),
    "XS": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),  # of MeanFlow
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
    "G": (40, 1664, 16),
}
CONDITIONS = ("t", "h", "omega", "t_min", "t_max", "y")  # as `conditions.of`
# As `blocks.BLOCKS`.
DESIGNS = ("in_context", "in_context_zero", "cross_attention", "adaln", "adaln_zero")
PARTS = {  # of a block, as `layers.NORMS`, `layers.MLPS` and `attention.Attention`
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "swiglu"),
    "position": ("sincos", "rope", "learned_rope", "rope_1d"),
}
LEAST = {"in_channels": 1, "num_classes": 1}
LEAST |= {"bottleneck": 0, "class_tokens": 0, "class_tokens_from": 0, "depth": 0, "head_depth": 0}
ARITHMETIC = {  # as `layers.DTYPES`, `attention.ATTENTIONS` and `layers.REMAT_POLICIES`
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn"),
    "remat": ("none", "dots", "full"),
}


def check(model):
    """UserError if the fields of a `settings.Model` do not fit together."""
    size, patch_size, input_size = model.size, model.patch_size, model.input_size
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    for name, names in ({"conditioning": DESIGNS} | PARTS).items():
        if (value := getattr(model, name)) not in names:
            raise UserError(f"{name} must be one of {', '.join(names)}, got {value!r}")
    if not set(model.conditions) <= set(CONDITIONS) or len(set(model.conditions)) < len(
        model.conditions
    ):
        raise UserError(
            f"conditions must be different names of {', '.join(CONDITIONS)}, got {model.conditions}"
        )
    if model.velocity_head and model.learn_sigma:
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
    for name, least in LEAST.items():
        if (value := getattr(model, name)) < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    _check_parts(model)
    _check_head(model)


def shape(model):
    """(depth, hidden size, heads) of a `settings.Model`."""
    depth, *others = SIZES[model.size]
    return model.depth or depth, *others


def _check_head(model):
    """UserError if `head_depth` does not fit the other fields."""
    depth, _, _ = shape(model)
    for when, is_wrong in (
        ("without velocity_head", not model.velocity_head),
        ("with class_tokens", model.class_tokens),
    ):
        if model.head_depth and is_wrong:
            raise UserError(f"head_depth must be 0 {when}, got {model.head_depth}")
    if model.head_depth >= depth:
        raise UserError(f"head_depth must be below the {depth} blocks, got {model.head_depth}")


def _check_parts(model):
    """UserError if a part has nothing to work on."""
    depth, hidden_size, num_heads = shape(model)
    first, axes = model.class_tokens_from, len(model.input_size)
    if first and not model.class_tokens:
        raise UserError(f"class_tokens_from must be 0 without class_tokens, got {first}")
    if first >= depth:
        raise UserError(f"class_tokens_from must be below the {depth} blocks, got {first}")
    if model.position in ("rope", "learned_rope") and hidden_size // num_heads < 2 * axes:
        raise UserError(
            f"position must be sincos for {axes} axes and heads of {hidden_size // num_heads}, "
            f"too few to rotate, got {model.position}"
        )
    if model.position == "rope_1d" and model.class_tokens:
        raise UserError(f"class_tokens must be 0 with rope_1d, got {model.class_tokens}")


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


def check_tensor(model, tensor):
    """UserError unless `mesh.tensor` devices can share the heads and the MLP of a model."""
    _, hidden_size, heads = SIZES[model.size]
    if heads % tensor:
        raise UserError(f"mesh.tensor must divide the {heads} heads of {model.size}, got {tensor}")
    width = mlp_width(model.mlp, hidden_size)
    if width % tensor:
        raise UserError(
            f"mesh.tensor must divide the width {width} of {model.mlp} in {model.size}, "
            f"got {tensor}"
        )


def mlp_width(mlp, hidden_size):
    """The hidden width F of an MLP by its name; swiglu, with three matrices, has 2/3 of it."""
    return 4 * hidden_size if mlp == "gelu" else 8 * hidden_size // 3


def vae_downsampling(channels):
    """The factor by which latents are smaller than images, from the channels of a VAEConfig."""
    return 2 ** (len(channels) - 1)
