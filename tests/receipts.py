"""Receipts of dit-evaluate and scaling studies made from numbers."""

import json

from dit_jax.evals import scaling

FID = "FID-50K (ADM)"
PAPER = {  # table 4 and table 1 of appendix: Gflops, FID-50K after 400K steps
    **{"S/8": (0.36, 153.60), "S/4": (1.41, 100.41), "S/2": (6.06, 68.40)},
    **{"B/8": (1.42, 122.74), "B/4": (5.56, 68.38), "B/2": (23.01, 43.47)},
    **{"L/8": (5.01, 118.87), "L/4": (19.70, 45.64), "L/2": (80.71, 23.33)},
    **{"XL/8": (7.39, 106.41), "XL/4": (29.05, 43.01), "XL/2": (118.64, 19.47)},
}
STEPS = (100_000, 200_000, 400_000)


def receipt(
    model="Ti/4", *, gflops=1.0, value=10.0, deviation=None, step=400, score=FID, **changes
):
    """A receipt; changes: of its samples."""
    samples = {"path": f"runs/{model}", "step": step, "weights": "ema", "count": 50_000}
    samples["sampling"] = {"sampler": "ddim", "num_steps": "ddim25", "cfg_scale": 1.0}
    return {
        "samples": samples | changes,
        "model": {
            **{"name": f"DiT-{model}", "num_params": int(1e6 * gflops)},
            **{"gflops": gflops, "passes": 25},
        },
        "network": {"network": "inception-2015-12-05"},
        "reference": {"sha256": "12ab"},
        "scores": {score: {"value": value, "deviation": deviation}},
    }


def run(model, design="adaln_zero", *, gflops, value, steps=STEPS):
    """A scaling.Run whose score falls to a value at its last step."""
    size, patch = model.split("/")
    scores = [value * (step / steps[-1]) ** -0.4 for step in steps]
    receipts = [
        receipt(model, gflops=gflops, value=y, deviation=0.02 * y, step=step)
        for step, y in zip(steps, scores, strict=True)
    ]
    losses = [0.15 + 0.1 / (1 + i) / gflops**0.1 for i in range(50)]
    at = [steps[-1] * (i + 1) // 50 for i in range(50)]
    return scaling.Run(size, int(patch), design, 256, receipts, (at, losses))


def runs_of_paper():
    """The paper's twelve models, by Gflops."""
    runs = [run(model, gflops=gflops, value=fid) for model, (gflops, fid) in PAPER.items()]
    return sorted(runs, key=lambda each: each.gflops)


def write(path, receipt):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(receipt))
