import sys

import pytest
from absl import flags

from dit_jax.cli import arguments, bench, evaluate, plan, sample, train
from dit_jax.errors import UserError

CONFIG = "configs/digits.py"


def define(values):
    flags.DEFINE_string("source", None, "What is read.", flag_values=values)
    flags.DEFINE_string("out", "out.png", "What is written.", flag_values=values)
    flags.DEFINE_boolean("fast", False, "Not slow.", flag_values=values)
    flags.DEFINE_enum("size", "S", ["S", "L"], "Of it.", flag_values=values)
    flags.DEFINE_integer("count", 1, "Of them.", lower_bound=1, flag_values=values)
    bounds = {"lower_bound": 0.0, "upper_bound": 1.0}
    flags.DEFINE_float("share", 0.5, "Of all.", **bounds, flag_values=values)
    flags.DEFINE_float("scale", None, "Of guidance.", flag_values=values)


@pytest.fixture
def parse(monkeypatch):
    """parse(*arguments) -> source, out, fast, size of a command SOURCE OUT."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["command", *words])
        values = flags.FlagValues()
        define(values)
        assert arguments.parse(values, required=["source"], words=["source", "out"]) == []
        return values.source, values.out, values.fast, values.size

    return call


@pytest.mark.parametrize(
    "words, found",
    [
        (["a", "b"], ("a", "b", False, "S")),
        (["--source=a", "--out=b"], ("a", "b", False, "S")),
        (["-source", "a", "--out", "b"], ("a", "b", False, "S")),
        (["--out=b", "a"], ("a", "b", False, "S")),
        (["a", "--out", "b"], ("a", "b", False, "S")),
        (["--source=a", "b"], ("a", "b", False, "S")),
        (["a", "--out=b", "--out=c"], ("a", "c", False, "S")),  # the last one, as always
        (["--fast", "a"], ("a", "out.png", True, "S")),
        (["--nofast", "--size", "L", "a", "b"], ("a", "b", False, "L")),
        (["--fast", "--", "-a", "b"], ("-a", "b", True, "S")),
        (["-", "b"], ("-", "b", False, "S")),
    ],
)
def test_words_stand_for_flags_in_their_order(parse, words, found):
    assert parse(*words) == found


@pytest.mark.parametrize(
    "words, message",
    [
        (["a", "b", "c"], "takes SOURCE OUT, got 'a b c'"),
        (["a", "b", "--out=c"], "out must be given once, got the word b and --out too"),
        (["a", "b", "--source=c"], "source must be given once, got the word a and --source too"),
        ([""], "source must not be empty"),
        ([], "--source must be given"),
        (["a", "--size"], "size must have a value, got none"),
        (["a", "--size=M"], "--size must be one of S, L, got 'M'"),
        (["a", "--sizes=M"], "there is no flag --sizes; did you mean --size?"),
        (["a", "--szie=M"], "there is no flag --szie; did you mean --size?"),
        (["a", "--speed=M"], "there is no flag --speed; --help lists all flags"),
        (["a", "--fast=3"], "--fast must be true or false, got 3"),
        (["a", "--fast=soon"], "--fast must be true or false, got 'soon'"),
        (["a", "--nofast=1"], "--nofast must have no value, got --nofast=1"),
        (["a", "--count=x"], "--count must be a whole number of at least 1, got 'x'"),
        (["a", "--count=0"], "--count must be a whole number of at least 1, got 0"),
        (["a", "--count=1.5"], "--count must be a whole number of at least 1, got 1.5"),
        (["a", "--share=2"], "--share must be a number in 0.0 .. 1.0, got 2"),
        (["a", "--share=all"], "--share must be a number in 0.0 .. 1.0, got 'all'"),
        (["a", "--scale=x"], "--scale must be a number, got 'x'"),
        (["a", "--share=nan"], "--share must be finite, got nan"),
        (["a", "--scale=-inf"], "--scale must be finite, got -inf"),
    ],
)
def test_wrong_words_are_refused(parse, words, message):
    with pytest.raises((UserError, flags.Error)) as caught:
        parse(*words)
    assert message in str(caught.value)


def test_help_has_the_flags_without_noise():
    values = flags.FlagValues()
    define(values)
    assert [line.split(None, 1) for line in arguments.describe(values).splitlines()] == [
        ["Flags:"],
        ["--source", "What is read."],
        ["--out", "What is written. Default: out.png."],
        ["--fast", "Not slow."],
        ["--size", "<S|L>: Of it. Default: S."],
        ["--count", "Of them. Default: 1."],
        ["--share", "Of all. Default: 0.5."],
        ["--scale", "Of guidance."],
    ]


@pytest.mark.parametrize(
    "module, words, message",
    [
        (train, [CONFIG, "{new}", "--config.seed=-1"], "seed must be in 0 .. 4294967295, got -1"),
        (train, ["--config.seed=-1", CONFIG, "{new}"], "seed must be in 0 .. 4294967295, got -1"),
        (train, ["--config.seed", "-1", CONFIG, "{new}"], "seed must be in 0 .. 4294967295, "),
        (
            train,
            ["--config.data.flip", CONFIG, "{new}", "--config.seed=-1"],
            "seed must be in 0 .. ",
        ),
        (train, ["--config.seed=-1", f"--config={CONFIG}", "{new}"], "seed must be in 0 .. 42"),
        (train, ["--workdir={new}", CONFIG, "--config.seed=-1"], "seed must be in 0 .. 42949672"),
        (train, [CONFIG], "--workdir must be given"),
        (train, [CONFIG, "{new}", "--init_from"], "init_from must have a value, got none"),
        (
            train,
            [CONFIG, "{new}", "--config.train.b2"],
            "config.train.b2 must have a value, got none",
        ),
        (sample, ["{new}", "{new}", "--labels"], "labels must have a value, got none"),
        (train, ["{new}"], "--config must be given for a new run, and there is none in {new}"),
        (sample, ["{new}", "{new}", "--labels=1"], "checkpoint must be"),
        (sample, ["{new}", "a/b/c.png", "--labels=1"], "out must be in a directory that exists"),
        (evaluate, ["{new}"], "checkpoint must be"),
        (plan, [CONFIG, "a/b/c.json", "--topology=v3:2x2"], "out must be in a directory that"),
        (bench, ["train", CONFIG, "a/b/c.json"], "out must be in a directory that exists, got a"),
        (
            bench,
            [CONFIG, "train"],
            "the first word must be one of train, sample, operations, data, encode, decode, start, "
            "got 'c",
        ),
        (
            bench,
            [CONFIG],
            "must be one of train, sample, operations, data, encode, decode, start, got 'configs/",
        ),
        (plan, ["v5e:2x2", CONFIG], "config must be a Python file that exists, got v5e:2x2; "),
        (
            train,
            [CONFIG, "{new}", "--config.=3"],
            "config has no field ''; --help lists",
        ),
        (train, [CONFIG, "{new}", "--config.run.=3"], "config has no field 'run.'; --help lists "),
        (train, [CONFIG, "{new}", "--config.model"], "--config.model must be set field by field, "),
        (train, ["--config.run", CONFIG, "{new}"], "--config.run must be set field by field, as "),
        (sample, ["a\nb", "--labels=1"], r"an argument must be a single line, got 'a\nb'"),
    ],
)
def test_commands_take_what_they_read_and_write_as_words(refuse, tmp_path, module, words, message):
    new = str(tmp_path / "new")
    line = refuse(module, *(word.replace("{new}", new) for word in words))
    assert message.replace("{new}", new) in line
    assert not (tmp_path / "new").exists()
