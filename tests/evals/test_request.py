import json

import numpy as np
import pytest
import random_run

from dit_jax.errors import UserError
from dit_jax.evals import judge, request

RECEIPT = {"arguments": {"samples": "runs/a", "num_samples": 100, "sampling": {"cfg_scale": 2.0}}}


def save_meta(step, **meta):
    """A step that has no parameters, and says what they would be."""
    (step / "meta").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    (step / "meta/metadata").write_text(json.dumps(meta))


def save(path, count, size=8, **arrays):
    images = np.zeros((count, size, size, 3), np.uint8)
    np.savez(path, **({"arr_0": images} | arrays))
    return str(path)


def test_the_fewest_samples_are_those_of_the_scores():
    assert request.FEWEST == judge.FEWEST


def test_a_receipt_keeps_a_request():
    found = request.Request.from_receipt(RECEIPT, "receipt.json")
    assert (found.samples, found.num_samples, found.sampling) == ("runs/a", 100, {"cfg_scale": 2.0})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": "red"}, "receipt must be of known arguments, got colour in receipt.json"),
        ({"samples": None}, "samples must be text, got None"),
        ({"samples": 7}, "samples must be text, got 7"),
        ({"weights": "emma"}, "weights must be ema or params, got 'emma'"),
        ({"seed": -1}, "seed must be in 0 .. 4294967295, got -1"),
        ({"num_samples": "100"}, "num_samples must be a whole number, got '100'"),
        ({"num_samples": 100.5}, "num_samples must be a whole number, got 100.5"),
        ({"num_samples": True}, "num_samples must be a whole number, got True"),
        ({"num_samples": 5}, "num_samples must be in 6 .. 10000000, got 5"),
        ({"num_samples": 10**12}, "num_samples must be in 6 .. 10000000, got 1000000000000"),
        ({"bootstrap": 1}, "bootstrap must be 0 or in 2 .. 10000, got 1"),
        ({"bootstrap": 10**9}, "bootstrap must be 0 or in 2 .. 10000, got 1000000000"),
        ({"fid_infinity": 1}, "fid_infinity must be true or false, got 1"),
        ({"vae_dtype": "float16"}, "vae_dtype must be float32 or bfloat16, got 'float16'"),
        ({"sampling": None}, "sampling must be an object, got None"),
        ({"sampling": {"cfg_scal": 2}}, "there is no field cfg_scal; did you mean"),
        ({"preset": "table-2"}, "preset must be one of paper-256, "),
    ],
)
def test_wrong_arguments_of_a_receipt_are_one_line(change, message):
    content = {"arguments": RECEIPT["arguments"] | change}
    with pytest.raises(UserError) as error:
        request.Request.from_receipt(json.loads(json.dumps(content)), "receipt.json").check()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_receipt_without_samples_is_one_line():
    with pytest.raises(UserError, match="must have arguments.samples, got receipt.json without it"):
        request.Request.from_receipt({"arguments": {"seed": 1}}, "receipt.json")


def test_images_and_references_are_checked_before_any_work(tmp_path):
    save_meta(tmp_path / "inception/0", inception={})
    save_meta(tmp_path / "run/checkpoints/30", model=random_run.MODEL, config=random_run.CONFIG)
    run, given = f"{tmp_path}/run", {"inception": f"{tmp_path}/inception"}
    good, few = save(tmp_path / "good.npz", 8), save(tmp_path / "few.npz", 5)
    large = save(tmp_path / "large.npz", 8, size=16)
    (tmp_path / "notes.txt").write_text("x")
    cases = [
        ((few, good), {}, f"samples must be at least 6 images, got 5 in {few}"),
        ((good, few), {}, f"reference must have at least 6 images, got 5: {few}"),
        ((good, large), {}, f"reference must have images of 8 x 8, got 16 x 16 in {large}"),
        ((run, large), {}, f"reference must have images of 8 x 8, got 16 x 16 in {large}"),
        ((run, "none.npz"), {}, "reference must be an .npz of ADM's format that exists, got none"),
        ((good, good), {"num_samples": 9}, "num_samples must be at most 8, which are in"),
        ((good, good), {"inception": run}, "inception must be a folder that `dit-convert incep"),
        ((good, good), {"inception": "no"}, "inception must be a folder that `dit-convert incep"),
        ((f"{tmp_path}/notes.txt", good), {}, "samples must be a folder of images or an .npz"),
    ]
    for (samples, reference), options, message in cases:
        with pytest.raises(UserError) as error:
            request.Request(samples, reference, **(given | options)).check()
        assert message in str(error.value)
    request.Request(good, good, **given).check()
    request.Request(run, good, **given).check()
