"""What a DiT is made of: everything that its parameters depend on."""

import math
from typing import NamedTuple

from dit_jax import settings
from dit_jax.models import fields
from dit_jax.models.fields import SIZES


class DiTConfig(NamedTuple):
    """The architecture of a `dit.DiT`."""

    input_size: tuple[int, ...]  # H, W; any number of axes
    patch_size: int
    in_channels: int
    depth: int
    hidden_size: int
    num_heads: int
    num_classes: int
    null_label: bool  # whether label `num_classes` exists and means "no label"
    learn_sigma: bool
    conditioning: str  # a name in `BLOCKS`
    conditions: tuple[str, ...] = ("t", "y")  # names in `conditions.of`
    velocity_head: bool = False  # whether it gives a velocity beside the average velocity
    norm: str = "layer"  # a name in `layers.NORMS`
    mlp: str = "gelu"  # a name in `layers.MLPS`
    position: str = "sincos"  # a name in `fields.PARTS`: how tokens know where they are
    qk_norm: bool = False  # RMSNorm of queries and keys
    bottleneck: int = 0  # numbers of a patch before D; 0: from p*p*C to D at once
    class_tokens: int = 0  # tokens of the label that join the others, without a position
    class_tokens_from: int = 0  # before this block
    head_depth: int = 0  # the last blocks that each of the two heads has for itself

    @classmethod
    def from_json(cls, fields):
        """The config of an `_asdict()` that went through JSON, which has no tuples."""
        names = ("input_size", "conditions")
        return cls(**fields | {name: tuple(fields[name]) for name in names if name in fields})

    def to_json(self):
        """The fields without those that have their default, so that older code can read them."""
        usual, none = self._field_defaults, object()
        return {name: x for name, x in self._asdict().items() if x != usual.get(name, none)}

    @property
    def token_grid(self):
        """How many tokens there are along each axis."""
        return tuple(extent // self.patch_size for extent in self.input_size)

    @property
    def num_tokens(self):
        return math.prod(self.token_grid)

    @property
    def patch_area(self):
        """How many positions a patch covers: p * p on a grid of two axes."""
        return self.patch_size ** len(self.input_size)

    @property
    def out_channels(self):
        """Of the prediction and, if there is one, of the variance's code or the velocity head."""
        return (1 + self.learn_sigma + self.velocity_head) * self.in_channels

    @property
    def head_channels(self):
        """Of a final layer, of which a model with head_depth has two."""
        return self.in_channels if self.head_depth else self.out_channels

    @property
    def num_blocks(self):
        """The length of the stack of blocks: `depth`, and behind them those of the velocity."""
        return self.depth + self.head_depth

    @property
    def rotated_grid(self):
        """The grid along whose axes attention rotates the tokens; None: it rotates none."""
        grids = {"sincos": None, "rope_1d": (self.num_tokens,)}
        return grids.get(self.position, self.token_grid)

    @property
    def parts(self):
        """{field: value} of what is not as in the paper's DiT."""
        defaults = self._field_defaults.items()
        return {name: getattr(self, name) for name, x in defaults if getattr(self, name) != x}

    @property
    def adaptive(self):
        """Whether the conditions enter through adaptive LayerNorm."""
        return self.conditioning.startswith("adaln")

    @property
    def in_context(self):
        """Whether the conditions are tokens beside those of the patches."""
        return self.conditioning.startswith("in_context")

    @property
    def name(self):
        """Size and patch, such as "XL/2"."""
        shape = (self.depth, self.hidden_size, self.num_heads)
        names = {shape: name for name, shape in SIZES.items()}
        size = names.get(shape, f"{self.depth} blocks of {self.hidden_size}")
        return f"{size}/{self.patch_size}"


def configure(size, patch_size, **more):
    """The DiTConfig of a size in `SIZES` and other fields of a `settings.Model`, else UserError."""
    model = settings.Model(size=size, patch_size=patch_size, **more)
    fields.check(model)
    given = {name: x for name, x in vars(model).items() if name != "size"}
    given |= dict(zip(("depth", "hidden_size", "num_heads"), fields.shape(model), strict=True))
    return DiTConfig.from_json(given)
