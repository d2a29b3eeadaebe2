import jax
import jax.numpy as jnp
import pytest
from modules import count_products

from dit_jax.models import dit, fields, flops

CONDITIONINGS = fields.DESIGNS


@pytest.mark.parametrize(
    "size, patch_size, gmacs",
    [
        *(("S", 8, 0.358), ("S", 4, 1.413), ("S", 2, 6.056)),
        *(("B", 8, 1.418), ("B", 4, 5.565), ("B", 2, 23.005)),
        *(("L", 8, 5.011), ("L", 4, 19.696), ("L", 2, 80.698)),
        *(("XL", 8, 7.392), ("XL", 4, 29.044), ("XL", 2, 118.621)),
    ],
)
def test_multiply_adds_of_table_4(size, patch_size, gmacs):
    count = flops.multiply_adds(dit.configure(size, patch_size))
    assert count / 1e9 == pytest.approx(gmacs, rel=1e-4, abs=5e-4)  # abs: of the last digit


@pytest.mark.parametrize(
    "options, gmacs",
    [
        ({"conditioning": "in_context"}, 119.354),
        ({"conditioning": "cross_attention"}, 137.603),
        ({"conditioning": "adaln"}, 118.547),
        ({"input_size": (64, 64)}, 524.538),
    ],
)
def test_multiply_adds_of_other_designs_of_xl(options, gmacs):
    count = flops.multiply_adds(dit.configure("XL", 2, **options))
    assert count / 1e9 == pytest.approx(gmacs, rel=1e-5)


@pytest.mark.parametrize(
    "size, patch_size, parameters, gmacs",
    [
        *(("B", 4, 131_165_248, 5.56), ("B", 2, 131_091_472, 23.00)),
        *(("M", 2, 308_019_216, 53.80), ("L", 2, 459_137_040, 80.69)),
        ("XL", 2, 676_440_592, 118.62),
    ],
)
def test_parameters_and_multiply_adds_of_mean_flow(size, patch_size, parameters, gmacs):
    config = dit.configure(size, patch_size, learn_sigma=False, conditions=("t", "h", "y"))
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    assert flops.multiply_adds(config) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": (8, 4), "in_channels": 3, "learn_sigma": False},
        {"input_size": (16, 16), "in_channels": 4, "learn_sigma": True},
        {"input_size": (8, 4), "mlp": "swiglu", "position": "rope", "norm": "rms", "qk_norm": True}
        | {"bottleneck": 7, "class_tokens": 5, "class_tokens_from": 3},
    ],
)
def test_multiply_adds_are_those_of_the_program(conditioning, options):
    config = dit.configure("Ti", 2, conditioning=conditioning, **options)
    examples = 3
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    x = jnp.zeros((examples, *config.input_size, config.in_channels))
    step = jnp.zeros(examples, jnp.int32)
    program = jax.make_jaxpr(dit.make_apply(config))(params, x, t=step, y=step)
    assert count_products(program.jaxpr) == examples * flops.multiply_adds(config)


@pytest.mark.parametrize(
    "options", [{}, {"mlp": "swiglu", "bottleneck": 7, "class_tokens": 5, "class_tokens_from": 3}]
)
def test_multiply_adds_of_a_tangent_are_those_of_the_program(options):
    config = dit.configure("Ti", 2, input_size=(8, 4), **options)
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    apply = dit.make_apply(config, forward=True)

    def derivative(params, x, t):
        return jax.jvp(lambda x, t: apply(params, x, t=t, y=jnp.int32([3])), (x, t), (x, t))

    program = jax.make_jaxpr(derivative)(params, jnp.zeros((1, 8, 4, 4)), jnp.zeros(1))
    early = config.class_tokens_from
    tokens = [8] * early + [8 + config.class_tokens] * (config.depth - early)
    again = sum(each**2 for each in tokens) * config.hidden_size  # the rule repeats the logits
    expected = flops.multiply_adds(config) + flops.tangent_multiply_adds(config) + again
    assert count_products(program.jaxpr) == expected


def test_flops_of_a_forward_pass_and_of_a_training_step():
    config = dit.configure("S", 8)
    assert flops.forward_flops(config) == 2 * flops.multiply_adds(config)
    assert flops.train_flops(config) == 6 * flops.multiply_adds(config)
    tangent = 2 * flops.tangent_multiply_adds(config)
    work = flops.train_flops(config, forwards=2, tangents=1)
    assert work == 5 * flops.forward_flops(config) + tangent
