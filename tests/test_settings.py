import dataclasses

import pytest

from configs import base
from dit_jax import settings
from dit_jax.errors import UserError


def test_the_base_config_sets_every_field_to_its_default():
    """A field of one alone would be unexplained, or could not be set."""
    fields = base.get_config().to_dict()
    assert settings.read(fields) == settings.Settings()
    plain = settings.to_json(settings.Settings())
    assert fields.keys() == plain.keys()
    for topic in fields.keys() - {"seed"}:
        assert fields[topic].keys() == plain[topic].keys(), topic


def test_json_reads_back():
    changed = settings.read({"seed": 3, "model": {"input_size": (8, 8)}, "run": {"log_every": 7}})
    plain = settings.to_json(changed)
    assert plain["model"]["input_size"] == [8, 8]
    assert settings.read(plain) == changed


def test_averages_are_tracked_if_snapshots_are_saved():
    assert settings.Train().averages == ()
    assert settings.Train(ema_snapshot_every=5).averages == (0.05, 0.1)
    assert settings.Train(ema_widths=(0.2,), ema_snapshot_every=5).averages == (0.2,)


def test_an_absent_field_or_topic_has_its_default():
    assert settings.read({"train": {"b2": 0.99}}).train == settings.Train(b2=0.99)
    assert settings.read({}) == settings.Settings()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"trian": {}}, r"^there is no field trian; did you mean train\?$"),
        (
            {"train": {"learning_rat": 1.0}},
            "no field train.learning_rat; did you mean train.learning_rate",
        ),
        (
            {"train": {"total_steps": 5}},
            r"^there is no field train.total_steps; did you mean run.total_steps\?$",
        ),
        ({"train": 5}, "^train must be a topic, got 5$"),
        ({"train": {"batch_size": 0}}, "^train.batch_size must be at least 1, got 0$"),
        ({"train": {"batch_size": 2.0}}, "^train.batch_size must be a whole number, got 2.0$"),
        ({"train": {"batch_size": True}}, "^train.batch_size must be a whole number, got True$"),
        ({"train": {"eps": 0}}, "^train.eps must be above 0, got 0.0$"),
        ({"train": {"eps": float("nan")}}, "^train.eps must be finite, got nan$"),
        ({"train": {"b1": 1}}, r"^train.b1 must be in \[0, 1\), got 1.0$"),
        ({"train": {"ema_warmup": 1}}, "^train.ema_warmup must be true or false, got 1$"),
        ({"data": {"path": None}}, "^data.path must be text, got None$"),
        ({"data": {"space": "cells"}}, "^data.space must be one of pixels, latents, got 'cells'$"),
        ({"model": {"input_size": 8}}, "^model.input_size must be a list, got 8$"),
        ({"run": {"spike_factor": 0.5}}, "^run.spike_factor must be 0 or above 1, got 0.5$"),
        (
            {"data": {"classes": [1, -1]}},
            "^data.classes must be a list of whole numbers of at least 0",
        ),
        ({"data": {"classes": [True]}}, r"of at least 0, got \(True,\)$"),
        ({"train": {"frozen": "x"}}, "^train.frozen must be a list, got 'x'$"),
        (
            {"train": {"frozen": ["x", ""]}},
            r"must be a list of regular expressions, got \('x', ''\)$",
        ),
        ({"train": {"frozen": ["("]}}, r"must be a list of regular expressions, got \('\(',\)$"),
        (
            {"train": {"ema_widths": []}},
            "^train.ema_widths must be different widths, each above 0 and below 0.2887, got ",
        ),
        (
            {"train": {"ema_widths": [0.1, 0.1]}},
            r"each above 0 and below 0.2887, got \(0.1, 0.1\)$",
        ),
        (
            {"train": {"ema_widths": [0.2]}},
            r"^train.ema_widths must be \(0.05, 0.1\) without train.ema_snapshot_every, got",
        ),
        ({"train": {"ema_widths": [0.05, 0.3]}}, r"below 0.2887, got \(0.05, 0.3\)$"),
        ({"train": {"ema_widths": ["x"]}}, r"below 0.2887, got \('x',\)$"),
        (
            {"train": {"ema_snapshot_every": -1}},
            "^train.ema_snapshot_every must be in 0 .. 2147483",
        ),
        (
            {"train": {"optimizer": "sgd"}},
            "^train.optimizer must be one of adamw, muon, got 'sgd'$",
        ),
        ({"train": {"clip_norm": -1}}, "^train.clip_norm must be at least 0, got -1.0$"),
        ({"train": {"frozen": [3]}}, r"must be a list of regular expressions, got \(3,\)$"),
        ({"run": {"score_samples": 1}}, "^run.score_samples must be at least 2, got 1$"),
        ({"run": {"keep_best_by": "fid"}}, "^run.keep_best_by must be one of loss, score, got 'fi"),
        (
            {"run": {"keep_best_by": "score"}},
            "^run.keep_best_by must be loss if run.score_every is 0, got 'score'$",
        ),
        (
            {"run": {"keep_best_by": "score", "score_every": 300, "checkpoint_every": 400}},
            "^run.checkpoint_every must be a multiple of run.score_every 300 if .*, got 400$",
        ),
        (
            {"sampling": {"sampler": "plms"}},
            "^sampling.sampler must be one of ddpm, .*, got 'plms'$",
        ),
        (
            {"sampling": {"num_steps": "x"}},
            "^sampling.num_steps must be a whole number, as .* got 'x'$",
        ),
        (
            {"sampling": {"num_steps": 2.5}},
            "^sampling.num_steps must be a whole number, as .* got 2.5$",
        ),
        (
            {"sampling": {"num_steps": "9" * 5000}},
            "^sampling.num_steps must be a whole number, as ",
        ),
        (
            {"sampling": {"sampler": None}},
            "^sampling.sampler must be one of ddpm, .*, unipc, got None$",
        ),
        ({"sampling": {"num_steps": "-3"}}, "^sampling.num_steps must be a whole number, as "),
        ({"sampling": {"eta": 2}}, "^sampling.eta must be in 0 .. 1, got 2.0$"),
        ({"sampling": {"cfg_scale": -1}}, "^sampling.cfg_scale must be at least 0, got -1.0$"),
        ({"sampling": {"cfg_channels": -1}}, "^sampling.cfg_channels must be at least 0, got -1$"),
        (
            {"sampling": {"cfg_interval": ["0", 5]}},
            r"^sampling.cfg_interval must be two numbers, first <= last, got \('0', 5\)$",
        ),
        ({"sampling": {"cfg_interval": [5, 4]}}, r"two numbers, first <= last, got \(5, 4\)$"),
        ({"seed": 2**32}, "^seed must be in 0 .. 4294967295, got 4294967296$"),
        (
            {"model": {"null_label": False}},
            "^train.class_dropout_prob must be 0 without model.null_label, got 0.1$",
        ),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        settings.read(fields)


