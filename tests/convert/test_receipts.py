"""Which receipts of dit-evaluate belong to parameters, and what is read from them."""

import json

import pytest

from dit_jax.convert import receipts
from dit_jax.errors import UserError

SAMPLING = {"sampler": "ddim", "num_steps": "ddim25", "cfg_scale": 2.0, "clip_x0": True}
KNOWN = {"step": 30, "weights": "ema", "digest": "abc"}


def judgments(**changes):
    """The content of a judgments.json."""
    return {
        **{"step": 30, "weights": "ema", "seed": 0, "sampling": SAMPLING},
        "samples": {"guided": 1000, "unguided": 1500},
        "judgments": {"agreement": 1.0, "classifier_accuracy": 0.99, "frechet_distance": 0.7},
    } | changes


def receipt(**samples):
    """The content of a receipt.json."""
    about = {"count": 1, "seed": 3, "sampling": SAMPLING, **KNOWN}
    return {
        "samples": about | samples,
        "network": {"network": "classifier", "held_out_accuracy": 0.9},
        "reference": {"training_images": 60000},
        "scores": {"recall": {"value": 0.5, "deviation": 0.01}},
        "held_out": {"recall": 0.9},
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_scores_are_read_with_those_of_real_images(tmp_path):
    found = receipts.read(write(tmp_path / "judgments.json", judgments()))
    assert found.scores == [
        receipts.Score("agreement with the label", 1.0, None, 0.99),
        receipts.Score("Frechet distance (pixels)", 0.7, None, None),
    ]
    assert "1,000 samples with guidance and 1,500 without, `sampler=ddim`" in found.title
    found = receipts.read(write(tmp_path / "receipt.json", receipt()).parent)  # of a folder
    assert found.scores == [receipts.Score("recall", 0.5, 0.01, 0.9)]
    assert found.title == (
        "dit-evaluate: 1 sample, `sampler=ddim`, `num_steps=ddim25`, `cfg_scale=2.0`, `clip_x0`, "
        "seed 3; compared with 60000 training images, by a classifier of the training data, right "
        "about 90.0% of held-out images"
    )


def test_receipts_in_a_run_are_chosen_by_their_parameters(tmp_path, caplog):
    kept = [
        write(tmp_path / "evaluation/receipt.json", receipt()),
        write(tmp_path / "judgments.json", judgments()),  # older ones have no digest
        write(tmp_path / "scores/30/receipt.json", receipt(step=0)),  # converted: another step
    ]
    write(tmp_path / "scores/20/receipt.json", receipt(step=20, digest="other"))
    write(tmp_path / "scores/a.json", judgments(weights="params"))
    write(tmp_path / "scores/b.json", judgments(digest="other"))
    (tmp_path / "scores/c.json").write_text("{")
    found = receipts.choose((), tmp_path, **KNOWN)
    assert [each.path for each in found] == sorted(kept)
    assert "c.json is left out: " in caplog.text
    assert list(receipts.names(found)) == [
        *("scores/receipt.json", "scores/judgments.json", "scores/receipt-2.json")
    ]
    assert receipts.choose((), tmp_path / "nowhere", **KNOWN) == []


def test_given_receipts_replace_those_of_the_run(tmp_path):
    write(tmp_path / "judgments.json", judgments())
    given = write(tmp_path / "other/x.json", receipt())
    (found,) = receipts.choose([given], tmp_path, **KNOWN)
    assert found.path == given


@pytest.mark.parametrize(
    "content, message",
    [
        (receipt(digest="x", step=20), "of the ema of step 30 of .*x.json of the ema of step 20 o"),
        (receipt(digest=None, step=None, weights=None), "got .*x.json of images that exist"),
        (judgments(step=20), "got .*x.json of the ema of step 20"),
        ({}, "scores must be a file that dit-evaluate wrote, got .*x.json without 'scores'"),
        ({"judgments": {}}, "wrote, got .*x.json without 'step'|without 'samples'"),
        (receipt() | {"scores": {"recall": 1}}, "scores must be a file that dit-evaluate wrote"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        receipts.choose([write(tmp_path / "x.json", content)], tmp_path, **KNOWN)
