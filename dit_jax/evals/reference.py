"""References in ADM's format: an .npz with the moments of a data set, and some of its images.

mu, sigma: of the features `pool`; mu_s, sigma_s: of `spatial`; arr_0: uint8 (M, H, W, 3), the
images of precision and recall. The moments are of the whole data set.
"""

import json
import zipfile

import jax
import numpy as np
from absl import logging

from dit_jax.errors import UserError
from dit_jax.evals import features, moments, samples, scores
from dit_jax.evals.judge import FEWEST, Reference
from dit_jax.machine import cluster, disk

NUM_IMAGES = 10_000  # of arr_0, as ADM's
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def open_adm(path, network, folder, shape):
    """The Reference in an .npz of ADM's format; None on processes other than 0.

    Features of its images are kept in `folder`. shape: of the samples, (H, W, C). UserError if the
    file has images of another shape, or neither moments nor images.
    """
    path = disk.path(path)
    images = samples.open_reference(path, shape)
    found = _read_gaussians(path, {"pool": network.num_features, "spatial": network.num_spatial})
    by_images = None
    if images:
        identity = {"images": images.sha256, "network": network.identity}
        store, _ = features.fill(
            folder, identity, len(images), lambda *span: (images.read(*span), None), network
        )
        by_images = store and store.read(len(images))
    else:
        logging.warning(
            "%s has no images (arr_0): precision, recall and KID are left out", path.name
        )
    if jax.process_index() != 0:
        return None
    if "pool" not in found:
        found = {kind: scores.gaussian_of(by_images[kind]) for kind in MOMENTS}
    identity = {"file": str(path), "sha256": disk.sha256(path)}
    identity["images"] = len(by_images["pool"]) if by_images else 0
    return Reference(found["pool"], found.get("spatial"), by_images and by_images["pool"], identity)


def _read_gaussians(path, sizes):
    """{"pool": scores.Gaussian, ...} of the moments that an .npz has; sizes: {kind: features}."""
    arrays = {}
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for kind, pair in MOMENTS.items():
                if set(pair) <= set(file.files):
                    arrays[kind] = {name: file[name] for name in pair}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"reference must be an .npz without pickles, got {path}: {error}"
        ) from error
    return {kind: _gaussian(path, found, sizes[kind]) for kind, found in arrays.items()}


def _gaussian(path, arrays, size):
    """The scores.Gaussian of {name: array}, first the mean (size,), then the covariance."""
    for shape, (name, x) in zip(((size,), (size, size)), arrays.items(), strict=True):
        if x.shape != shape or x.dtype.kind != "f":
            raise UserError(
                f"{name} must be floats of shape {shape}, got {x.dtype} {x.shape} in {path}"
            )
    try:
        return scores.gaussian(*arrays.values())
    except UserError as error:
        raise UserError(f"{' and '.join(arrays)} of {path}: {error}") from error


def make(images, network, folder, out, *, seed=0):
    """Writes the reference of images with labels, uint8 (size, size, 3) each: {file: sha256}.

    images: a sequence of {"image", "label"} with sha256. Features are kept in `folder`. arr_0 has
    NUM_IMAGES of them, drawn at random by the seed, or all of fewer.
    """
    count = len(images)
    if count < FEWEST:
        raise UserError(f"a reference must have at least {FEWEST} images, got {count}")

    def read(start, stop):
        examples = [images[i] for i in range(start, stop)]
        return tuple(np.stack([x[name] for x in examples]) for name in ("image", "label"))

    identity = {"images": images.sha256, "size": images.size, "network": network.identity}
    store, _ = features.fill(folder, identity, count, read, network)
    with cluster.together():
        if not store:
            return {}
        arrays = {}
        for kind, (mean, covariance) in MOMENTS.items():
            found = moments.of_batches(shard[kind] for shard in store.shards(count))
            arrays |= {mean: found.mean, covariance: found.covariance()}
        some = np.random.default_rng(seed).permutation(count)[:NUM_IMAGES]
        arrays["arr_0"] = np.stack([images[int(i)]["image"] for i in np.sort(some)])
        arrays["identity"] = np.array(json.dumps(identity))
        with disk.replacing(out) as file:
            np.savez(file, **arrays)
    return store.digests(count)
