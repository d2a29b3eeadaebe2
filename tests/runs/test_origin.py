"""Where a run starts: from random parameters or from those of another run."""

import json
import logging

import jax
import numpy as np
import pytest
import random_run
from flax import traverse_util

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import digests, steps, store
from dit_jax.convert import native
from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.runs import build
from dit_jax.runs import origin as origins
from dit_jax.runs import workdir as workdirs

MODEL = dit.configure(**random_run.MODEL)
LABELS = "y_embedder/embedding_table/embedding"


@pytest.fixture
def source(tmp_path):
    """The directory of a run with random weights, saved at step 30."""
    random_run.save(tmp_path / "source")
    return tmp_path / "source"


def make_settings(**changes):
    """The settings of that run with other values: topic={field: value}."""
    config = random_run.CONFIG | {"train": {"batch_size": 16}}
    return settings_lib.read(
        {k: v | changes.get(k, {}) for k, v in config.items()} | changes.get("new", {})
    )


def start(origin, settings, *names):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        return origins.create_state(origin, settings, build.parts(settings), *names)


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


@pytest.fixture
def workdir(tmp_path, source):
    """A run that started from `source` and has saved step 30."""
    path = tmp_path / "run"
    random_run.save(path)
    workdirs.claim(path, make_settings(), origins.choose(tmp_path / "none", source, MODEL))
    return path


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/30"])
def test_a_new_run_starts_from_a_run_or_one_of_its_steps(tmp_path, source, inside):
    origin = origins.choose(tmp_path / "run", source / inside, MODEL)
    assert origin.keys() == {"path", "step", "weights", "sha256"}
    assert origin["path"] == str(source / inside)
    assert (origin["step"], origin["weights"]) == (30, "ema")
    assert origins.choose(tmp_path / "run", None, MODEL) is None
    assert not (tmp_path / "run").exists()


def test_the_digest_is_of_the_parameters_alone(tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = make_settings(sampling={"cfg_scale": 1.0 + len(found)})
        native.write(tmp_path / name, MODEL, settings, dit.init(MODEL, jax.random.key(seed)))
        found.append(origins.choose(tmp_path / "run", tmp_path / name, MODEL)["sha256"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 4}])
def test_parameters_and_ema_start_from_the_ema_and_the_rest_is_new(tmp_path, source, mesh):
    _, ema = random_run.save(source)
    settings = make_settings(new={"mesh": mesh})
    state = start(origins.choose(tmp_path / "run", source, MODEL), settings)
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, ema)
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    template = build.parts(settings).abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(template)
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert x.sharding.is_equivalent_to(expected.sharding, x.ndim)


def test_classes_are_found_again_by_their_data_not_by_their_number(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = random_run.CONFIG | {
        "data": {"source": "digits", "space": "pixels", "classes": [7, 3, 5]}
    }
    model = MODEL._replace(num_classes=3)
    _, ema = random_run.save(tmp_path / "three", config, step=4, model=model)
    old = np.asarray(flat(ema)[LABELS])
    settings = make_settings(
        model={"num_classes": 4},
        data={"classes": [5, 0, 3, 1]},
        diffusion={"schedule": "squared_cosine"},
    )
    model = MODEL._replace(num_classes=4)
    state = start(origins.choose(tmp_path / "run", tmp_path / "three", model), settings)
    np.testing.assert_array_equal(flat(state.params)[LABELS], old[[2, 3, 1, 3, 3]])
    assert f"starting from step 4 of {tmp_path}/three (ema):" in caplog.text
    assert "label table: 2 labels taken, 1 left out, 2 new from the null label" in caplog.text
    assert "diffusion.schedule: linear before, squared_cosine now" in caplog.text


def test_a_flow_model_starts_one_of_mean_flow(tmp_path, caplog):
    """Both give the same output at the same t. A config with another time_scale is logged."""
    caplog.set_level(logging.INFO)
    model = MODEL._replace(learn_sigma=False)
    path = {"process": "linear", "time_scale": 1.0}
    sampling = random_run.CONFIG["sampling"] | {"cfg_interval": [0, 1]}
    config = random_run.CONFIG | {"diffusion": path, "sampling": sampling}
    config |= {"model": random_run.MODEL | {"learn_sigma": False}}
    _, ema = random_run.save(tmp_path / "flow", config, model=model)
    new = {"diffusion": {"process": "mean_flow", "time_scale": 1000.0}}
    new["sampling"] = sampling | {"cfg_scale": 1.0}
    settings = make_settings(model={"learn_sigma": False}, new=new)
    target = model._replace(conditions=("t", "h", "y"))
    origin = origins.choose(tmp_path / "run", tmp_path / "flow", target)
    params = start(origin, settings).params
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), np.int32([3, 10])
    t, h = np.float32([0.3, 1.0]), np.float32([0.3, 0.4])
    expected = jax.jit(dit.make_apply(model))(ema, x, t=t, y=y)
    out = jax.jit(dit.make_apply(target))(params, x, t=t, h=h, y=y)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert "condition h: new, starts without effect" in caplog.text
    assert "diffusion.process: linear before, mean_flow now" in caplog.text
    assert "time_scale: 1.0 before, 1000.0 now, so the network has to learn the time" in caplog.text


