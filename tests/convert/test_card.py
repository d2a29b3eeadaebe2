"""Model cards: what they say of a checkpoint, and that they say what is not known."""

import math

import huggingface_hub
import pytest
import random_run

from dit_jax import settings as settings_lib
from dit_jax.cli import convert
from dit_jax.convert import card, native, receipts
from dit_jax.models import dit
from dit_jax.sampling import imagenet
from dit_jax.settings import SIT, Diffusion

MODEL = dit.configure(**random_run.MODEL)
LATENTS = dit.configure(**random_run.MODEL | {"in_channels": 4, "num_classes": 1000})
SAMPLING = {"sampler": "ddpm", "num_steps": "250", "cfg_scale": 1.5, "clip_x0": False}


def converted(model=MODEL, space="pixels", **fields):
    """The Subject of a converted checkpoint without further information."""
    meta = {"step": 0, "config": {}} | fields.pop("meta", {})
    return card.Subject(model, native.settings_of(model, space=space), meta, "ema", [], **fields)


def trained(**fields):
    """The Subject of a run of digits."""
    config = settings_lib.to_json(settings_lib.Settings()) | {"model": random_run.MODEL}
    config["data"] |= {"source": "digits", "space": "pixels", "path": "/home/alice/secret"}
    meta = {"step": 2000, "config": config, "loss": 0.12345, "data_sha256": "12ab"}
    meta |= fields.pop("meta", {})
    settings = settings_lib.read({"data": config["data"]})
    return card.Subject(MODEL, settings, meta, "ema", fields.pop("judged", []), **fields)


def receipt(path, **scores):
    """A Receipt of photographs; scores: {name: (value, deviation)}."""
    content = {
        "time": "2026-11-28T07:51:09+0000",
        "samples": {"count": 50_000, "seed": 0, "digest": "ab", "sampling": SAMPLING},
        "network": {"network": "inception-2015-12-05", "published": True},
        "reference": {"file": "/home/alice/x.npz", "sha256": "0123456789abcdef"},
        "scores": {
            name: {"value": value, "deviation": deviation}
            for name, (value, deviation) in scores.items()
        },
    }
    return receipts.Receipt(path, content)


def parse(subject):
    """(the front matter, the sections {name: text}) of a card."""
    text = card.write(subject)
    parsed = huggingface_hub.ModelCard(text)
    first, *sections = parsed.text.split("\n## ")
    sections = dict(each.split("\n\n", 1) for each in sections)
    return parsed.data, {"": first, **sections}


def test_a_card_names_what_is_not_known():
    data, sections = parse(converted())
    assert data.license == "unknown" and data.library_name == "dit_jax"
    assert data.pipeline_tag == card.TASK and "dit" in data.tags
    assert data.datasets is None and data.eval_results is None
    assert sections["Scores"].startswith("None: these parameters were not judged")
    assert "Not recorded: the checkpoint was converted" in sections["Training"]
    assert "does not record its data" in sections["Data"]
    assert "The weights: not stated. Ask the author" in sections["Licence"]
    assert card.OFFICIAL_LICENCE in sections["Licence"]
    unknown = sections["What is not known"]
    for text in ("are no scores", "What the data are", "have no names", "licence of the weights"):
        assert text in unknown
    assert "How the model was trained" in unknown and "autoencoder" not in unknown
    assert "pull NAMESPACE/NAME DiT-Ti/4" not in sections["Sampling"]  # a folder's name


def test_a_card_says_what_is_known():
    names = [f"class `{i}`" for i in range(10)]
    start = {"path": "/home/alice/xl2", "step": 7, "weights": "ema", "sha256": "c0ffee" * 10}
    subject = trained(
        repository="alice/digits",
        licence="mit",
        datasets=("a/b",),
        meta={"class_names": names, "init_from": start},
        report={"passed": True, "relative": 2.3e-7},
    )
    data, sections = parse(subject)
    assert data.license == "mit" and data.datasets == ["a/b"]
    assert sections[""].startswith("\n# digits\n") and "`class '0'`, " in sections[""]
    assert "DiT-Ti/4. It generates images of 8 x 8 pixels with 1 channel" in sections[""]
    assert "scikit-learn" in sections["Data"] and "`12ab`" in sections["Data"]
    assert "| weights | the EMA of the parameters at step 2,000 |" in sections["Training"]
    assert "| loss | 0.1235 |" in sections["Training"]
    assert "step 7 of another checkpoint, sha256 `c0ffeec0ffee`" in sections["Training"]
    assert "- The data: CC BY 4.0." in sections["Licence"]
    assert "If the weights come from others" in sections["Licence"]
    assert "agrees with JAX to a relative error of 2.3e-07" in sections["Model"]
    assert "parameters | 1,277,472, float32" in sections["Model"]
    assert "licence" not in sections["What is not known"]
    assert "/home/alice" not in card.write(subject)


