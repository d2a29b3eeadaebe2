import logging

import jax.numpy as jnp
import pytest

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import store
from dit_jax.data import feed
from dit_jax.errors import UserError
from dit_jax.runs import moved
from dit_jax.runs import workdir as workdirs

VAE = {"['encoder']": "1", "['decoder']": "2"}


def make_settings(path="data", vae="vae"):
    return settings_lib.read({"data": {"path": path, "vae": vae}})


def make_feed(sha256="a", vae=VAE):
    return feed.Feed([], None, None, vae_digests=vae, sha256=sha256)


def make_run(workdir, **meta):
    """A run of make_settings() with a saved step, whose meta remembers `meta`."""
    workdirs.claim(workdir, make_settings())
    with store.open_writer(background=False) as writer:
        store.save(writer, workdir / "checkpoints", 3, {"params": {"w": jnp.zeros(2)}}, meta)
    return workdir


@pytest.fixture
def run(tmp_path):
    """The directory of a run that recorded digests."""
    return make_run(tmp_path, data_sha256="a", vae_digests=VAE)


def test_the_same_content_at_other_paths_is_accepted_and_said(run, caplog):
    caplog.set_level(logging.INFO)
    before = (run / "config.json").read_bytes()
    workdirs.check(run, make_settings("gs://b/data", "new"))
    moved.check(run, make_settings("gs://b/data", "new"), make_feed())
    assert "data.path was 'data' and is 'gs://b/data': the same content" in caplog.text
    assert "data.vae was 'vae' and is 'new': the same content" in caplog.text
    assert (run / "config.json").read_bytes() == before
    caplog.clear()
    moved.check(run, make_settings(), make_feed())
    assert not caplog.messages


def test_another_decoder_is_accepted(run, caplog):
    caplog.set_level(logging.INFO)
    moved.check(run, make_settings(vae="ft-mse"), make_feed(vae=VAE | {"['decoder']": "3"}))
    assert "data.vae was 'vae' and is 'ft-mse': the same content" in caplog.text


@pytest.mark.parametrize("path", ["data", "elsewhere"])
def test_other_content_is_refused_at_any_path(run, path):
    with pytest.raises(UserError) as refused:
        moved.check(run, make_settings(path), make_feed("b"))
    assert str(refused.value) == (
        f"data.path must hold what the run in {run} was trained on, got {path}, whose digests "
        "differ: use another --workdir, and to start from what this run has learned, "
        f"--init_from={run}"
    )
    with pytest.raises(UserError, match="^data.vae must hold what the run in .*, got x, whose dig"):
        moved.check(run, make_settings(vae="x"), make_feed(vae=VAE | {"['encoder']": "3"}))


def test_a_run_without_digests_goes_on_with_the_same_path_only(tmp_path):
    run = make_run(tmp_path)
    moved.check(run, make_settings(), make_feed())
    for fields, name in (({"path": "x"}, "path must be 'data'"), ({"vae": "x"}, "vae must be 'v")):
        with pytest.raises(UserError, match=f"^data.{name}.* no digests that show that both hold"):
            moved.check(run, make_settings(**fields), make_feed())


def test_data_without_digests_must_stay(run):
    moved.check(run, make_settings(), make_feed(None))
    with pytest.raises(UserError, match="^data.path must be 'data', as in .*, got 'x': there are "):
        moved.check(run, make_settings("x"), make_feed(None))


def test_the_step_before_decides_if_the_newest_cannot_be_read(run, caplog):
    caplog.set_level(logging.INFO)
    with store.open_writer(background=False) as writer:
        store.save(writer, run / "checkpoints", 4, {"params": {"w": jnp.zeros(2)}}, {})
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    moved.check(run, make_settings("elsewhere"), make_feed())
    assert "data.path was 'data' and is 'elsewhere': the same content" in caplog.text
    with pytest.raises(UserError, match="^data.path must hold what the run in "):
        moved.check(run, make_settings("elsewhere"), make_feed("b"))


def test_a_new_run_has_nothing_to_compare(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    moved.check(tmp_path / "new", make_settings("elsewhere"), make_feed("b"))
    assert not caplog.messages and not (tmp_path / "new").exists()