def test_whole_numbers_serve_as_floats_and_as_a_spacing():
    read = settings.read({"train": {"weight_decay": 1}, "sampling": {"num_steps": 50}})
    assert type(read.train.weight_decay) is float and read.sampling.num_steps == "50"


def test_one_flag_may_hold_several_names():
    fields = {"model": {"conditions": ["t,y"]}, "run": {"loggers": ["tensorboard,wandb"]}}
    read = settings.read(fields)
    assert read.model.conditions == ("t", "y")
    assert read.run.loggers == ("tensorboard", "wandb")


def test_only_what_changes_the_training_is_a_difference():
    old = settings.Settings()
    free = dataclasses.replace(
        old,
        run=settings.Run(total_steps=5),
        mesh=settings.Mesh(fsdp=2),
        sampling=settings.Sampling(cfg_scale=4.0),
        compute=dataclasses.replace(old.compute, remat="full", attention="xla", unroll=True),
    )
    assert settings.differences(old, free) == []
    other = dataclasses.replace(free, seed=1, compute=settings.Compute(dtype="float32"))
    assert settings.differences(old, other) == [
        ("seed", 0, 1),
        ("compute.dtype", "bfloat16", "float32"),
    ]


def test_the_process_is_named_before_what_follows_from_it():
    old, new = settings.read({}), settings.read({"diffusion": {"process": "linear"}})
    names = [name for name, _, _ in settings.differences(old, new)]
    assert names[0] == "diffusion.process" and "model.learn_sigma" in names