def test_classes_with_names_are_found_again_by_these(tmp_path):
    """A folder of pictures that got another class has other labels."""
    model = MODEL._replace(num_classes=3)
    _, ema = random_run.save(tmp_path / "three", model=model, class_names=["bee", "cat", "dog"])
    old = np.asarray(flat(ema)[LABELS])
    settings = make_settings(model={"num_classes": 4})
    model = MODEL._replace(num_classes=4)
    origin = origins.choose(tmp_path / "run", tmp_path / "three", model)
    state = start(origin, settings, ["ant", "bee", "cow", "dog"])
    np.testing.assert_array_equal(flat(state.params)[LABELS], old[[3, 0, 3, 2, 3]])
    state = start(origin, settings)  # without names: by their numbers
    np.testing.assert_array_equal(flat(state.params)[LABELS], old[[0, 1, 2, 3, 3]])


def test_a_name_with_an_accent_is_found_however_its_letters_are_encoded(tmp_path):
    model = MODEL._replace(num_classes=2)
    composed, decomposed = "for\u00eat", "fore\u0302t"
    _, ema = random_run.save(tmp_path / "two", model=model, class_names=["mer", composed])
    origin = origins.choose(tmp_path / "run", tmp_path / "two", model)
    state = start(origin, make_settings(model={"num_classes": 2}), [decomposed, "ville"])
    np.testing.assert_array_equal(
        flat(state.params)[LABELS], np.asarray(flat(ema)[LABELS])[[1, 2, 2]]
    )


def test_a_converted_checkpoint_starts_a_run(tmp_path):
    model = dit.configure("Ti", 4, input_size=(16, 16), num_classes=20)  # latents
    params = random_run.weights(dit.init, model)
    expected = flat(params)
    native.write(tmp_path / "converted", model, native.settings_of(model), params)
    settings = make_settings(
        model={"input_size": [8, 8], "in_channels": 4, "patch_size": 2, "num_classes": 3},
        data={"source": "latents", "space": "latents"},
    )
    target = dit.configure(**vars(settings.model))
    state = start(origins.choose(tmp_path / "run", tmp_path / "converted", target), settings)
    found = flat(state.params)
    for path, x in found.items():
        if path.startswith(("blocks", "t_embedder")):
            np.testing.assert_array_equal(x, expected[path])
    np.testing.assert_array_equal(found[LABELS], expected[LABELS][[0, 1, 2, 20]])
    assert found["x_embedder/proj/kernel"].shape == (2 * 2 * 4, 128)


def test_a_resumed_run_ignores_the_flag_and_keeps_its_origin(workdir, source, caplog):
    caplog.set_level(logging.INFO)
    recorded = json.loads((workdir / "init_from.json").read_text())
    (source / "checkpoints" / "30").rename(
        source / "gone"
    )  # a resumed run needs its source no more
    assert origins.choose(workdir, source, MODEL) == recorded
    assert f"init_from is ignored: {workdir} has started from it already" in caplog.text
    assert origins.choose(workdir, None, MODEL) == recorded


def test_a_run_that_started_from_something_else_refuses_the_flag(workdir, tmp_path, source):
    message = f"the run in {workdir} started from {source}, got {tmp_path}/other$"
    with pytest.raises(UserError, match=f"^init_from must be left out, or workdir .* {message}"):
        origins.choose(workdir, tmp_path / "other", MODEL)
    workdirs.claim(workdir, make_settings())
    assert origins.choose(workdir, None, MODEL) is None
    with pytest.raises(UserError, match=f"{workdir} started from random parameters, got {source}"):
        origins.choose(workdir, source, MODEL)


def test_a_run_without_a_saved_step_starts_from_its_record_again(workdir, tmp_path, source):
    steps.delete(workdir / "checkpoints", 30)
    recorded = origins.choose(workdir, None, MODEL)
    assert recorded["path"] == str(source)
    random_run.save(tmp_path / "other")
    assert origins.choose(workdir, tmp_path / "other", MODEL)["path"] == str(tmp_path / "other")
    random_run.save(source, step=40)
    assert origins.choose(workdir, source, MODEL)["step"] == 40
    message = "started from step 30 of .*, but saved nothing, and that has changed to step 40$"
    with pytest.raises(UserError, match=f"^init_from must be given: {workdir} {message}"):
        origins.choose(workdir, None, MODEL)


def test_the_record_of_a_start_that_was_killed_does_not_count(tmp_path, workdir):
    (tmp_path / "killed").mkdir()
    record = (workdir / "init_from.json").read_text()
    (tmp_path / "killed" / "init_from.json").write_text(record)
    workdirs.check(tmp_path / "killed", make_settings())
    assert origins.choose(tmp_path / "killed", None, MODEL) is None
    workdirs.claim(tmp_path / "killed", make_settings())
    assert not (tmp_path / "killed" / "init_from.json").exists()


def test_what_is_no_checkpoint_of_a_dit_is_refused(tmp_path, source):
    (tmp_path / "weights.pt").touch()
    for name in ("weights.pt", "nowhere"):
        with pytest.raises(
            UserError, match=f"^init_from must be a run of dit-train or a .*/{name}$"
        ):
            origins.choose(tmp_path / "run", tmp_path / name, MODEL)
    other = MODEL._replace(conditioning="adaln")
    with pytest.raises(UserError, match="^model.conditioning must be adaln_zero as in init_from, "):
        origins.choose(tmp_path / "run", source, other)


def test_a_corrupt_source_is_refused(tmp_path, source, monkeypatch):
    origin = origins.choose(tmp_path / "run", source, MODEL)
    right = digests.of_tree
    monkeypatch.setattr(digests, "of_tree", lambda tree: dict.fromkeys(right(tree), "0" * 16))
    with pytest.raises(store.Damaged, match=f"^checkpoint {source}/checkpoints/30 is damaged: ema"):
        start(origin, make_settings())
