"""Private or version-bound parts of other packages: the only file to mend when one of them changes.

The package supports jax 0.7.2 to 0.12, flax 0.11.2 to 0.12.12 and orbax-checkpoint 0.12.4 to
0.12.8. Each entry names the package, the versions it was checked with, and why the public API is
not enough.
"""

import os

import numpy as np
from jax._src import distributed
from jax.experimental import mesh_utils, multihost_utils

# jax


def distributed_client():
    """The client of jax's coordination service; None before jax.distributed.initialize.

    jax 0.7.2 to 0.12. It has a key-value store that all processes share. jax.distributed can start
    the service but does not give access to the client. Orbax uses this private name too.
    """
    return distributed.global_state.client


def process_allgather(x, *, tiled=False):
    """The value of x on every process, as NumPy: stacked, or concatenated if tiled.

    A global array that this process can address only in part becomes the whole array. jax 0.7.2 to
    0.12. jax.experimental may change without a deprecation; jax has no other all-gather for hosts.
    """
    return np.asarray(multihost_utils.process_allgather(x, tiled=tiled))


def sync_processes(name):
    """Waits until every process has called it with the same name.

    jax 0.7.2 to 0.12. jax.experimental may change without a deprecation; jax has no other barrier.
    """
    multihost_utils.sync_global_devices(name)


def hybrid_device_grid(shape, slices, devices):
    """The devices of several TPU slices as an array for a Mesh, by slice along the first axis.

    shape: of the grid within a slice. jax 0.7.2 to 0.12. jax.make_mesh ignores slices; this
    function, which does not, is in jax.experimental and may change without a deprecation.
    """
    across = (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(
        shape, across, devices, allow_split_physical_axes=True
    )


# etils, TensorStore

# How an exception of TensorStore begins if the bucket refused access or could not be reached.
# tensorstore 0.1.86. It raises ValueError for every failure, so only the text tells them apart. A
# request that fails after all retries is not matched; its text begins with "ABORTED: All".
TENSORSTORE_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def keep_etils_off_tensorflow():
    """Makes etils reach buckets with gcsfs even if TensorFlow is installed.

    etils 1.15. With TensorFlow, epath raises TensorFlow's exceptions, which `machine.disk` does not
    recognise. etils offers no setting but this undocumented environment variable.
    """
    os.environ.setdefault("EPATH_USE_TF", "no")


def list_buckets_afresh():
    """Makes every listing of a bucket ask the server, so that it shows other processes' writes.

    fsspec 2026.9, gcsfs 2026.10. gcsfs caches listings for ever; etils opens the file system and
    passes no options, so the default for all of fsspec's "gcs" file systems has to change.
    """
    import fsspec  # only buckets need it

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