def test_a_card_names_the_average_and_the_optimizer():
    config = settings_lib.to_json(settings_lib.Settings()) | {"model": random_run.MODEL}
    config["train"] |= {"optimizer": "muon", "clip_norm": 0.5}
    _, sections = parse(trained(meta={"average": {"width": 0.15}, "config": config}))
    assert "| weights | an average of the parameters, of width 0.15 (" in sections["Training"]
    assert "| optimizer | Muon for the kernels of the blocks, " in sections["Training"]
    assert "| gradients | clipped to a norm of 0.5 |" in sections["Training"]
    assert "EMA" not in sections["Training"]


def test_a_card_of_a_sit_names_its_path():
    settings = native.settings_of(MODEL, space="pixels", diffusion=Diffusion(**SIT))
    _, sections = parse(converted()._replace(settings=settings))
    expected = "| diffusion | linear path of flow matching; predicts the velocity |"
    assert expected in sections["Model"]


def test_a_card_lists_some_of_many_classes():
    meta = {"class_names": [f"name {i}" for i in range(1000)]}
    _, sections = parse(converted(LATENTS, "latents", meta=meta))
    assert "`name 29` and 970 more (`class_names` in `config.json`)" in sections[""]
    assert "`name 30`" not in sections[""]
    assert "ImageNet" not in sections[""]  # another thousand


def test_a_card_of_imagenet_says_so():
    meta = {"class_names": list(imagenet.names())}
    _, sections = parse(converted(LATENTS, "latents", meta=meta))
    assert "1000 classes, those of ImageNet: `tench`, `goldfish`, " in sections[""]
    assert "and 970 more" in sections[""] and "no names" not in sections["What is not known"]


def test_scores_are_in_the_table_and_in_the_front_matter(tmp_path):
    scores = {"FID-50K": (2.27, None), "Inception Score": (278.24, 1.5), "KID": (math.nan, None)}
    subject = trained()._replace(receipts=[receipt(tmp_path / "receipt.json", **scores)])
    data, sections = parse(subject)
    found = {each.metric_name: each for each in data.eval_results}
    assert found.keys() == {"FID-50K", "Inception Score"}  # YAML for the hub has no nan
    assert found["FID-50K"].metric_type == "fid" and found["FID-50K"].metric_value == 2.27
    assert found["Inception Score"].metric_type == "inception_score"
    assert found["FID-50K"].dataset_type == "digits" and data.model_name == "DiT-Ti-4"
    assert "| Inception Score | 278.2 ± 1.5 |" in sections["Scores"]
    assert "| KID | nan |" in sections["Scores"]
    title = sections["Scores"].partition("\n")[0]
    assert title == (
        "dit-evaluate on 2026-11-28: 50000 samples, `sampler=ddpm`, `num_steps=250`, "
        "`cfg_scale=1.5`, seed 0; compared with the reference with sha256 `0123456789ab`, by "
        "inception-2015-12-05. Receipt: `scores/receipt.json`."
    )
    assert "are no scores" not in sections["What is not known"]


def test_an_unchecked_push_is_said():
    _, sections = parse(trained(report={"passed": None}))
    assert "Whether PyTorch computes the same as JAX" in sections["What is not known"]
    assert "agrees with JAX" not in sections["Model"]


@pytest.mark.parametrize(
    "space, changes, message",
    [
        ("pixels", {}, "not possible. `DiTPipeline` decodes latents, and this model generates pi"),
        ("latents", {"conditioning": "adaln"}, "not possible. Conditioning must be adaln_zero for"),
        ("latents", {}, "DiTPipeline.from_pretrained"),
    ],
)
def test_a_card_says_whether_diffusers_can_sample(space, changes, message):
    model = LATENTS._replace(**changes)
    _, sections = parse(converted(model, space, repository="alice/x"))
    assert message in sections["Sampling"]
    for line in sections["Sampling"].splitlines():
        if line.startswith("dit-convert "):
            name, *args = line.partition("#")[0].split()[1:]
            arguments, flags = convert.COMMANDS[name]
            given = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--")]
            assert set(given) <= set(flags)
            assert len(args) - len(given) + ("from_hub" in given) == len(arguments)