@pytest.mark.parametrize(
    "name, fields",
    [
        ("run.total_stepz", ["run.total_steps"]),
        ("total_steps", ["run.total_steps"]),
        ("model.total_steps", ["run.total_steps"]),
        ("num_steps", ["diffusion.num_steps", "sampling.num_steps"]),
        ("sampling.num_step", ["sampling.num_steps"]),
        ("sead", ["seed"]),
        ("train.lr", ["train.learning_rate"]),
        ("at", []),
        ("frobnicate", []),
    ],
)
def test_nearest_names_fields_in_full(name, fields):
    assert settings.nearest(name) == fields


def test_every_field_has_a_default_and_a_rule_in_words():
    defaults = settings.defaults()
    assert defaults["seed"] == 0 and defaults["model.size"] == "XL"
    assert len(defaults) == 1 + sum(
        len(each)
        for each in settings.to_json(settings.Settings()).values()
        if isinstance(each, dict)
    )
    assert settings.rule("run.total_steps") == "in 1 .. 2147483647"
    assert settings.rule("data.space") == "one of pixels, latents"
    assert all(isinstance(settings.rule(name), str) for name in defaults)


def test_one_field_chooses_a_path_and_what_it_needs():
    fields = base.get_config()
    fields.diffusion.process = "linear"
    read = settings.read(fields.to_dict())
    assert read.diffusion == settings.Diffusion(process="linear", prediction="velocity")
    assert not read.model.learn_sigma and read.sampling.cfg_interval == (0, 1)
    assert settings.read(settings.to_json(read)) == read
    fields.sampling.cfg_interval = (0.1, 0.6)
    assert settings.read(fields.to_dict()).sampling.cfg_interval == (0.1, 0.6)


def test_what_a_config_says_is_not_left_to_the_process():
    fields = base.get_config()
    fields.model.learn_sigma, fields.diffusion.num_steps = False, 500
    read = settings.read(fields.to_dict())
    assert not read.model.learn_sigma and read.sampling.cfg_interval == (0, 499)
    fields.model.learn_sigma, fields.diffusion.process = True, "gvp"
    message = "^model.learn_sigma must be false for process gvp, which learns no variance, got true"
    with pytest.raises(UserError, match=message):
        settings.read(fields.to_dict())
    fields.model.learn_sigma, fields.sampling.cfg_interval = False, (0, 999)
    assert settings.read(fields.to_dict()).sampling.cfg_interval == (0, 999)  # and `check` refuses


def test_only_what_depends_on_the_process_can_be_left_to_it():
    with pytest.raises(UserError, match="^model.null_label must be true or false, got None$"):
        settings.read({"model": {"null_label": None}})
    with pytest.raises(UserError, match="^cfg_interval must be a list, got None$"):
        settings.read_topic(settings.Sampling, {"cfg_interval": None})


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, settings.Diffusion("linear", 1000, "noise", "ddpm")),
        ({"prediction": "auto"}, settings.Diffusion(prediction="noise")),
        ({"schedule": "linear", "prediction": "velocity"}, settings.Diffusion(**settings.SIT)),
    ],
)
def test_older_checkpoints_are_ddpm_that_predicts_noise_or_a_sit(fields, expected):
    read = settings.read({"diffusion": fields, "sampling": {"cfg_interval": [0, 999]}})
    assert read.diffusion == expected
    last = 1 if expected.process == "linear" else 999
    assert read.sampling.cfg_interval == (0, last)
