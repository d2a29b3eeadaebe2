"""What a step of MeanFlow costs beside one of flow matching, counted in the program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval
from modules import count_compiled_products, count_products

from dit_jax.diffusion import processes
from dit_jax.diffusion.process import timed
from dit_jax.models import dit, flops
from dit_jax.settings import Diffusion
from dit_jax.train import step as steps

CONDITIONS = {
    "linear": ("t", "y"),
    "mean_flow": ("t", "h", "y"),
    "improved_mean_flow": ("t", "h", "omega", "t_min", "t_max", "y"),
}


def configure(process):
    return dit.configure("S", 2, learn_sigma=False, conditions=CONDITIONS[process])


def gradient(config, process, **options):
    """A gradient of the loss of eight examples, and its arguments."""
    apply = dit.make_apply(config, forward=process.passes.tangents > 0, **options)
    loss = steps.make_loss(timed(apply, process), process, {"y": config.num_classes})
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    x0 = jnp.zeros((8, *config.input_size, config.in_channels))
    batch = {"x0": x0, "label": jnp.zeros(8, jnp.int32)}
    make = functools.partial(steps.make_examples, process=process, class_dropout_prob=0.1)
    examples = jax.eval_shape(make, jax.random.key(0), batch)

    def run(params, examples):
        return jax.grad(loss, has_aux=True)(params, examples)[0]

    return run, (params, examples)


@functools.cache
def multiply_adds(remat, process, **options):
    """Of one gradient of DiT-S/2 on eight latents of 32x32."""
    made = processes.make(Diffusion(process=process, **options))
    run, args = gradient(configure(process), made, remat=remat)
    jaxpr = jax.make_jaxpr(run)(*args).jaxpr
    return count_products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


@pytest.mark.parametrize(
    "remat, plain, one_pass, two_passes",
    [
        ("none", 1.38, 1.70, 2.03),
        pytest.param("dots", 1.38, 1.70, 2.03, marks=pytest.mark.slow),
        ("full", 1.28, 1.53, 1.78),
    ],
)
def test_a_step_costs_what_its_passes_cost(remat, plain, one_pass, two_passes):
    base = multiply_adds(remat, "linear")
    found = [
        multiply_adds(remat, "mean_flow", kappa=0.0),
        multiply_adds(remat, "mean_flow", omega=2.0, kappa=0.0),
        multiply_adds(remat, "mean_flow"),
        multiply_adds(remat, "improved_mean_flow"),
    ]
    ratios = [count / base for count in found]
    assert ratios == pytest.approx([plain, one_pass, two_passes, two_passes], rel=0.02)


@pytest.mark.parametrize(
    "process, options, forwards, tangents",
    [
        ("linear", {}, 0, 0),
        ("mean_flow", {"kappa": 0.0}, 0, 1),
        ("mean_flow", {"omega": 2.0, "kappa": 0.0}, 1, 1),
        ("mean_flow", {}, 2, 1),
        ("improved_mean_flow", {}, 2, 1),
    ],
)
def test_the_flops_of_a_step_are_those_of_the_program(process, options, forwards, tangents):
    config, made = configure(process), processes.make(Diffusion(process=process, **options))
    assert made.passes == (forwards, tangents)
    work = 4 * flops.train_flops(config, **made.passes._asdict())  # 8 examples, multiply-adds
    logits = config.depth * config.num_tokens**2 * config.hidden_size
    repeated = 8 * logits * (1 + tangents)  # in the backward pass and in the rule of the jvp
    assert multiply_adds("none", process, **options) == pytest.approx(work + repeated, rel=2e-3)


@pytest.mark.parametrize("head_depth", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_compiled_step_runs_the_blocks_of_one_head_where_it_needs_one(head_depth):
    """The passes for the guidance need the velocity only, and the tangent only the average."""
    parts = {"conditioning": "in_context_zero", "position": "rope_1d", "mlp": "swiglu"}
    parts |= {"velocity_head": True, "head_depth": head_depth, "learn_sigma": False}
    conditions = CONDITIONS["improved_mean_flow"][1:]
    config = dit.configure("Na", 2, input_size=(8, 8), conditions=conditions, **parts)
    made = processes.make(Diffusion(process="improved_mean_flow", time_scale=1.0))
    run, args = gradient(config, made, unroll=True)
    found = count_compiled_products(jax.jit(run).lower(*args).compile().as_text())
    work = 4 * flops.train_flops(config, **made.passes._asdict())  # 8 examples, multiply-adds
    assert found == pytest.approx(work, rel=0.01)  # not the embedder of the first jvp
