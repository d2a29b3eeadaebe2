import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from testdata import evaluation

from dit_jax.errors import UserError
from dit_jax.evals import neighbours
from dit_jax.machine import devices

SETS = ["full", "ties", "pool", "same"]


def scores(*sets, **options):
    return {k: x.mean() for k, x in neighbours.compare(*sets, **options)._asdict().items()}


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_exact_in_float32(golden_eval, name):
    found = scores(*evaluation.neighbour_sets()[name])
    for score in ("precision", "recall"):
        assert found[score] == pytest.approx(float(golden_eval[f"pr/{name}/{score}"]), rel=1e-12)
    both = [found["precision"], found["recall"]]
    # torch-fidelity prints float32.
    np.testing.assert_allclose(both, golden_eval[f"pr/{name}/torch_fidelity"], rtol=1e-7)


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_those_of_adm_in_float16(golden_eval, name):
    found = scores(*evaluation.neighbour_sets()[name], arithmetic="float16")
    expected = golden_eval[f"pr/{name}/adm_float16"]
    assert [found["precision"], found["recall"]] == pytest.approx(list(expected), rel=1e-12)


def test_rounding_to_float16_moves_the_scores():
    sets = evaluation.neighbour_sets()["pool"]
    assert scores(*sets, arithmetic="float16")["precision"] > scores(*sets)["precision"]


def test_features_too_large_for_float16_are_compared_in_float32(golden_eval):
    real, fake = (12 * x for x in evaluation.neighbour_sets()["pool"])
    expected = golden_eval["pr/pool_times_12/adm_float32"]
    found = scores(real, fake, arithmetic="float16")
    assert [found["precision"], found["recall"]] == pytest.approx(list(expected), rel=1e-12)


def test_arithmetic_is_chosen_for_each_block(monkeypatch):
    """As in ADM, an image that is too large for float16 changes the blocks that contain it."""
    real, _ = evaluation.neighbour_sets()["pool"]
    monkeypatch.setattr(neighbours, "BLOCK", 100)
    half, exact = (neighbours.radii(real, (3,), arithmetic=x)[0] for x in neighbours.ARITHMETICS)
    assert (half != exact).mean() > 0.9
    large = real.copy()
    large[0] *= 12
    mixed = neighbours.radii(large, (3,), arithmetic="float16")[0]
    assert (mixed[1:100] == exact[1:100]).mean() > 0.9
    assert (mixed[100:] == half[100:]).mean() > 0.6  # a seventh of their columns is in float32


@pytest.mark.parametrize("name", ["full", "ties", "same"])
def test_radii(golden_eval, name):
    real, fake = evaluation.neighbour_sets()[name]
    for x, which in ((real, "real"), (fake, "fake")):
        expected = golden_eval[f"pr/{name}/radii_{which}"]
        (found,) = neighbours.radii(x, (3,))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 products


@pytest.mark.parametrize("name", SETS)
def test_radii_in_float16_are_those_of_adm(golden_eval, name):
    (found,) = neighbours.radii(evaluation.neighbour_sets()[name][0], (3,), arithmetic="float16")
    expected = golden_eval[f"pr/{name}/adm_float16_radii_real"]
    # TensorFlow sums squares in float16; |u|^2 then differs by 1 or 2 units in its last place.
    unit = np.spacing(expected.astype(np.float16).max()).astype(np.float32)
    assert np.abs(found - expected).max() <= 3 * unit
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", SETS)
def test_density_and_coverage_match_prdc(golden_eval, name):
    found = scores(*evaluation.neighbour_sets()[name])
    expected = golden_eval[f"pr/{name}/density_coverage_k5"]
    assert [found["density"], found["coverage"]] == pytest.approx(list(expected), rel=1e-12)


@pytest.mark.parametrize("arithmetic", neighbours.ARITHMETICS)
def test_strips_and_blocks_change_nothing(monkeypatch, arithmetic):
    sets = evaluation.neighbour_sets()["ties"]
    whole = neighbours.compare(*sets, arithmetic=arithmetic)
    monkeypatch.setattr(neighbours, "BLOCK", 110)
    monkeypatch.setattr(neighbours, "STRIP", 40)
    for name, found in neighbours.compare(*sets, arithmetic=arithmetic)._asdict().items():
        np.testing.assert_array_equal(found, getattr(whole, name))


def test_scores_of_one_dimension_by_hand():
    reference = np.array([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0]])
    np.testing.assert_array_equal(
        np.sqrt(neighbours.radii(reference, (3, 5))),
        [[3, 2, 2, 3, 8, 9], [11, 10, 9, 8, 10, 11]],
    )
    samples = np.array([[0.5], [7.0], [2.0], [20.0], [40.0], [41.0]])
    found = neighbours.compare(reference, samples)
    # 11 reaches 9, just to 20, for k = 3. For k = 5, 10 does not reach 20: it is 10 away.
    np.testing.assert_array_equal(found.precision, [True, True, True, True, False, False])
    np.testing.assert_allclose(found.density, [1.2, 1.2, 1.2, 0.2, 0, 0])
    assert found.recall.all() and found.coverage.all()
    found = neighbours.compare(reference, samples + 60)
    assert not any(x.any() for x in (found.precision, found.density, found.coverage))
    assert not found.recall.any()


def test_rounding_is_that_of_float16():
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32) * 40
    found = np.asarray(neighbours._distances(x, x, half=True))
    half = x.astype(np.float16).astype(np.float32)
    squared = (half**2).sum(axis=1).astype(np.float16)
    products = (half @ half.T).astype(np.float16)
    expected = np.maximum(squared[:, None] - np.float16(2) * products + squared, np.float16(0))
    assert (found == expected.astype(np.float32)).mean() > 0.99  # sums of 3 in another order


def test_wrong_use_is_refused():
    x = np.zeros((5, 2), np.float32)
    with pytest.raises(UserError, match="features must be of at least 6 images .*, got 5"):
        neighbours.compare(x, x)
    with pytest.raises(ValueError, match="arithmetic must be one of .*, got 'bfloat16'"):
        neighbours.compare(x, x, arithmetic="bfloat16")


def measure():
    """Precision, seconds, CPU seconds and the largest memory in GB of 10,000 x 10,000 images."""
    real, fake = (evaluation.pool_like(tag, 10_000) for tag in ("real", "fake"))
    jax.block_until_ready(neighbours._distances(real[:10], fake[:10], half=True))
    started, clock = time.perf_counter(), time.process_time()
    precision = float(scores(real, fake, arithmetic="float16")["precision"])
    spent = time.perf_counter() - started, time.process_time() - clock
    return precision, *spent, devices.peak_memory() / 1e9


@pytest.mark.slow
def test_ten_thousand_images_take_under_a_minute_and_little_memory():
    """Measured in a new process: the largest memory of this one may come from other tests."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    precision, seconds, cpu_seconds, memory = json.loads(done.stdout)
    print(f"{precision:.4f}, {seconds:.0f} s, {cpu_seconds:.0f} s of CPU, {memory:.1f} GB")
    assert 0 < precision < 1
    assert cpu_seconds < 2 * 60 and memory < 4  # two cores


if __name__ == "__main__":
    print(json.dumps(measure()))
