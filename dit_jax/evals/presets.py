"""The settings of the paper's tables, by name, and what the tables say.

Peebles & Xie 2023, tables 2, 3 and 4. They decode with Stable Diffusion's ft-EMA (tables 2 and 3)
or ft-MSE (table 4), and draw 50,000 labels at random.
"""

from typing import NamedTuple

from dit_jax.errors import UserError

COUNT = 50_000
SCORES = ("FID-50K", "sFID-50K", "Inception Score", "precision", "recall")


class Preset(NamedTuple):
    """How a table was made, and its scores: of DiT-XL/2, or {model: FID-50K}."""

    table: str
    cfg_scale: float
    size: int  # of the images, in pixels
    decoder: str
    scores: dict

    @property
    def sampling(self):
        return {
            "sampler": "ddpm",
            "num_steps": "250",
            "spacing": "auto",
            "eta": 0.0,
            "clip_x0": False,
            "cfg_scale": self.cfg_scale,
            "cfg_schedule": "constant",
            "cfg_channels": 3,
            "cfg_interval": (0, 999),
        }


def _table(*values):
    return dict(zip(SCORES, values, strict=True))


PRESETS = {
    "paper-256": Preset("table 2", 1.5, 256, "ft-EMA", _table(2.27, 4.60, 278.24, 0.83, 0.57)),
    "paper-256-nocfg": Preset(
        "table 2, without guidance", 1.0, 256, "ft-EMA", _table(9.62, 6.85, 121.50, 0.67, 0.67)
    ),
    "paper-512": Preset("table 3", 1.5, 512, "ft-EMA", _table(3.04, 5.02, 240.82, 0.84, 0.54)),
    "scaling-400k": Preset(
        "table 4, at 400,000 steps without guidance",
        1.0,
        256,
        "ft-MSE",
        {
            **{"S/8": 153.60, "S/4": 100.41, "S/2": 68.40},
            **{"B/8": 122.74, "B/4": 68.38, "B/2": 43.47},
            **{"L/8": 118.87, "L/4": 45.64, "L/2": 23.33},
            **{"XL/8": 106.41, "XL/4": 43.01, "XL/2": 19.47},
        },
    ),
}


def find(name):
    """The Preset of a name; UserError for another."""
    if name not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def published(name, model):
    """{score: what the paper printed} for a preset and a model such as "XL/2"; {} if nothing."""
    scores = PRESETS[name].scores
    if name != "scaling-400k":
        return scores if model == "XL/2" else {}
    return {"FID-50K": scores[model]} if model in scores else {}


def title(name, *, sampling, count, size):
    """The preset's name if these settings are its own; else what differs from it as well.

    UserError for images of another size, which no setting can repeat.
    """
    preset = find(name)
    if size != (preset.size, preset.size):
        text = f"{preset.size} x {preset.size}"
        raise UserError(f"preset {name} must be for images of {text}, got {size[0]} x {size[1]}")
    wanted = preset.sampling | {"num_samples": COUNT}
    got = {key: sampling[key] for key in preset.sampling} | {"num_samples": count}
    got["cfg_interval"] = tuple(got["cfg_interval"])
    changed = [f"{key} {got[key]}" for key in wanted if got[key] != wanted[key]]
    return f"{name}, but {', '.join(changed)}" if changed else name
