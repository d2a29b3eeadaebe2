import pytest
import random_run

from dit_jax.checkpoint import peek, store
from dit_jax.errors import UserError
from dit_jax.sampling import fields


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    random_run.save(path, class_names=["a b", *"cdefghijk"])
    return path


def test_a_quick_look_finds_what_the_full_reading_finds(run):
    meta = peek.meta_of(run, of="model")
    assert meta == store.read_meta(run / "checkpoints", 30)
    known = fields.look(run)
    assert known.model.num_classes == 10 and known.class_names[0] == "a b"
    assert known.settings.sampling.cfg_scale == 2.0


def test_another_kind_of_checkpoint_is_named(run):
    with pytest.raises(UserError, match="^checkpoint must be one of an autoencoder, got .*/30$"):
        peek.meta_of(run, of="vae")
    with pytest.raises(UserError, match="^vae must be a folder that `dit-convert vae` wrote, got"):
        peek.meta_of(run, of="vae", name="vae")


@pytest.mark.parametrize("text", ["", "{", "[]", None])
def test_a_meta_that_is_not_what_was_saved_is_left_to_the_full_reading(tmp_path, text):
    random_run.save(tmp_path)
    file = tmp_path / "checkpoints/30" / peek.FILE
    changed = file.read_text().replace('"num_classes": 10', '"num_classes": 11')
    assert changed != file.read_text()
    file.write_text(changed if text is None else text)
    assert peek.meta_of(tmp_path, of="model") == {} and fields.look(tmp_path) is None
    with pytest.raises(store.Damaged):
        store.read_meta(tmp_path / "checkpoints", 30)
