"""torch-fidelity itself, installed for the test, on images that no stored number covers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from testdata import evaluation

from dit_jax.evals import kernel, moments, neighbours, scores

# It needs torchvision for its data sets only, and that needs the torch it was built for.
SCRIPT = """
import sys
from unittest import mock

for name in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
    sys.modules["torchvision" + name] = mock.MagicMock()
import numpy as np
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

weights, images, found = sys.argv[1:]
names = ["2048", "logits_unbiased"]
network = FeatureExtractorInceptionV3("it", names, feature_extractor_weights_path=weights)
features = {}
with np.load(images) as file:
    for name in file:
        outs = network(torch.from_numpy(file[name]).permute(0, 3, 1, 2))
        features |= dict(zip((f"{name}/pool", f"{name}/logits"), outs))
samples, reference = features["samples/pool"], features["reference/pool"]
quiet = {"verbose": False}
fid = [metric_fid.fid_features_to_statistics(x[:, :16].double()) for x in (samples, reference)]
kid = {"kid_subsets": 1, "kid_subset_size": len(samples)}
values = {
    "fid": metric_fid.fid_statistics_to_metric(*fid, verbose=False),
    "is": metric_isc.isc_features_to_metric(features["samples/logits"], splits=1, shuffle=False),
    "kid": metric_kid.kid_features_to_metric(samples, reference, **kid, **quiet),
    "prc": metric_prc.prc_features_to_metric(samples, reference, **quiet),
}
scores = {key: value for each in values.values() for key, value in each.items()}
np.savez(found, **{name: x.numpy() for name, x in features.items()}, **scores)
"""


@pytest.fixture(scope="module")
def images():
    """Samples and a reference of other sizes than the stored numbers have; uint8."""
    samples = evaluation.images(48, 80, 24, "other/")
    return {"samples": samples, "reference": evaluation.images(120, 100, 24, "more/")}


@pytest.fixture(scope="module")
def theirs(images, inception_weights, tmp_path_factory):
    """What torch-fidelity computes: features of both, and scores."""
    folder = tmp_path_factory.mktemp("torch_fidelity")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), "torch-fidelity==0.4.0"], check=True)
    weights = {name: torch.from_numpy(x) for name, x in inception_weights.items()}
    torch.save(weights, folder / "weights.pth")
    np.savez(folder / "images.npz", **images)
    files = [str(folder / name) for name in ("weights.pth", "images.npz", "found.npz")]
    subprocess.run([sys.executable, "-c", SCRIPT, *files], check=True, cwd=folder)
    with np.load(folder / "found.npz") as file:
        return dict(file)


@pytest.mark.slow
def test_features_and_scores_are_those_of_torch_fidelity(images, look, theirs, check_close):
    ours = {}
    for name, each in images.items():
        features, _ = look(each)
        for part in ("pool", "logits"):
            ours[f"{name}/{part}"] = np.asarray(getattr(features, part))
            check_close(f"{name}/{part}", ours[f"{name}/{part}"], theirs[f"{name}/{part}"], 1e-4)
    samples, reference = ours["samples/pool"], ours["reference/pool"]
    fits = [moments.of(x[:, :16]) for x in (samples, reference)]
    fid = scores.distance(*(scores.gaussian(fit.mean, fit.covariance()) for fit in fits))
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    found = scores.inception_scores(ours["samples/logits"]).mean()
    assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    kid = kernel.distance(samples, reference)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    members = neighbours.compare(reference, samples)
    # Of 24 images each; theirs are means in float32.
    assert members.precision.sum() == round(24 * float(theirs["precision"]), 4)
    assert members.recall.sum() == round(24 * float(theirs["recall"]), 4)
