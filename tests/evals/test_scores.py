import numpy as np
import pytest
import scipy.linalg
from testdata import evaluation

from dit_jax.errors import UserError
from dit_jax.evals import kernel, moments, neighbours, scores


def random_gaussian(seed, size=6):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size))
    return rng.standard_normal(size), factor @ factor.T


def test_frechet_distance_of_equal_gaussians_is_zero():
    mean, covariance = random_gaussian(0)
    assert scores.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_in_one_dimension_matches_the_formula():
    distance = scores.frechet_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])
    )
    assert distance == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_frechet_distance_matches_the_matrix_root_and_is_symmetric():
    (m1, c1), (m2, c2) = random_gaussian(1), random_gaussian(2)
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root).real
    assert scores.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert scores.frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances_is_real():
    c1, c2 = np.diag([1.0, 4.0, 0.0]), np.diag([9.0, 0.0, 0.0])
    distance = scores.frechet_distance(np.zeros(3), c1, np.zeros(3), c2)
    assert distance == pytest.approx((1 - 3) ** 2 + 4)


def test_frechet_distance_of_samples_estimates_the_distance_of_their_gaussians():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50_000, 3))
    y = 2 * rng.standard_normal((50_000, 3)) + 1
    assert scores.frechet_distance_of(x, y) == pytest.approx(3 * 1 + 3 * 1, rel=0.03)


def test_nearest_distances():
    x = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    references = np.array([[0.0, 0.0], [9.0, 0.0]])
    expected = [0, 5, 1]
    np.testing.assert_allclose(scores.nearest_distances(x, references), expected, atol=1e-9)


def from_moments(x, y):
    """The Frechet distance by way of mean and covariance."""
    a, b = moments.of(x), moments.of(y)
    return scores.frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


@pytest.mark.parametrize("distance", [scores.frechet_distance_of, from_moments])
@pytest.mark.parametrize("name", evaluation.frechet_sets())
def test_frechet_distance_of_golden_features_is_exact(golden_eval, name, distance):
    found = distance(*evaluation.frechet_sets()[name])
    assert found == pytest.approx(float(golden_eval[f"fid/{name}/exact"]), rel=1e-8, abs=1e-12)
    # Others lose digits in a root of C1 C2, and in means of float32 (offset).
    for who in ("torch_fidelity", "sqrtm"):
        bound = 1e-4 if name == "offset" else 1e-6
        other = float(golden_eval[f"fid/{name}/{who}"])
        assert found == pytest.approx(other, rel=bound, abs=1e-12)


def spectra(size):
    """{case: eigenvalues of two covariances with the same eigenvectors}."""
    rng = np.random.default_rng(size)
    first, a, b = np.arange(size) < size // 2, 0.1 + rng.random(size), 0.1 + rng.random(size)
    decay = np.logspace(0, -14, size)
    return {
        "full": (a, b),
        "singular": (np.where(first, a, 0), b),
        "disjoint": (np.where(first, a, 0), np.where(first, 0, b)),
        "near_singular": (decay, 4 * decay),
        "near_disjoint": (decay, decay[::-1]),
    }


@pytest.mark.parametrize("size", [3, 200])
@pytest.mark.parametrize("case", spectra(3))
def test_frechet_distance_of_known_gaussians_is_exact(case, size):
    a, b = spectra(size)[case]
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    mean1, mean2 = rng.standard_normal((2, size))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    covariances = [(basis * x) @ basis.T for x in (a, b)]
    found = scores.frechet_distance(mean1, covariances[0], mean2, covariances[1])
    assert found == pytest.approx(expected, rel=1e-8)
    roots = [scores.Gaussian(m, basis * np.sqrt(x)) for m, x in ((mean1, a), (mean2, b))]
    assert scores.distance(*roots) == pytest.approx(expected, rel=1e-12)


def test_no_covariance_is_refused():
    mean, eye = np.zeros(3), np.eye(3)
    for covariance, message in (
        (np.eye(2), r"covariance must be of the 3 features of the mean, got \(2, 2\)"),
        (eye * np.nan, "mean and covariance must be finite, got NaN or infinity"),
        (np.tri(3), "covariance must be symmetric, got one that is not"),
        (np.diag([1.0, 1.0, -0.1]), "covariance must have no negative eigenvalue, got -0.1"),
    ):
        with pytest.raises(UserError, match=message):
            scores.frechet_distance(mean, eye, mean, covariance)
    rounded = np.diag([1.0, 1.0, -1e-7])
    assert scores.frechet_distance(mean, eye, mean, rounded) == pytest.approx(1)


def test_frechet_distance_of_one_sample_is_refused():
    with pytest.raises(UserError, match="features must be of at least 2 images .*, got 1"):
        scores.frechet_distance_of(np.zeros((1, 3)), np.zeros((5, 3)))


