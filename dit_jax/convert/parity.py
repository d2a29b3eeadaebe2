"""The parity check: runs both sides of a conversion on the same inputs and measures the error.

A side is a function (x, t, y) -> (N, H, W, out_channels). It loads its weights for the call only,
so that a large model is never in memory twice. The absolute error is the largest absolute
difference of the outputs; the relative error divides it by the largest expected output.
Shapes: N examples, one for each of `STEPS` or of `TIMES`; H W grid, C channels.
"""

from pathlib import Path

import jax
import numpy as np

from dit_jax.convert import files, native, torch_dit, torch_inception, torch_vae
from dit_jax.diffusion.fields import is_path
from dit_jax.models import dit, inception, vae
from dit_jax.sampling import autoencoder, extractor

STEPS = (0, 500, 999)
TIMES = (0.0, 0.5, 1.0)  # of a SiT, as its network gets them
TOLERANCE = 2e-5  # of the relative error: two libraries round float32 sums differently
VAE_TOLERANCES = {"moments": 1e-5, "decoded": 5e-5}  # the decoder has longer sums
INCEPTION_TOLERANCE = 1e-4  # of the features; 94 convolutions
TINY = np.finfo(np.float32).tiny  # avoids a division by 0


def times(diffusion):
    """Returns the times at which a model of a `settings.Diffusion` is compared."""
    return TIMES if is_path(diffusion) else STEPS


def inputs(model, times=STEPS):
    """Returns x (N, H, W, C), t (N,), y (N,): normal noise, times, labels and the null label."""
    rng = np.random.default_rng(0)
    shape = (len(times), *model.input_size, model.in_channels)
    y = rng.integers(model.num_classes, size=len(times))
    y[-1] = model.num_classes - 1 + model.null_label
    t = np.array(times, np.int32 if times == STEPS else np.float32)
    return rng.standard_normal(shape, np.float32), t, y.astype(np.int32)


def ours(path, weights="ema"):
    """The side of a dit_jax checkpoint."""

    def run(x, t, y):
        model, _, params = native.read(path, weights)
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(dit.make_apply(model))(params, x, t=t, y=y))

    return run


def official(path, model, weights="ema"):
    """The side of an official state dict, computed by `torch_model`.

    It computes in float32, with the exact position table where that of the file is rounded.
    """

    def run(x, t, y):
        torch = files.require("torch")
        from dit_jax.convert import torch_model  # imports torch

        state_dict = files.read_state_dict(path, weights)
        with torch.device("meta"):
            net = torch_model.DiT(**torch_dit.fields(model))
        table = torch_dit.exact_position_table(state_dict["pos_embed"], model)
        net.load_state_dict(to_tensors(state_dict | {"pos_embed": table}), assign=True)
        return run_torch(net, x, t, y)

    return run


def diffusers(path, *, plain=False):
    """The side of a diffusers folder. plain: without the corrections of `match_transformer`."""

    def run(x, t, y):
        models = files.require("diffusers.models")
        from dit_jax.convert import diffusers_pipeline  # imports diffusers

        transformer = Path(path) / "transformer"
        folder = transformer if transformer.is_dir() else Path(path)
        half = ".fp16." in files.diffusers_weights(folder).name
        net = models.DiTTransformer2DModel.from_pretrained(
            folder, low_cpu_mem_usage=False, variant="fp16" if half else None
        )
        if not plain:
            diffusers_pipeline.match_transformer(net)
        return run_torch(diffusers_pipeline.AsDiT(net), x, t, y)

    return run


def to_tensors(state_dict):
    """Returns {name: float32 tensor}; NumPy's bfloat16 is unknown to PyTorch."""
    torch = files.require("torch")
    return {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in state_dict.items()}


def run_torch(net, x, t, y):
    """Runs a channels-first PyTorch model in evaluation mode on channels-last x."""
    torch = files.require("torch")
    t = torch.from_numpy(t)
    with torch.no_grad():
        out = net.eval()(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            t if t.is_floating_point() else t.long(),
            torch.from_numpy(y).long(),
        )
    return out.numpy().transpose(0, 2, 3, 1)


