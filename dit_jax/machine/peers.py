"""Whether this process was started together with others. Imports no jax, unlike `cluster`."""

import glob
import importlib.util
import os


def are_found():
    """Whether jax finds the other processes by itself: on a TPU pod and in a Slurm step."""
    # Not SLURM_NTASKS: salloc sets it in an interactive shell too.
    return is_on_pod() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_on_pod():
    """Whether this is a worker of a Cloud TPU, also on GKE."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu").split(","):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
