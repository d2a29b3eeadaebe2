"""Training gives the same result on every mesh of eight devices."""

import functools
import itertools

import jax
import numpy as np
import pytest

from configs import imagenet256, meanflow
from dit_jax.data import loader, synthetic
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.runs import build
from dit_jax.train import step as steps

MESHES = {
    "data": {},
    "zero1": {"shard_optimizer": True},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2, "shard_optimizer": True},
}
BATCH, STEPS = 16, 4
JIT = {  # the parts of pixel transformers, beside adaLN-Zero
    **{"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True, "bottleneck": 8},
    **{"class_tokens": 4, "class_tokens_from": 1},
}


def make_parts(mesh, design, **compute):
    """design: a conditioning, or "jit", or "mean_flow", which is guided and accumulates."""
    config = (meanflow if design == "mean_flow" else imagenet256).get_config("Ti/4")
    config.model.input_size, config.model.num_classes = (8, 8), 10
    if design == "jit":
        config.model.update(JIT)
        config.model.size = "Pi"  # whose MLP of width 170 two devices can share
    elif design == "mean_flow":
        config.model.size, config.train.accumulation_steps = "Pi", 2
    else:
        config.model.conditioning = design
    config.compute.dtype = "float32"
    config.compute.update(compute)
    config.train.batch_size, config.train.learning_rate = BATCH, 1e-3
    config.mesh.update({"shard_optimizer": False} | mesh)
    return build.parts(build.read(config))


class Posteriors(synthetic.Synthetic):
    """Posteriors of latents, from which every step draws x0."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return {"posterior": np.tile(example["x0"], 2), "label": example["label"]}


def flip(example, rng):
    return example | {"posterior": example["posterior"][:, :: rng.choice([1, -1])]}


def batches(parts):
    return loader.batches(
        Posteriors((8, 8, 4), 10),
        batch_size=BATCH,
        seed=0,
        start=0,
        sharding=sharding.of_batch(parts.mesh),
        augment=flip,
    )


def train(parts, count):
    """The metrics of `count` steps and the last state."""
    key = jax.random.key(1)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        state, step, out = parts.create_state(key), parts.jit_step(), []
        for batch in itertools.islice(batches(parts), count):
            state, metrics = step(state, batch, key)
            out.append(jax.device_get(metrics))
    return out, state


def make_example(parts):
    """The first batch as a step draws it: x0, t, noise and labels."""

    def make(batch):
        key = jax.random.key(2)
        return steps.make_examples(key, batch, parts.process, class_dropout_prob=0.5)

    return jax.jit(make)(next(batches(parts)))


@pytest.fixture(scope="module")
def alone():
    """alone(conditioning) -> example, metrics and state of a run with a replicated model."""

    @functools.cache
    def make(conditioning):
        parts = make_parts(MESHES["data"], conditioning)
        return jax.device_get(make_example(parts)), *train(parts, STEPS)

    return make


@pytest.mark.parametrize(
    "name, conditioning",
    [
        ("mixed", "adaln_zero"),
        *(
            pytest.param(name, conditioning, marks=pytest.mark.slow)
            for name, conditioning in [
                *((name, "adaln_zero") for name in ("zero1", "fsdp", "tensor")),
                *((name, "cross_attention") for name in MESHES if name != "data"),
                *((name, "mean_flow") for name in ("zero1", "fsdp", "tensor", "mixed")),
                ("mixed", "jit"),
            ]
        ),
    ],
)
def test_every_mesh_gives_the_same_training(alone, name, conditioning):
    parts = make_parts(MESHES[name], conditioning)
    example, metrics, state = alone(conditioning)
    jax.tree.map(np.testing.assert_array_equal, make_example(parts), example)  # exactly
    ours, our_state = train(parts, STEPS)
    for one, two in zip(metrics, ours, strict=True):
        for key, value in one.items():  # float32 sums in another order, for some steps
            assert two[key] == pytest.approx(value, rel=1e-4), key
    templates = jax.tree.leaves(parts.abstract_state())
    for x, template in zip(jax.tree.leaves(our_state), templates, strict=True):
        assert x.sharding.is_equivalent_to(template.sharding, x.ndim)
    for x, y in zip(jax.tree.leaves(state.ema), jax.tree.leaves(our_state.ema), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["adaln_zero", "mean_flow"])
@pytest.mark.parametrize("options", [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}])
def test_remat_and_unroll_do_not_change_the_training_of_a_sharded_model(alone, options, design):
    ours, _ = train(make_parts(MESHES["mixed"], design, **options), 2)
    for one, two in zip(alone(design)[1], ours, strict=False):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_mean_flow_in_bfloat16_trains_as_in_float32(alone):
    ours, _ = train(make_parts(MESHES["mixed"], "mean_flow", dtype="bfloat16"), STEPS)
    for one, two in list(zip(alone("mean_flow")[1], ours, strict=True))[
        1:
    ]:  # first: the output is 0
        assert two["mse"] != one["mse"]
        assert two["mse"] == pytest.approx(one["mse"], rel=0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_a_sharded_model_needs_less_memory_on_each_device(name):
    whole, sharded = (make_parts(MESHES[key], "adaln_zero") for key in ("data", name))

    def size(parts):
        leaves = jax.tree.leaves(parts.abstract_state())
        shards = [x.sharding.shard_shape(x.shape) for x in leaves]
        return sum(int(np.prod(shard)) for shard in shards)

    assert size(sharded) < 0.27 * size(whole)


@pytest.mark.parametrize(
    "mesh, message",
    [
        ({"tensor": 8}, "mesh.tensor must divide the 4 heads of Ti, got 8"),
        ({"data": 3}, "mesh must be of 8 devices, got data 3 x fsdp 1 x tensor 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_parts(mesh, "adaln_zero")


def test_a_batch_that_the_mesh_cannot_divide_is_refused():
    config = imagenet256.get_config("Ti/4")
    config.train.batch_size = 4
    with pytest.raises(UserError, match=r"train.batch_size must be divisible by 8 \(mesh.data x"):
        build.parts(build.read(config))
    config.mesh.tensor = 2
    assert build.parts(build.read(config)).mesh.shape["data"] == 4
