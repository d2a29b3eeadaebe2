"""What a step of MeanFlow costs beside one of flow matching, counted in the program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval
from modules import count_products

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


@functools.cache
def multiply_adds(remat, process, **options):
    """Of one gradient of DiT-S/2 on eight latents of 32x32."""
    config, made = configure(process), processes.make(Diffusion(process=process, **options))
    apply = dit.make_apply(config, remat=remat, forward=process != "linear")
    loss = steps.make_loss(timed(apply, made), made, {"y": 1000})
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    batch = {"x0": jnp.zeros((8, 32, 32, 4)), "label": jnp.zeros(8, jnp.int32)}
    make = functools.partial(steps.make_examples, process=made, class_dropout_prob=0.1)
    examples = jax.eval_shape(make, jax.random.key(0), batch)

    def gradient(params, examples):
        return jax.grad(loss, has_aux=True)(params, examples)[0]

    jaxpr = jax.make_jaxpr(gradient)(params, examples).jaxpr
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