def measure(expected, actual, times=STEPS):
    """Returns the report: errors of `actual` against `expected`, for each time and in total.

    An error that is NaN or infinite is reported as None, because JSON has no such number.
    """
    with np.errstate(invalid="ignore"):
        absolute = np.abs(actual - expected).max(axis=(1, 2, 3))  # (N,)
        largest = np.abs(expected).max(axis=(1, 2, 3))
        relative = absolute / np.maximum(largest, TINY)
    steps = [
        {"t": t, "absolute": _finite(absolute[i]), "relative": _finite(relative[i])}
        for i, t in enumerate(times)
    ]
    return {
        "tolerance": TOLERANCE,
        "absolute": _finite(absolute.max()),
        "relative": _finite(relative.max()),
        "passed": bool(relative.max() <= TOLERANCE),  # False if it is NaN
        "steps": steps,
    }


def autoencoders(source, path):
    """Returns the report of a diffusers autoencoder (folder or file) and of ours at `path`.

    Both encode a random image of 64 x 96 and decode the mean of its latents.
    """
    config, state_dict = torch_vae.read(source)
    size = (64, 96, config.in_channels)
    x = np.random.default_rng(0).uniform(-1, 1, (1, *size)).astype(np.float32)
    theirs = _run_diffusers(state_dict, config, x)
    model = autoencoder.load(path)
    encode, decode = (jax.jit(run) for run in vae.make_apply(config))
    ours = encode(model.params, x), decode(model.params, vae.mode(theirs[0]))
    return _of_parts(VAE_TOLERANCES, theirs, ours)


def inceptions(source, path):
    """Returns the report of Inception's weights file, run by PyTorch, and of ours at `path`.

    Both compute the features of two random images of 64 x 96.
    """
    from dit_jax.convert import torch_inception_model  # imports torch

    tensors = to_tensors(torch_inception.read(source))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3)).astype(np.uint8)
    theirs = [x.numpy() for x in torch_inception_model.features(tensors, images)]
    params = extractor.load(path).params
    ours = jax.jit(inception.apply)(params, images)
    return _of_parts(dict.fromkeys(ours._fields, INCEPTION_TOLERANCE), theirs, ours)


def _of_parts(tolerances, theirs, ours):
    """Returns the report of several outputs; tolerances: {name of an output: its tolerance}."""
    parts = [
        {"part": part, "tolerance": bound, **_compare(expected, np.asarray(actual))}
        for (part, bound), expected, actual in zip(tolerances.items(), theirs, ours, strict=True)
    ]
    worst = max(parts, key=lambda part: np.inf if part["relative"] is None else part["relative"])
    passed = [
        part["relative"] is not None and part["relative"] <= part["tolerance"] for part in parts
    ]
    return {name: worst[name] for name in ("tolerance", "absolute", "relative")} | {
        "passed": all(passed),
        "parts": parts,
    }


def _run_diffusers(state_dict, config, x):
    """Returns [moments of x, decoded mean] of diffusers' AutoencoderKL, channels-last."""
    torch = files.require("torch")
    net = torch_vae.build_diffusers(config)
    net.load_state_dict(to_tensors(state_dict))
    with torch.no_grad():
        posterior = net.eval().encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        decoded = net.decode(posterior.mean).sample
    return [out.numpy().transpose(0, 2, 3, 1) for out in (moments, decoded)]


def _compare(expected, actual):
    absolute = np.abs(actual - expected).max()
    relative = absolute / max(np.abs(expected).max(), TINY)
    return {"absolute": _finite(absolute), "relative": _finite(relative)}


def table(report):
    """Formats a report as a table."""
    label, rows = ("t", report["steps"]) if "steps" in report else ("part", report["parts"])
    lines = [f"{label:>8}  {'absolute':>10}  {'relative':>10}"]
    lines += [
        f"{row[label]:>8}  {text(row['absolute']):>10}  {text(row['relative']):>10}" for row in rows
    ]
    return "\n".join(lines)


def text(error):
    """Formats an error of a report."""
    return "not finite" if error is None else f"{error:.1e}"


def _finite(x):
    return float(x) if np.isfinite(x) else None
