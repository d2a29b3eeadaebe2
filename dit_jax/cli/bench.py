r"""Measures how fast this machine trains, samples, loads, encodes or decodes a config.

    dit-bench train configs/imagenet256.py:XL/2
    dit-bench data configs/imagenet256.py:XL/2 --config.data.path=data/imagenet \
        --config.data.vae=runs/vae
    dit-bench sample configs/digits.py bench.json
    dit-bench train configs/imagenet256.py:S/2 --peer
    dit-bench operations configs/imagenet256.py:S/2 --config.train.batch_size=8 --peer
    dit-bench start configs/imagenet256.py:XL/2 start.json
    dit-bench decode configs/imagenet256.py:S/2 --config.train.batch_size=8 --peer
    dit-bench train configs/imagenet256.py:S/2 --config.train.batch_size=8 --growth=growth.png
    dit-bench train configs/imagenet256.py:S/2 --sweep --batch_sizes=64,128,256

CONFIG and OUT can also be given as --config and --out.
train times whole steps and sample times the sampling of one batch, both on random data, and waits
for each. data times reading, decoding, cropping and flipping one batch on one core. FLOP/s count
the arithmetic of the model, without what rematerialisation repeats; MFU is their share of the
devices' bfloat16 peak.
If the data of the config can be opened, train also reads them as a run does: data_wait is the share
of a step's time that waits for the next batch, and loader_images_per_second the speed of the loader
alone, on all cores.
operations times the operations of the blocks one by one, each with its gradients, and the update of
the parameters. It says how often a training step does each and what share of the step they take.
start times a new process until its first training step has ended: imports, finding the devices,
making the state, tracing, compiling, the first step; and a second one (warm) that finds the
programs of the first (cold) in jax's persistent compilation cache.
encode and decode time the autoencoder, in data.vae_dtype, on one batch of train.batch_size random
images or latents. It is the one at data.vae, or Stable Diffusion's with random weights.
--peer runs the same work in PyTorch, in turn with ours, eager and compiled; operations only eager.
It needs the extra [convert]. The autoencoder is then diffusers'.
--sweep times train.batch_size (half, once and twice the config's, or --batch_sizes) with all values
of compute.remat. It then tries the fastest case with compute.unroll and compute.attention. It ranks
the cases and prints the best one as flags. A case that does not fit or fails is a row that says so.
Each case is compiled once; all together take minutes.
--growth times steps with 64, 256, 1,024 and 4,096 tokens in each image, then with the batch and its
halves. It says with which power of the tokens and of the batch the time grows, and with which the
FLOPs do, and draws both.
"""

import json
import re
import sys

from absl import flags

from dit_jax import settings as settings_lib
from dit_jax.cli import arguments, command
from dit_jax.data import fields
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.sampling import fields as sampling_fields

AUTOENCODER = ("encode", "decode")


def define(values):
    arguments.define_config(values)
    options = {"flag_values": values}
    flags.DEFINE_integer("repeats", 10, "Timed steps or samplings.", lower_bound=2, **options)
    flags.DEFINE_integer("warmup", 2, "Untimed runs before them.", lower_bound=1, **options)
    flags.DEFINE_boolean("peer", False, "Also run it in PyTorch, in turn.", **options)
    text = "Rank batch sizes, remat, unroll and attention of training on this machine."
    flags.DEFINE_boolean("sweep", False, text, **options)
    text = "With --sweep: these instead of half, once and twice the config's."
    flags.DEFINE_list("batch_sizes", None, text, **options)
    text = "A PNG: how the time of a step grows with the tokens and with the batch."
    flags.DEFINE_string("growth", None, text, **options)
    flags.DEFINE_string("out", None, "A JSON file for the figures.", **options)


def check(values, what):
    if values.out:
        command.output_path(values.out, ".json")
    check_sweep(values, what)
    check_growth(values, what)
    if what == "start":
        check_start(values)
    if what == "data" and values.peer:
        raise UserError("peer must be false for data: nothing is compared")
    if what == "data":
        fields.check(arguments.settings(values).data)
        fields.check_paths(arguments.settings(values).data)
        return
    from dit_jax.runs import fields as run_fields  # needs NumPy

    settings = arguments.settings(values)
    run_fields.check(settings)
    if what in AUTOENCODER:
        check_latents(settings, what)
    elif what == "operations":
        check_operations(settings)
    if values.peer and what not in AUTOENCODER:
        check_peer(settings, what)


def check_start(values):
    """UserError for flags that a start does not have: it is measured once."""
    given = [name for name in ("peer", "repeats", "warmup") if values[name].present]
    if given:
        raise UserError(f"{given[0]} must be left out for start, got {values[given[0]].value}")