def test_frechet_distance_at_infinity_removes_the_bias_of_few_samples():
    rng = np.random.default_rng(0)
    x, reference = rng.standard_normal((3000, 16)), scores.Gaussian(np.zeros(16), np.eye(16))
    found = scores.frechet_at_infinity(x, reference, smallest=300)
    again = scores.frechet_at_infinity(x, reference, smallest=300)
    assert found.value == again.value and found.sizes[0] == 300 and found.sizes[-1] == 3000
    assert found.distances[0] > found.distances[-1] > 0.01
    assert abs(found.value) < 0.25 * found.distances[-1]
    other = scores.frechet_at_infinity(x, reference, smallest=300, seed=1)
    assert other.value != found.value and abs(other.value) < 0.01
    with pytest.raises(UserError, match="features must be of at least 5015 images"):
        scores.frechet_at_infinity(x, reference)


def test_inception_score_of_golden_logits(golden_eval):
    logits = evaluation.logits("is", 12_000, 32)
    found = scores.inception_scores(logits)
    assert len(found) == 3  # of 5000, 5000 and 2000
    # ADM computes in float32.
    assert found.mean() == pytest.approx(float(golden_eval["is/adm"]), rel=1e-6)
    (one,) = scores.inception_scores(logits, split_size=12_000)
    assert one == pytest.approx(float(golden_eval["is/one_split"]), rel=1e-6)
    shuffled = logits[np.random.RandomState(2020).permutation(12_000)]
    found = scores.inception_scores(shuffled, split_size=1200)
    expected = golden_eval["is/torch_fidelity"]
    np.testing.assert_allclose([found.mean(), found.std()], expected, rtol=1e-9)


def test_inception_score_of_certain_and_of_equal_predictions():
    certain = 1000.0 * np.eye(7, 11)[np.arange(700) % 7]  # classes 7 to 10 have probability 0
    assert scores.inception_scores(certain) == pytest.approx([7.0])
    assert scores.inception_scores(np.zeros((10, 5))) == pytest.approx([1.0])


def test_order_ratio_finds_sorted_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(50, size=4000)
    logits = rng.standard_normal((4000, 50)) + 6 * np.eye(50)[labels]
    assert scores.order_ratio(logits) == pytest.approx(1, abs=0.03)
    assert scores.order_ratio(logits[np.argsort(labels)]) < 0.3


def test_standard_deviation_of_a_mean():
    x = np.random.default_rng(0).standard_normal(2000)
    found = scores.standard_deviation(np.mean, x, resamples=400)
    assert found == pytest.approx(1 / np.sqrt(2000), rel=0.15)  # 400 resamples
    assert scores.standard_deviation(np.mean, x, resamples=400) == found
    two = scores.standard_deviation(lambda a, b: a.mean() - b.mean(), x, x[:500], resamples=400)
    assert two == pytest.approx(np.sqrt(1 / 2000 + 1 / 500), rel=0.15)


@pytest.fixture(scope="module")
def seen(look, golden_eval, check_close):
    """Features of the images of the statistics, the reference, and the samples."""
    stats, reference, samples = evaluation.evaluated_images()
    features, _ = look(stats[:4])
    for part in ("pool", "spatial"):
        check_close(
            f"e2e {part}", getattr(features, part), golden_eval[f"e2e/stats_{part}"][:4], 1e-4
        )
    stats = [golden_eval[f"e2e/stats_{part}"] for part in ("pool", "spatial")]
    return stats, look(reference)[0], look(samples)[0]


def test_images_get_the_scores_of_torch_fidelity_and_adm(seen, golden_eval):
    """As in ADM, the moments are of other images than those of KID, precision and recall."""
    expected = {k: float(x) for k, x in golden_eval.items() if k.startswith("e2e/") and not x.ndim}
    (pool, spatial), reference, samples = seen
    bound = 1e-5  # the features have an error of 1e-5
    found = {
        "fid": scores.frechet_distance_of(pool, samples.pool),
        "sfid": scores.frechet_distance_of(spatial, samples.spatial),
        "is": scores.inception_scores(samples.logits).mean(),
        "kid": kernel.distance(reference.pool, samples.pool),
    }
    for name in ("fid", "sfid", "is"):
        assert found[name] == pytest.approx(expected[f"e2e/{name}"], rel=bound)
        tf = f"e2e/tf_{name}" if name == "is" else f"e2e/tf_{name}_exact"
        assert found[name] == pytest.approx(expected[tf], rel=bound)
        if name != "is":  # SciPy's root of a singular product
            assert found[name] == pytest.approx(expected[f"e2e/tf_{name}"], rel=bound)
    # A small difference of sums of about 1.
    assert found["kid"] == pytest.approx(expected["e2e/kid"], abs=1e-6)
    membership = neighbours.compare(reference.pool, samples.pool, arithmetic="float16")
    both = [membership.precision.mean(), membership.recall.mean()]
    np.testing.assert_allclose(both, golden_eval["e2e/tf_pr"], rtol=1e-12)
    membership = neighbours.compare(reference.pool, samples.pool)
    assert membership.precision.mean() == pytest.approx(expected["e2e/precision"], rel=1e-12)
    assert membership.recall.mean() == pytest.approx(expected["e2e/recall"], rel=1e-12)
