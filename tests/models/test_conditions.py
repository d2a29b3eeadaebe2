import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import apply_linear, with_bias

from dit_jax.errors import UserError
from dit_jax.models import conditions, dit, layers


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequency():
    t = np.array([0, 1, 999])
    embedding = conditions.timestep_embedding(jnp.asarray(t, jnp.int32))
    frequency = 1e4 ** (-np.arange(128) / 128)
    angle = t[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    # float32 angles up to 999 have an error of 999 * 2^-24 = 6e-5.
    np.testing.assert_allclose(embedding, expected, atol=1e-4)


def test_timestep_embedder_is_a_silu_between_two_linears():
    embedder = with_bias(conditions.TimestepEmbedder(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    t = jnp.asarray([3, 700], jnp.int32)
    hidden = apply_linear(embedder.fc1, conditions.timestep_embedding(t))
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(embedder(t), apply_linear(embedder.fc2, hidden), atol=1e-5)


def test_a_step_may_be_a_real_number():
    embedding = conditions.timestep_embedding(jnp.asarray([0.25, 3.0]))
    np.testing.assert_allclose(embedding[0, 0], np.cos(0.25), atol=1e-6)
    whole = conditions.timestep_embedding(jnp.asarray([3], jnp.int32))
    np.testing.assert_array_equal(embedding[1], whole[0])


def test_nulls_are_of_the_conditions_that_can_be_left_out():
    config = dit.configure("Ti", 4, num_classes=7)
    assert [each.name for each in conditions.of(config)] == ["t", "y"]
    assert conditions.nulls(config) == {"y": 7}
    assert conditions.nulls(config._replace(null_label=False)) == {}


def test_conditions_are_chosen_by_name():
    names = ("y", "h", "omega")
    config = dit.configure("Ti", 4, num_classes=7, conditions=names)
    assert [each.name for each in conditions.of(config)] == ["h", "omega", "y"]
    assert dit.DiTConfig.from_json(config._asdict() | {"conditions": list(names)}) == config
    older = {name: value for name, value in config._asdict().items() if name != "conditions"}
    assert dit.DiTConfig.from_json(older).conditions == ("t", "y")
    for wrong in (("t", "x"), ("t", "t")):
        with pytest.raises(UserError, match="^conditions must be different names of t, h, .* got"):
            dit.configure("Ti", 4, conditions=wrong)


def test_a_scale_is_embedded_as_a_number_in_0_1():
    embedder = with_bias(conditions.ScaleEmbedder(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    plain = super(conditions.ScaleEmbedder, embedder).__call__(jnp.array([0.0, 0.75]))
    np.testing.assert_array_equal(embedder(jnp.array([1.0, 4.0])), plain)


def test_weights_mix_the_vectors_of_the_labels():
    for dtype in (jnp.float32, jnp.bfloat16):
        embedder = conditions.LabelEmbedder(5, 8, dtype=dtype, rngs=nnx.Rngs(0))
        table = np.asarray(embedder.embedding_table.embedding[...])
        of_label = embedder(jnp.asarray([3, 1], jnp.int32))
        weights = np.eye(5, dtype=np.float32)[[3, 1]]
        np.testing.assert_array_equal(embedder(weights), of_label)
        assert embedder(weights).dtype == of_label.dtype == dtype
    weights = np.float32([[0, 0.25, 0, 0, 0.75]])
    mixed = conditions.LabelEmbedder(5, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))(weights)
    np.testing.assert_allclose(mixed[0], 0.25 * table[1] + 0.75 * table[4], rtol=1e-6)


def test_the_null_of_weights_is_all_of_the_null_label():
    config = dit.configure("Ti", 4, num_classes=3)
    np.testing.assert_array_equal(conditions.nulls(config, mixed=True)["y"], [0, 0, 0, 1])
    assert conditions.nulls(config._replace(null_label=False), mixed=True) == {}


def test_a_model_takes_its_conditions_from_the_list(monkeypatch):
    """A third condition needs one entry: an embedder's parameters, a token, and an effect."""
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5, conditioning="in_context")
    of = conditions.of

    def with_action(config):
        return *of(config), conditions.Condition("action", conditions.TimestepEmbedder, None)

    monkeypatch.setattr(conditions, "of", with_action)
    params = dit.init(config, jax.random.key(0))
    assert "action_embedder" in params
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    apply, x, one = jax.jit(dit.make_apply(config)), jnp.ones((1, 8, 8, 4)), jnp.ones(1, jnp.int32)
    out, other = (apply(params, x, t=one, y=one, action=action) for action in (one, 5 * one))
    assert np.abs(out - other).max() > 1e-3


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention", "adaln_zero"])
def test_a_condition_may_be_a_sequence_of_tokens(monkeypatch, conditioning):
    """As a text: (N, S, 3) -> (N, S, D); every token has an effect in every design."""

    class TextEmbedder(nnx.Module):
        def __init__(self, hidden_size, *, dtype, rngs):
            self.fc = layers.Linear(3, hidden_size, dtype=dtype, rngs=rngs)

        def __call__(self, text):
            return self.fc(text)

    of = conditions.of

    def with_text(config):
        return *of(config), conditions.Condition("text", TextEmbedder, 0.0, num_tokens=4)

    monkeypatch.setattr(conditions, "of", with_text)
    config = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5, conditioning=conditioning)
    params = dit.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    apply, x, one = jax.jit(dit.make_apply(config)), jnp.ones((1, 8, 8, 4)), jnp.ones(1, jnp.int32)
    text = jnp.ones((1, 4, 3))
    out = apply(params, x, t=one, y=one, text=text)
    assert out.shape == (1, 8, 8, 8)
    for token in range(4):
        other = apply(params, x, t=one, y=one, text=text.at[0, token].set(5.0))
        assert np.abs(out - other).max() > 1e-3