def check_operations(settings):
    """UserError unless a step runs the paper's adaLN-Zero blocks once, on all tokens."""
    from dit_jax.diffusion import fields as diffusion_fields  # needs NumPy

    usual = {"model.conditioning": "adaln_zero", "model.norm": "layer", "model.mlp": "gelu"}
    usual |= {"model.position": "sincos", "model.qk_norm": False, "model.class_tokens": 0}
    usual |= {"train.accumulation_steps": 1, "train.route_share": 0.0, "train.frozen": ()}
    given = settings_lib.flat(settings)
    for name, value in usual.items():
        if given[name] != value:
            raise UserError(f"{name} must be {value} for operations, got {given[name]}")
    if diffusion_fields.is_mean_flow(settings.diffusion):
        process = settings.diffusion.process
        raise UserError(f"diffusion.process must not be a mean flow for operations, got {process}")


def check_latents(settings, what):
    """UserError if the config has no latents that an autoencoder could make."""
    data, size = settings.data, settings.model.input_size
    if data.space != "latents":
        raise UserError(f"data.space must be latents to {what}, got {data.space}")
    if len(size) != 2:
        raise UserError(f"model.input_size must be the height and width to {what}, got {size}")
    fields.check_vae(data)


def check_sweep(values, what):
    """UserError if the flags of a sweep do not fit together."""
    if values.sweep and what != "train":
        raise UserError(f"sweep must be false for {what}: it ranks ways to train")
    if values.sweep and values.peer:
        raise UserError("peer must be false with --sweep: PyTorch has no such settings")
    if values.batch_sizes is not None and not values.sweep:
        raise UserError(f"batch_sizes needs --sweep, got {','.join(values.batch_sizes)}")
    batch_sizes(values)


def check_growth(values, what):
    """UserError if a growth cannot be measured so, or drawn there."""
    if values.growth is None:
        return
    if what != "train":
        raise UserError(f"growth must be left out for {what}: it is of training steps")
    if values.sweep or values.peer:
        other = "sweep" if values.sweep else "peer"
        raise UserError(f"{other} must be false with --growth, which compares sizes")
    command.output_path(values.growth, ".png", name="growth")
    axes = arguments.settings(values).model.input_size
    if len(axes) != 2:
        raise UserError(f"model.input_size must have two axes for --growth, got {axes}")


def batch_sizes(values):
    """The whole numbers of --batch_sizes, [] if there are none."""
    texts = values.batch_sizes or []
    if not all(re.fullmatch("[0-9]{1,9}", text) and int(text) for text in texts):
        raise UserError(f"batch_sizes must be whole numbers above 0, got {','.join(texts)}")
    return [int(text) for text in texts]


def check_peer(settings, what):
    """UserError if the code in PyTorch does not train or sample so."""
    sampling, optimizer = settings.sampling, settings.train.optimizer
    if what != "sample" and optimizer != "adamw":
        raise UserError(f"train.optimizer must be adamw for --peer, got {optimizer}")
    if what == "sample" and not sampling_fields.is_in_torch(sampling):
        rule = "with evenly spaced steps and constant guidance for --peer"
        raise UserError(f"sampling must be that of ddpm or ddim {rule}, got {sampling.sampler}")


def main(values, what):
    settings = arguments.settings(values)
    out = values.out and command.output_path(values.out, ".json")
    if what == "start":
        from dit_jax.runs import startup

        show({"what": what} | startup.measure(settings), out)
        return
    from dit_jax.runs import bench, bench_vae, growth, operations, tuning

    options = {"repeats": values.repeats, "warmup": values.warmup}
    if values.sweep:
        write(tuning.sweep(settings, batch_sizes(values), **options), out)
    elif values.growth:
        figures = growth.measure(settings, **options)
        write(figures, out)
        growth.draw(command.output_path(values.growth, ".png", name="growth"), figures["rows"])
    elif what == "operations":
        write(operations.measure(settings, peer=values.peer, **options), out)
    elif what == "data":
        show(bench.measure_data(settings, **options), out)
    elif what in AUTOENCODER:
        show(bench_vae.measure(settings, what, peer=values.peer, **options), out)
    else:
        show(bench.measure(settings, what, peer=values.peer, **options), out)


def show(figures, out):
    """Prints and writes the figures."""
    for name, value in figures.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    write(figures, out)


def write(figures, out):
    """Writes the figures to the file if there is one."""
    if out:
        disk.write_text(out, json.dumps(figures, indent=2) + "\n")


def entry():
    options = {
        "required": ["config"],
        "takes": ["train|sample|operations|data|encode|decode|start"],
        "words": ["config", "out"],
    }
    sys.exit(command.run("dit-bench", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
