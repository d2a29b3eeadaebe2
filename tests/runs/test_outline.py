import pytest

from configs import digits, imagenet256
from dit_jax.runs import build, outline


def make(config, *options):
    """(Settings, Parts) of a config with {field: value} of its topics."""
    for topic, fields in options:
        config[topic].update(fields)
    settings = build.read(config)
    return settings, build.parts(settings)


def test_the_outline_says_what_the_paper_says():
    settings, parts = make(imagenet256.get_config("XL/2"))
    lines = outline.describe(settings, parts, parts.abstract_state().params, 1_281_167)
    assert lines == [
        "devices: 8 x cpu; mesh: data 8, fsdp 1, tensor 1",
        "model: XL/2, 674,834,720 parameters, 256 tokens",
        "step: 256 examples, 182.2 TFLOP",  # 6 x 118.62 G multiply-adds an image, table 4
        "data: 1,281,167 examples, 5,004.6 batches per epoch, 79.9 epochs in 400,000 steps",
    ]
    assert outline.warnings(settings, parts.model, 1_281_167) == []


def test_the_outline_tells_what_averages_cost():
    train = {"ema_snapshot_every": 25_000}
    settings, parts = make(imagenet256.get_config("XL/2"), ("train", train))
    state = parts.abstract_state()
    assert outline.describe(settings, parts, state.params, 1_281_167)[-1] == (
        "averages: widths 0.05, 0.1, 5.4 GB of memory; a snapshot every 25,000 steps, 86.4 GB on "
        "disk"
    )
    assert len(state.averages) == 2


@pytest.mark.parametrize("count, warned", [(64, False), (63, True)])
def test_a_batch_larger_than_the_data_set_is_warned_of(count, warned):
    settings, parts = make(digits.get_config())
    lines = outline.warnings(settings, parts.model, count)
    assert lines == (
        ["train.batch_size is 64, but there are 63 examples: a batch repeats examples"] * warned
    )


@pytest.mark.parametrize("total_steps, warned", [(101, False), (100, True)])
def test_a_warmup_without_an_end_is_warned_of(total_steps, warned):
    run, train = {"total_steps": total_steps}, {"warmup_steps": 100, "decay_steps": 0}
    settings, parts = make(digits.get_config(), ("run", run), ("train", train))
    lines = outline.warnings(settings, parts.model, 1500)
    assert lines == (
        [
            "train.warmup_steps is 100, but run.total_steps is 100: the learning rate never "
            "reaches train.learning_rate"
        ]
        * warned
    )


@pytest.mark.parametrize("channels, warned", [(2, False), (3, True)])
def test_a_patch_with_more_numbers_than_the_hidden_size_is_warned_of(channels, warned):
    model = {"patch_size": 8, "in_channels": channels}  # Ti has 128 numbers per token
    settings, parts = make(digits.get_config(), ("model", model))
    lines = outline.warnings(settings, parts.model, 1500)
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith("a patch has 192 numbers, but model.size Ti has only 128 per t")
