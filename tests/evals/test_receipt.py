import copy

import pytest

from dit_jax.errors import UserError
from dit_jax.evals import receipt

RECEIPT = {
    "name": "paper-256",
    "arguments": {"samples": "runs/a"},
    "samples": {"checkpoint": "runs/a", "sampling": {"cfg_scale": 1.5}, "count": 50_000},
    "network": {"network": "inception", "sha256": "1"},
    "reference": {"sha256": "2"},
    "features": {"0000000.npz": "3", "0000512.npz": "4"},
    "scores": {
        "FID-50K": {"value": 2.27, "deviation": None},
        "precision": {"value": 0.83, "deviation": 0.002},
    },
    "devices": "8 x TPU v4",
    "versions": {"jax": "0.10"},
}


@pytest.fixture
def other():
    return copy.deepcopy(RECEIPT)


def test_receipts_are_read_from_files_and_folders(tmp_path):
    receipt.write(tmp_path / "receipt.json", RECEIPT)
    assert receipt.read(tmp_path) == receipt.read(tmp_path / "receipt.json") == RECEIPT


def test_other_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="must be a file that dit-evaluate wrote, got .*/nothing"):
        receipt.read(tmp_path / "nothing")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json"):
        receipt.read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"samples": {}}')
    with pytest.raises(UserError, match="must have network, got .*/y.json without it"):
        receipt.read(tmp_path / "y.json")


@pytest.mark.parametrize(
    "topic, value, message",
    [
        ("arguments", "x", "arguments of a receipt must be an object, got 'x' in"),
        ("arguments", [1], "arguments of a receipt must be an object, got [1] in"),
        ("samples", None, "samples of a receipt must be an object, got None in"),
        ("scores", [1, 2], "scores of a receipt must be an object, got [1, 2] in"),
        ("features", None, "features of a receipt must be an object, got None in"),
        ("scores", {"FID": 2.27}, "FID of a receipt must have a number as value, got 2.27:"),
        ("scores", {"FID": {"value": "low"}}, "FID of a receipt must have a number as value, got"),
        ("scores", {"FID": {}}, "FID of a receipt must have a number as value, got {}:"),
        ("scores", {"FID": {"value": 2, "deviation": "x"}}, "FID of a receipt must have a number"),
    ],
)
def test_damaged_receipts_are_one_line(other, tmp_path, topic, value, message):
    receipt.write(tmp_path / "receipt.json", other | {topic: value})
    with pytest.raises(UserError) as error:
        receipt.read(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_score_without_a_deviation_can_be_compared(other):
    other["scores"] = {"FID-50K": {"value": 2.5}}
    assert receipt.compare({"a": other}).splitlines()[1].split() == ["FID-50K", "2.5"]


def test_long_paths_show_their_ends(other):
    paths = [f"/home/someone/runs/scaling/Ti-4/checkpoints/{step}" for step in (500, 1000)]
    receipts = [other | {"samples": {"path": path}} for path in paths]
    line = receipt.compare(dict(zip("ab", receipts, strict=True))).splitlines()[-1]
    assert line.split() == ["samples.path", ".../Ti-4/checkpoints/500", "...Ti-4/checkpoints/1000"]


def test_compared_receipts_show_scores_and_what_differs(other):
    other["samples"]["sampling"]["cfg_scale"] = 1.0
    other["scores"] = {"FID-10K": {"value": 9.6, "deviation": None}}
    lines = receipt.compare({"a": RECEIPT, "b": other}).splitlines()
    assert lines[0].split() == ["a", "b"]
    assert lines[1].split() == ["FID-50K", "2.27", "-"]
    assert lines[2].split() == ["precision", "0.83", "+-", "0.002", "-"]
    assert lines[3].split() == ["FID-10K", "-", "9.6"]
    assert lines[5].split() == ["samples.sampling.cfg_scale", "1.5", "1.0"]
    assert len(lines) == 6


def test_a_repetition_is_the_same_bit_for_bit(other):
    text, repeated = receipt.check_repeated(RECEIPT, other)
    assert repeated and text.startswith("features: 2 of 2 shards are the same, bit for bit")
    other["scores"]["FID-50K"]["value"] += 1e-9  # the same features have the same scores
    text, repeated = receipt.check_repeated(RECEIPT, other)
    assert not repeated and "FID-50K: 2.27, again 2.27: DIFFERS by 4.4e-10" in text


def test_other_features_may_differ_by_rounding(other):
    other["features"]["0000512.npz"] = "5"
    other["scores"]["FID-50K"]["value"] *= 1 + 1e-5
    text, repeated = receipt.check_repeated(RECEIPT, other)
    assert repeated and "features: 1 of 2 shards" in text
    other["scores"]["FID-50K"]["value"] *= 1.001
    assert not receipt.check_repeated(RECEIPT, other)[1]
    del other["scores"]["FID-50K"]
    assert not receipt.check_repeated(RECEIPT, other)[1]
