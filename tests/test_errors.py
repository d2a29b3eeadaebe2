import pytest

from dit_jax.errors import UserError, of_topic


@pytest.mark.parametrize("text", ["size must be S", "model.size must be S"])
def test_of_topic_names_the_field_in_full(text):
    with pytest.raises(UserError, match="^model.size must be S$"), of_topic("model"):
        raise UserError(text)


def test_of_topic_leaves_other_errors_alone():
    with pytest.raises(ValueError, match="^a bug$") as caught, of_topic("model"):
        raise ValueError("a bug")
    assert not isinstance(caught.value, UserError)
