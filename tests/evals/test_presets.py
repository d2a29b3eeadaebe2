import pytest

from dit_jax.errors import UserError
from dit_jax.evals import presets


def test_a_preset_keeps_its_name_only_with_its_settings():
    sampling = presets.find("paper-256").sampling
    assert (sampling["sampler"], sampling["num_steps"], sampling["cfg_scale"]) == (
        "ddpm",
        "250",
        1.5,
    )

    def title(count=50_000, **changed):
        options = {"sampling": sampling | changed, "count": count, "size": (256, 256)}
        return presets.title("paper-256", **options)

    assert title() == title(cfg_interval=[0, 999]) == "paper-256"
    assert title(cfg_scale=4.0) == "paper-256, but cfg_scale 4.0"
    assert title(10_000, num_steps="50") == "paper-256, but num_steps 50, num_samples 10000"
    with pytest.raises(UserError, match="must be for images of 256 x 256, got 32 x 32"):
        presets.title("paper-256", sampling=sampling, count=1, size=(32, 32))
    with pytest.raises(UserError, match="preset must be one of paper-256, .*, got 'paper'"):
        presets.find("paper")


def test_what_the_paper_printed():
    assert presets.published("paper-256", "XL/2")["FID-50K"] == 2.27
    assert presets.published("paper-256-nocfg", "XL/2")["Inception Score"] == 121.50
    assert presets.published("paper-512", "XL/2")["recall"] == 0.54
    assert presets.published("paper-256", "S/2") == {}
    assert presets.published("scaling-400k", "S/2") == {"FID-50K": 68.40}
    assert presets.published("scaling-400k", "Ti/2") == {}
