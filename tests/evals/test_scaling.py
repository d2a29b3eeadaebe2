import json

import numpy as np
import pytest
from receipts import FID, PAPER, receipt, run, runs_of_paper

from dit_jax import settings
from dit_jax.errors import UserError
from dit_jax.evals import scaling


def test_the_trend_of_the_paper():
    gflops, fids = zip(*PAPER.values(), strict=True)
    trend = scaling.trend(gflops, fids)
    assert round(trend.correlation, 2) == -0.93  # as under fig. 8
    assert trend.exponent == pytest.approx(-0.36, abs=0.005)


def test_the_trend_of_an_exact_power_law():
    gflops = np.array([0.1, 1.0, 7.0, 90.0])
    trend = scaling.trend(gflops, 20 * gflops**-0.5)
    assert trend.exponent == pytest.approx(-0.5) and trend.factor == pytest.approx(20)
    line = scaling.trend(gflops, 3 - np.log(gflops))  # a line in log Gflops
    assert line.correlation == pytest.approx(-1) and line.exponent is None  # one is negative


@pytest.mark.parametrize(
    "gflops, values", [([1, 2], [3, 4]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 4], [5] * 3)]
)
def test_there_is_no_trend_of_two_models_or_of_equal_ones(gflops, values):
    assert scaling.trend(gflops, values) is None


def test_compute_of_training_is_counted_as_in_the_paper():
    each = run("XL/2", gflops=118.64, value=19.47)
    assert each.training_gflops(400_000) == pytest.approx(118.64 * 256 * 400_000 * 3)
    assert each.steps == [100_000, 200_000, 400_000]
    assert each.loss_at(400_000) == each.losses[1][-1]


@pytest.mark.parametrize(
    "score, low",
    [
        *((FID, True), ("sFID-10K (ADM)", True), ("KID", True)),
        ("Frechet distance (classifier features)", True),
        *(("inception score", False), ("precision", False), ("recall", False)),
    ],
)
def test_distances_are_good_if_low(score, low):
    assert scaling.lower_is_better(score) == low


def test_the_score_is_the_first_that_all_receipts_have():
    a, b = receipt(score="sFID"), receipt(score="KID")
    for each in (a, b):
        each["scores"] |= {"recall": {"value": 0.5}, "precision": {"value": 0.7}}
    assert scaling.common_score([a, b]) == "recall"
    assert scaling.common_score([a, b], "precision") == "precision"
    assert scaling.value(a, "recall") == 0.5 and scaling.deviation(a, "recall") is None
    with pytest.raises(UserError, match="^score must be one of recall, precision, got 'KID'"):
        scaling.common_score([a, b], "KID")
    b["scores"]["recall"]["value"] = float("nan")
    with pytest.raises(UserError, match="^recall must be finite in all receipts, got nan of runs/"):
        scaling.common_score([a, b])
    with pytest.raises(UserError, match="^receipts must have a score in common, got KID, sFID$"):
        scaling.common_score([receipt(score="sFID"), receipt(score="KID")])


@pytest.mark.parametrize(
    "change, name",
    [
        ({"count": 10_000}, "count, got 50000 of runs/Ti/4 and 10000 of runs/S/4"),
        ({"weights": "params"}, "weights, got 'ema' of"),
        (
            {"sampling": {"sampler": "ddim", "num_steps": "ddim25", "cfg_scale": 1.5}},
            "sampling.cfg_",
        ),
    ],
)
def test_scores_of_other_samples_cannot_be_compared(change, name):
    with pytest.raises(UserError, match=f"^receipts must have the same {name}"):
        scaling.check_comparable([receipt(), receipt("S/4", **change)])


@pytest.mark.parametrize("name", ["network", "reference"])
def test_scores_by_another_network_or_reference_cannot_be_compared(name):
    other = receipt() | {name: {"network": "classifier"}}
    with pytest.raises(UserError, match=f"^receipts must have the same {name}, got "):
        scaling.check_comparable([receipt(), other])


def test_what_differs_in_a_network_is_shown():
    same = {f"field_{i}": i for i in range(9)}
    receipts = [receipt() | {"network": same | {"seed": seed}} for seed in (0, 5)]
    with pytest.raises(UserError, match=r"same network, got {'seed': 0} of .* {'seed': 5} of"):
        scaling.check_comparable(receipts)


def test_what_a_sweep_varies_and_the_seed_may_differ():
    sampling = receipt()["samples"]["sampling"] | {"cfg_scale": 4.0}
    receipts = [receipt(), receipt(sampling=sampling, step=7, seed=3)]
    scaling.check_comparable(receipts, free=["cfg_scale"])


