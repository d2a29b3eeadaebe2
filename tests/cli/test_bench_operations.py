import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from dit_jax.cli import bench
from dit_jax.models import flops
from dit_jax.runs import build, operations

SMALL = ("configs/digits.py:Pi/4", "--config.train.batch_size=8", "--repeats=2", "--warmup=1")
NAMES = ["norm", "qkv", "attention", "proj", "fc1", "gelu", "fc2", "residual", "modulation"]


def test_each_operation_is_a_row(call, tmp_path):
    out = tmp_path / "operations.json"
    with jax.numpy_dtype_promotion("standard"):
        code, printed, _ = call(bench, "operations", *SMALL, f"--out={out}", "--peer")
    assert code == 0
    figures = json.loads(out.read_text())
    rows = figures["rows"]
    assert [each["operation"] for each in rows] == [*NAMES, "update", "rest"]
    assert sum(each["share"] for each in rows) == pytest.approx(1)
    for each in rows[:-1]:
        whole = each["count"] * each["seconds_median"] / figures["step_seconds_median"]
        assert each["share"] == pytest.approx(whole) and each["seconds_median"] > 0
        ratio = each["torch_seconds_median"] / each["seconds_median"]
        assert each["dit_jax_over_torch"] == pytest.approx(ratio)
        assert f"\n{each['operation']} " in printed


@pytest.fixture(scope="module")
def small():
    """(settings of eight examples, their operations)."""
    config = digits.get_config("Pi/2")
    config.train.batch_size = 8
    settings = build.read(config)
    return settings, operations.make(settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_peer_computes_the_same(small, name):
    """Outputs and gradients of all inputs, so that both do the same work."""
    from dit_jax.convert import torch_operations

    _, made = small
    arrays = operations.draw(made[name])
    out, grads = operations.differentiate(made[name].apply, *map(jnp.asarray, arrays))
    peer_out, peer_grads = torch_operations.make(name, arrays, dtype="float32")()
    assert len(grads) == len(peer_grads)
    for ours, theirs in zip((out, *grads), (peer_out, *peer_grads), strict=True):
        theirs = theirs.detach().numpy()
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_products_of_the_operations_are_those_of_the_blocks(small):
    settings, made = small
    model = build.parts(settings).model
    tokens = settings.train.batch_size * model.num_tokens
    total = 0
    for name in ("qkv", "proj", "fc1", "fc2", "modulation"):
        rows, kernel, _ = made[name].shapes
        total += made[name].count * 2 * math.prod(rows[:-1]) * math.prod(kernel)
    total += made["attention"].count * 4 * tokens * model.num_tokens * model.hidden_size
    embedders = settings.train.batch_size * flops.forecast_flops(model)
    assert total == settings.train.batch_size * flops.forward_flops(model) - embedders


def test_a_step_with_a_derivative_inside_is_refused(refuse):
    message = "diffusion.process must not be a mean flow for operations, got mean_flow"
    assert refuse(bench, "operations", "configs/digits_meanflow.py").endswith(message)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config.model.conditioning=adaln"], "model.conditioning must be adaln_zero for oper"),
        (["--config.model.norm=rms"], "model.norm must be layer for operations"),
        (["--config.train.accumulation_steps=2"], "train.accumulation_steps must be 1 for oper"),
        (["--config.train.frozen=blocks"], "train.frozen must be () for operations"),
        (["--config.train.optimizer=muon", "--peer"], "train.optimizer must be adamw for --peer"),
        (["--sweep"], "sweep must be false for operations"),
        (["--growth=x.png"], "growth must be left out for operations"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(refuse, options, message):
    assert message in refuse(bench, "operations", *SMALL, *options)
