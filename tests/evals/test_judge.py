import numpy as np
import pytest
from testdata import evaluation

from dit_jax.errors import UserError
from dit_jax.evals import judge, kernel, scores


class Network:
    def __init__(self, is_inception=False, published=False):
        self.is_inception, self.published = is_inception, published


ADM = Network(is_inception=True, published=True)


@pytest.fixture(scope="module")
def found():
    """Features of 500 samples."""
    logits = evaluation.logits("fake", 500, 10)
    return {
        "pool": evaluation.gauss("fake", 500, 64),
        "logits": logits,
        "label": logits.argmax(axis=1) * (np.arange(500) % 5 > 0),  # one in five is 0 instead
    }


@pytest.fixture(scope="module")
def reference():
    real = evaluation.gauss("real", 600, 64)
    return judge.Reference(scores.gaussian_of(real), None, real, {"file": "of a test"})


def test_scores_are_the_golden_ones(found, reference, golden_eval):
    results = judge.judge(found, reference, Network(), resamples=0)
    assert list(results) == [
        "Frechet distance (classifier features)",
        *("precision", "recall", "density", "coverage", "KID", "agreement with the label"),
    ]
    distance = results["Frechet distance (classifier features)"].value
    assert distance == pytest.approx(float(golden_eval["fid/full/exact"]), rel=1e-8)
    assert results["KID"].value == pytest.approx(float(golden_eval["kid/full/exact"]), rel=1e-8)
    for name in ("precision", "recall"):
        assert results[name].value == float(golden_eval[f"pr/full/{name}"])
    assert 0.75 < results["agreement with the label"].value < 0.95
    assert all(score.deviation is None for score in results.values())


def test_only_the_published_network_gives_fid(found, reference):
    spatial = judge.Reference(reference.pool, reference.pool, reference.images, {})
    found = found | {"spatial": found["pool"]}
    names = list(judge.judge(found, spatial, ADM, resamples=0))
    assert names[:3] == ["FID-500", "sFID-500", "Inception Score"]
    assert "precision (float32)" in names and "agreement with the label" not in names
    names = list(judge.judge(found, spatial, Network(is_inception=True), resamples=0))
    assert names[0] == "Frechet distance (Inception with other weights)"
    assert judge.names(ADM, 50_000)[0] == "FID-50K"
    assert judge.names(ADM, 10_000)[1] == "sFID-10K"


def test_deviations_are_of_the_bootstrap(found, reference):
    results = judge.judge(found, reference, Network())
    share = results["agreement with the label"]
    expected = np.sqrt(share.value * (1 - share.value) / 500)
    assert share.deviation == pytest.approx(expected, rel=0.5)
    assert 0 < results["Frechet distance (classifier features)"].deviation < 2
    again = judge.judge(found, reference, Network())
    assert again == results


def test_a_reference_without_images_has_no_neighbours(found, reference):
    results = judge.judge(found, reference._replace(images=None), Network(), resamples=0)
    assert list(results) == ["Frechet distance (classifier features)", "agreement with the label"]


def test_too_few_samples_are_one_line(found, reference):
    few = {name: x[:5] for name, x in found.items()}
    with pytest.raises(UserError, match="samples must be at least 6 to be judged, got 5"):
        judge.judge(few, reference, Network())
    with pytest.raises(UserError, match="num_samples must be at least 5015 for fid_inf.*, got 500"):
        judge.judge(found, reference, Network(), at_infinity=True)


def test_many_samples_have_a_kid_against_few_images(found, reference, monkeypatch):
    monkeypatch.setattr(judge, "MANY", 400)
    images = reference.images[:50]
    results = judge.judge(found, reference._replace(images=images), Network(), resamples=0)
    expected = kernel.distance(found["pool"], images)
    assert results["KID of 100 subsets"].value == pytest.approx(expected, abs=0.02)


def test_sorted_images_are_seen():
    classes = np.repeat(np.arange(10), 60)
    rng = np.random.default_rng(0)
    logits = 8 * np.eye(10)[classes] + rng.normal(size=(600, 10))
    assert judge.looks_sorted(logits)
    assert not judge.looks_sorted(rng.permutation(logits))


def test_report_has_a_line_a_score():
    results = {"FID-50K": judge.Score(2.27123, None), "precision": judge.Score(0.83, 0.0021)}
    assert judge.report(results).splitlines() == [
        "FID-50K    2.271",
        "precision  0.83 +- 0.0021",
    ]
