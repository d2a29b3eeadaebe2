"""Inception against torch-fidelity and ADM's evaluator in TensorFlow, with weights by formula."""

import jax
import numpy as np
import pytest
from testdata import evaluation

from dit_jax.convert import torch_inception
from dit_jax.models import inception

# Float32 sums of up to 4608 products, in another order, through 94 convolutions. 1.7e-5 was seen.
BOUND = 1e-4
SIZES = {f"{height}x{width}": (height, width) for height, width in evaluation.SIZES}


@pytest.mark.parametrize("name", SIZES)
def test_resize_is_bit_equal_to_tensorflow(golden_eval, name):
    images = evaluation.images(*SIZES[name])
    np.testing.assert_array_equal(images.sum(axis=(1, 2)), golden_eval[f"image_sum/{name}"])
    resized = np.asarray(jax.jit(inception.resize)(images))
    assert resized.shape == (4, 299, 299, 3)
    for who in ("", "tf/"):
        expected = golden_eval[f"{who}resized/{name}"]
        np.testing.assert_array_equal(resized[:, 100:116, 150:166], expected)


@pytest.mark.parametrize("name", SIZES)
def test_features_match_torch_fidelity_and_tensorflow(look, golden_eval, check_close, name):
    features, _ = look(evaluation.images(*SIZES[name]))
    for part in features._fields:
        check_close(f"{part}/{name}", getattr(features, part), golden_eval[f"{part}/{name}"], BOUND)
    for part in ("pool", "spatial"):
        expected = golden_eval[f"tf/{part}/{name}"]
        check_close(f"tf/{part}/{name}", getattr(features, part), expected, BOUND)


def test_every_stage_matches_torch_fidelity(look, golden_eval, check_close):
    _, means = look(evaluation.images(256, 256))
    assert list(means) == list(inception.STAGES)
    for name, mean in means.items():
        check_close(name, mean[3], golden_eval[f"block_mean/{name}"], BOUND)


def test_max_pools_between_stages_match_torch_fidelity(inception_weights, golden_eval, check_close):
    """The first stages alone, whose outputs the pools halve."""
    params = jax.device_put(torch_inception.from_torch(inception_weights))
    images = evaluation.images(256, 256)[3:]

    @jax.jit
    def pools(params, images):
        outputs = dict(inception.bind(params).stages(inception.resize(images)))
        return [
            inception.halving_pool(outputs[name]).mean(axis=(1, 2))
            for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
        ]

    for i, mean in enumerate(pools(params, images), start=1):
        check_close(f"MaxPool_{i}", mean[0], golden_eval[f"block_mean/MaxPool_{i}"], BOUND)


def test_logits_have_no_bias(look, golden_eval, check_close, inception_weights):
    features, _ = look(evaluation.images(256, 256))
    biased = golden_eval["logits_with_bias/256x256"]
    check_close("logits + bias", features.logits + inception_weights["fc.bias"], biased, BOUND)
    assert np.abs(features.logits - biased).max() > 1


def test_parameter_count():
    """21.8 million of the convolutions and 2.1 million of the logits; batch norms are folded."""
    counts = jax.tree.map(lambda x: x.size, inception.init())
    convolutions = jax.tree.leaves({k: x for k, x in counts.items() if k != "fc"})
    assert (len(convolutions), sum(convolutions)) == (2 * 94, 21_768_352)
    assert counts["fc"] == {"kernel": 2048 * 1008}


def test_features_do_not_follow_the_default_precision(inception_weights):
    text = (
        jax.jit(inception.apply)
        .lower(jax.eval_shape(inception.init), jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8))
        .as_text()
    )
    products = [x for x in text.splitlines() if "stablehlo.convolution" in x or "dot_general" in x]
    assert len(products) == 95 and all("HIGHEST" in x for x in products)
