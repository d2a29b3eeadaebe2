r"""Plans training or sampling on a TPU without one: does it fit, and how fast could it be.

    dit-plan configs/imagenet256.py:XL/2 --topology=v3:8x16 \
        --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.compute.remat=dots
    dit-plan configs/imagenet256.py:XL/2 plan.json --topology=v5e:4x4 --sweep
    dit-plan configs/imagenet256.py:XL/2 --topology=v5e:1x1 --sample --config.train.batch_size=8 \
        --config.sampling.sampler=unipc --config.sampling.num_steps=20

CONFIG and OUT can also be given as --config and --out.
libtpu (pip install -e .[tpu]) compiles the real training step on this machine's CPU. A topology is
a generation (v2, v3, v4, v5e, v5p, v6e, tpu7x) and the chips along each side; v2, v3 and tpu7x have
two devices a chip. The times are the compiler's estimates, not measurements. --sample plans the
sampling of train.batch_size images by the config's sampler, without the autoencoder. --sweep
compiles the meshes worth trying with remat "dots", then the best of them with "none" and "full",
and ranks all; this takes minutes.
"""

import json
import sys

from absl import flags

from dit_jax.cli import arguments, command
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.planning import chips


def define(values):
    arguments.define_config(values)
    options = {"flag_values": values}
    flags.DEFINE_string("topology", None, "The TPU to compile for, for example v3:8x16.", **options)
    flags.DEFINE_boolean("sweep", False, "Try and rank meshes and remat policies.", **options)
    flags.DEFINE_boolean("sample", False, "Plan the sampling of one batch of images.", **options)
    flags.DEFINE_string("out", None, "A JSON file for the figures.", **options)


def check(values):
    chips.parse(values.topology)
    if values.sample and values.sweep:
        raise UserError("sweep must be false for --sample: it ranks training steps")
    if values.out:
        command.output_path(values.out, ".json")
    from dit_jax.runs import fields  # needs NumPy

    fields.check(arguments.settings(values))


def main(values):
    settings = arguments.settings(values)
    out = values.out and command.output_path(values.out, ".json")
    import jax

    from dit_jax.planning import plan
    from dit_jax.runs import plans

    jax.config.update("jax_platforms", "cpu")  # don't touch a TPU or GPU of this machine
    target = plan.make_target(values.topology)
    if values.sweep:
        figures = plans.sweep(settings, target)
    else:
        figures = (plans.plan_sampling if values.sample else plans.plan_one)(settings, target)
        plans.show(figures)
    if out:
        disk.write_text(out, json.dumps(figures, indent=2) + "\n")


def entry():
    options = {"required": ["config", "topology"], "words": ["config", "out"]}
    sys.exit(command.run("dit-plan", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
