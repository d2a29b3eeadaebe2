"""Trains a DiT. Start the same command again to resume from the last checkpoint.

    dit-train configs/digits.py runs/digits [--config.TOPIC.FIELD=value]
    dit-train runs/digits
    dit-train configs/digits.py runs/new --init_from=runs/digits
    dit-train configs/digits.py runs/digits --dry_run --picture=batch.png

CONFIG and WORKDIR can also be given as --config and --workdir. configs/base.py explains every
field. With its workdir alone, a run resumes with its own config. A resumed run may change run.*,
mesh.*, sampling.*, compute.attention, remat and unroll, and the paths of the same data. --init_from
starts a new run from the EMA of another run or of a checkpoint of dit-convert; a resumed run
ignores it. Data may be in a bucket: see data.cache. --dry_run prints the settings, the work, the
first batch and the memory of the compiled step, trains nothing and writes nothing but --picture.

On a TPU pod or in a Slurm job, start the command on every host: the processes find each other.
Elsewhere give --coordinator, --num_processes and --process_id. All processes use one workdir, on a
shared disk or gs://BUCKET/NAME. It holds config.json, metrics.jsonl, history.jsonl, report.html,
loss.png, samples/STEP.png and checkpoints/STEP/.
"""

import signal
import sys

from absl import flags

from dit_jax.checkpoint import peek, steps
from dit_jax.cli import arguments, command
from dit_jax.data import fields
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import loggers

MOST = {  # of the samples that a run draws on its way; training waits for them
    "num_samples": 10_000,  # in one picture: a grid of 100 x 100
    "score_samples": 50_000,  # as many as the FID of papers takes
}


def define(values):
    arguments.define_config(values)
    flags.DEFINE_string("workdir", None, "The directory of the run.", flag_values=values)
    flags.DEFINE_string(
        "init_from",
        None,
        "A run or a checkpoint whose EMA a new run starts from.",
        flag_values=values,
    )
    text = "Print what the run would do, and stop."
    flags.DEFINE_boolean("dry_run", False, text, flag_values=values)
    text = "With --dry_run: a .png of the first batch."
    flags.DEFINE_string("picture", None, text, flag_values=values)
    command.define_cluster(values)


def check(values):
    settings, workdir = arguments.settings(values), disk.path(values.workdir)
    data = settings.data
    from dit_jax.runs import fields as run_fields  # these need NumPy
    from dit_jax.runs import workdir as workdirs

    run_fields.check(settings)
    fields.check(data)
    if values.picture:
        check_picture(values, run_fields.has_images(settings))
    for name, most in MOST.items():
        if (count := getattr(settings.run, name)) > most:
            raise UserError(f"run.{name} must be at most {most}, got {count}")
    if command.has_peers(values):  # they must all fail if a path is missing on one
        return
    loggers.check(settings.run.loggers, workdir)
    if disk.is_on_disk(workdir):
        workdirs.check(workdir, settings)
    if steps.latest(workdir / "checkpoints") is None:
        fields.check_paths(data)
        if values.init_from:
            peek.meta_of(values.init_from, of="model", name="init_from")


def check_picture(values, has_images):
    """UserError for a --picture that is not wanted, cannot be drawn, or cannot be written."""
    if not values.dry_run:
        raise UserError(f"picture must be left out without --dry_run, got {values.picture}")
    command.output_path(values.picture, ".png", name="picture")
    if not has_images:
        raise UserError(
            f"picture must be left out for data that are no images, got {values.picture}: latents "
            "need data.vae"
        )


def main(values):
    settings, workdir = arguments.settings(values), disk.path(values.workdir)
    import jax

    from dit_jax.machine import compiled
    from dit_jax.runs import dry_run, run
    from dit_jax.train import divergence

    compiled.keep()
    if values.dry_run:
        picture = values.picture and command.expand(values.picture)
        for line in dry_run.describe(settings, workdir, values.init_from, picture):
            if jax.process_index() == 0:
                print(line, flush=True)
        return 0
    try:
        run.run(settings, workdir, listen_for_stop, values.init_from)
    except run.Stopped as error:
        return command.fail("dit-train", error, code=42)
    except divergence.Diverged as error:
        return command.fail("dit-train", error, code=3)
    return 0


def listen_for_stop():
    """stop_requested() is true after SIGINT or SIGTERM, or after a notice of preemption.

    A second signal ends the process at once.
    """
    from dit_jax.machine import cluster

    requests = []

    def handle(signum, frame):
        requests.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        print("\nstopping after this step; once more leaves without saving", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    cluster.watch_maintenance(requests.append)
    return lambda: bool(requests)


def entry():
    names = ["config", "workdir"]
    options = {"required": names, "words": names, "stopped": 42}
    sys.exit(command.run("dit-train", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