def test_an_older_receipt_has_the_usual_values_of_what_was_not_an_option_yet():
    old = receipt()
    new = json.loads(json.dumps(vars(settings.Sampling()) | old["samples"]["sampling"]))
    scaling.check_comparable([old, receipt(sampling=new), old])
    other = receipt(sampling=new | {"omega_interval": [0, 0.5]})
    with pytest.raises(UserError, match=r"same sampling.omega_interval, got \[0, 1\] of .*, 0.5\]"):
        scaling.check_comparable([old, other])


def test_runs_are_compared_at_the_last_step_that_all_have():
    steps = [(100, 200, 300), (100, 200), (50, 100, 200, 400)]
    runs = [run("Ti/4", gflops=1, value=1, steps=each) for each in steps]
    assert scaling.common_step(runs) == 200
    runs.append(run("S/4", "adaln", gflops=1, value=1, steps=(60,)))
    with pytest.raises(
        UserError, match=r"^runs must be scored at one common step, got .*S/4 adaln"
    ):
        scaling.common_step(runs)


def test_without_guidance_its_other_fields_may_differ():
    """A path's interval ends at 1, that of DDPM at 999."""
    plain = {"sampler": "ddim", "num_steps": "50", "cfg_scale": 1.0}
    given = [
        receipt(sampling=plain | {"cfg_interval": interval}) for interval in ([0, 999], [0, 1])
    ]
    scaling.check_comparable(given)
    for each in given:
        each["samples"]["sampling"]["cfg_scale"] = 2.0
    with pytest.raises(UserError, match="^receipts must have the same sampling.cfg_interval"):
        scaling.check_comparable(given)


def test_repetitions_are_pooled_at_the_steps_that_all_have():
    runs = [run("Ti/4", gflops=1, value=y, steps=(100, 200)) for y in (1.0, 2.0)]
    runs[0] = runs[0]._replace(times=([0, 200], [0, 10]))
    runs[1] = runs[1]._replace(times=([0, 100, 200], [0, 20, 30]), receipts=runs[1].receipts[1:])
    pooled = scaling.pool(runs)
    assert pooled.steps == [200] and pooled.seeds == 2
    found = pooled.receipt_at(200)
    assert (
        scaling.value(found, FID) == 1.5
        and scaling.deviation(found, FID) == np.std([1, 2]) * 2**0.5
    )
    assert pooled.seconds_at(200) == 20 and pooled.losses == runs[0].losses
    assert scaling.pool(runs[:1]) is runs[0]
    assert scaling.pool([runs[0], runs[1]._replace(times=None)]).seconds_at(200) is None


@pytest.mark.parametrize(
    "score, values, target, step",
    [
        (FID, (9, 7, 3), 5, 250),
        (FID, (9, 7, 3), 7, 200),
        (FID, (9, 7, 3), 20, 100),  # not later than the first score
        (FID, (9, 7, 3), 2, None),
        (FID, (9, 4, 8), 5, 180),  # the first time
        ("recall", (0.1, 0.2, 0.6), 0.3, 225),
    ],
)
def test_the_step_at_which_a_score_is_reached(score, values, target, step):
    receipts = [
        receipt(value=value, step=at, score=score)
        for value, at in zip(values, (100, 200, 300), strict=True)
    ]
    each = run("Ti/4", gflops=1, value=1)._replace(receipts=receipts)
    found = scaling.steps_until(each, score, target)
    assert found == step or found == pytest.approx(step)


@pytest.mark.parametrize(
    "seconds, unit",
    [
        *(([None, 5.0], "seconds"), ([100, 179], "seconds"), ([100, 180], "minutes")),
        *(([4 * 3600], "hours"), ([None], "seconds")),
    ],
)
def test_times_have_a_unit_of_their_size(seconds, unit):
    name, size = scaling.time_unit(seconds)
    assert name == unit and size == scaling.TIMES[unit]


def test_the_network_is_called_once_a_step_unless_the_receipt_counts_its_calls():
    each = receipt()
    assert scaling.calls(each) == 25
    each["model"]["calls"] = 49
    assert scaling.calls(each) == 49


def test_the_table_has_a_line_for_each_run():
    rows = scaling.rows(runs_of_paper(), 400_000, FID)
    lines = scaling.table(rows, FID).splitlines()
    assert len(lines) == 13 and lines[0].endswith(FID)
    assert lines[1].split() == [
        "S/8",
        "adaln_zero",
        "360,000",
        "0.36",
        "0.1522",
        "153.6",
        "+-",
        "3.1",
    ]
    rows[0]["deviation"] = None
    assert scaling.table(rows, FID).splitlines()[1].endswith("  153.6")
