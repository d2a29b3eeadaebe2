"""Explains a run, or compares several, in one HTML file that can be sent to a colleague.

    dit-report runs/digits
    dit-report runs/a runs/b runs/c --out=compared.html

WORKDIRs are runs of dit-train, finished or not. The file is report.html in the run, where dit-train
also writes it at every save; of several runs it is report.html in the current folder. It holds the
curves of losses, gradient norm, speed and scores, the samples by step, the configuration, the
history and the cost; of several runs also how they differ. Opening it makes no request.
"""

import sys

from absl import flags, logging

from dit_jax.cli import command
from dit_jax.errors import UserError
from dit_jax.machine import disk


def define(values):
    text = "The HTML file; default: report.html in the run, or here for several runs."
    flags.DEFINE_string("out", None, text, flag_values=values)


def check(values, *workdirs):
    if not workdirs:
        raise UserError("takes WORKDIR [WORKDIR ...], got none")
    from dit_jax.runs import summary  # needs NumPy

    out = choose(values, workdirs)
    for each in workdirs:
        if not disk.exists(disk.path(each)):
            raise UserError(f"WORKDIR must exist, got {each}")
        summary.check(disk.path(each))
    if disk.is_on_disk(out):
        command.output_path(out)


def choose(values, workdirs):
    """The path of the file to write."""
    if values.out:
        out = disk.path(values.out)
        if out.suffix not in (".html", ".htm"):
            raise UserError(f"out must end with .html, got {out}")
        return out
    return disk.path(workdirs[0] if len(workdirs) == 1 else ".") / "report.html"


def main(values, *workdirs):
    out = choose(values, workdirs)
    import jax

    from dit_jax.machine import words
    from dit_jax.runs import report

    jax.config.update("jax_platforms", "cpu")  # don't touch devices that a training uses
    runs = report.write(workdirs, out)
    for run in runs:
        for problem in run.problems:
            logging.warning("%s: %s", run.name, problem)
    logging.info("%s: %s", words.count(len(runs), "run"), out)


def entry():
    sys.exit(command.run("dit-report", define, main, check=check, takes=None))


if __name__ == "__main__":
    entry()
