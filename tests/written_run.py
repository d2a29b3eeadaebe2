"""Writes the files of a run by hand: config, record, history, samples, receipts."""

import json

import numpy as np
from PIL import Image

from dit_jax.checkpoint import peek
from dit_jax.runs import history

CONFIG = {
    "model": {"size": "Ti", "patch_size": 4, "input_size": [8, 8], "in_channels": 1},
    "data": {"source": "digits", "space": "pixels"},
    "train": {"batch_size": 32},
    "run": {"total_steps": 100, "num_samples": 10},
}
CONFIG["model"]["num_classes"] = 10
STARTED = {"event": "started", "step": 0, "devices": "8 x TPU v4", "num_devices": 8}


def write(path, steps=range(10, 101, 10), *, events=(), config=CONFIG, **fields):
    """Writes config.json, metrics.jsonl and history.jsonl; returns the path. fields: of a record.

    A step takes 0.5 s and 4 TFLOP.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(record(step) | fields) for step in steps]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if events:
        lines = [
            json.dumps({"time": f"2026-11-28T08:00:{i:02}+00:00", **x})
            for i, x in enumerate(events)
        ]
        (path / history.FILE).write_text("".join(f"{line}\n" for line in lines))
    return path


def record(step):
    return {
        **{"step": step, "loss": 1 / step, "mse": 0.9 / step, "vb": 0.1 / step, "grad_norm": 1.0},
        **{"data_wait": 0.1, "images_per_second": 64.0, "model_tflops_per_second": 8.0},
    }


def saved(path, *steps, **meta):
    """Makes folders of steps that look complete, without arrays; meta: what each says of itself."""
    for step in steps:
        folder = path / "checkpoints" / str(step)
        (folder / peek.FILE).parent.mkdir(parents=True)
        (folder / "_CHECKPOINT_METADATA").write_text("{}")
        (folder / peek.FILE).write_text(json.dumps(meta))


def samples(path, *steps, size=(40, 20)):
    """Writes pictures of noise, which no PNG compresses."""
    (path / "samples").mkdir()
    for step in steps:
        noise = np.random.default_rng(step).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(path / "samples" / f"{step:07d}.png")
