"""The arguments of a command: words, flags and a config, and one line for what is wrong.

What a command reads and writes can be given as words or as flags: `dit-train CONFIG WORKDIR` is
`dit-train --config=CONFIG --workdir=WORKDIR`.
"""

import difflib
import math
import os
import re
import sys
import textwrap
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dit_jax import compat
from dit_jax import settings as settings_lib
from dit_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
OWN_CONFIG = f"{PACKAGE}/runs/own_config.py"
CONFIGS = PACKAGE.with_name("configs")
VARIANT = re.compile(r"(?:dit-)?(ti|s|b|l|xl)/(\d+)", re.IGNORECASE)  # DiT-XL/2, xl/2
SAMPLING = tuple(vars(settings_lib.Sampling()))
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


def define_config(values):
    """Defines the flag config, whose fields are flags too: --config.TOPIC.FIELD=VALUE."""
    text = "PATH[:VARIANT] of a Python file, or DiT-XL/2 for the paper's config of that size."
    config_flags.DEFINE_config_file("config", None, text, flag_values=values)


def define_sampling(values):
    """Defines the flags of SAMPLING; one that is not given comes from the run's config."""
    options = {"flag_values": values}
    flags.DEFINE_enum("sampler", None, settings_lib.SAMPLERS, "The sampler.", **options)
    text = 'Steps, as 20, "ddim50" for equal strides, or times, as 999,600,300.'
    flags.DEFINE_string("num_steps", None, text, **options)
    text = "Which steps a number of steps keeps."
    flags.DEFINE_enum("spacing", None, settings_lib.SPACINGS, text, **options)
    text = "Of a path: above 1, more steps are near noise; 0: as in training."
    flags.DEFINE_float("shift", None, text, **options)
    flags.DEFINE_float("eta", None, "Noise of ddim, from 0 (none) to 1.", **options)
    text = "How much noise sde adds on its way."
    flags.DEFINE_enum("sde_noise", None, settings_lib.SDE_NOISES, text, **options)
    text = "The last step of sde on a path; 0: as the others."
    flags.DEFINE_float("sde_last", None, text, **options)
    flags.DEFINE_boolean("clip_x0", None, "Clip x0 to [-1, 1] at every step: pixels.", **options)
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.", **options)
    text = "How the scale rises from 1 for noise to cfg_scale for data."
    flags.DEFINE_enum("cfg_schedule", None, settings_lib.CFG_SCHEDULES, text, **options)
    flags.DEFINE_integer("cfg_channels", None, "Guide the first N channels; 0: all.", **options)
    text = "Run the blocks in these steps only: every:3, every:3:10-40, steps:0+4+8-11, or none."
    flags.DEFINE_string("cache", None, text, **options)
    text = "Run the null pass in these of them only, written likewise."
    flags.DEFINE_string("cache_guidance", None, text, **options)
    text = "Of the forecast of the other steps: 0 reuses the last value."
    flags.DEFINE_integer("cache_order", None, text, **options)
    text = "How a forecast fits the last values."
    flags.DEFINE_enum("cache_fit", None, settings_lib.CACHE_FITS, text, **options)
    text = "FIRST,LAST: guide at these times only; 0 is the cleanest."
    flags.DEFINE_list("cfg_interval", None, text, **options)
    text = "Scale of guidance of a model that takes it as a condition; 1: none."
    flags.DEFINE_float("omega", None, text, **options)
    text = "FIRST,LAST: the times that this scale is for, in 0 .. 1."
    flags.DEFINE_list("omega_interval", None, text, **options)


def sampling(values):
    """{option: value} of the flags of SAMPLING that were given."""
    given = {name: values[name].value for name in SAMPLING if values[name].value is not None}
    for name in ("cfg_interval", "omega_interval"):
        if name in given:
            given[name] = _parse_interval(name, given[name])
    return given


def _parse_interval(name, texts):
    try:
        return [float(text) for text in texts]
    except ValueError:
        text, example = ",".join(texts), "0,500" if name == "cfg_interval" else "0.1,0.7"
        raise UserError(f"{name} must be two numbers, as {example}, got {text!r}") from None


def settings(values):
    """The Settings of the config in the flags."""
    return settings_lib.read(values.config.to_dict())


def parse(values, *, required=(), words=(), takes=()):
    """Parses sys.argv into the flags; returns the arguments that `takes` names.

    words: flags that can be given as words, in this order, after those arguments. takes None: every
    word is an argument; a name in it as this|that lists what the argument may be. required: flags
    that must be given.
    """
    _check_lines(sys.argv[1:])
    given, found = _split(sys.argv[1:], values)
    count = len(found) if takes is None else len(takes)
    if len(found) > count + len(words):
        rule = " ".join([*takes, *(name.upper() for name in words)]) or "flags only"
        raise UserError(f"takes {rule}, got {' '.join(found)!r}")
    positional = found[:count]
    _check_choices(takes or (), positional)
    given += _name_words(found[count:], words, given)
    if "config" in values:
        _find_config(given, values)
        _check_fields(given)
    _parse_flags(values, given)
    if takes is not None and len(positional) != len(takes):
        raise UserError(f"takes {' '.join(takes)}, got {' '.join(positional)!r}")
    if takes and "" in positional:
        raise UserError(f"{takes[positional.index('')]} must not be empty")
    _check_values(values, required)
    return positional


def _check_lines(arguments):
    """UserError for an argument of several lines, of which a message would show the last only."""
    for each in arguments:
        if len(each.splitlines()) > 1:
            raise UserError(f"an argument must be a single line, got {each!r}")


def _check_choices(takes, found):
    """UserError for an argument that is none of its choices, as one that was left out makes it."""
    for name, word in zip(takes, found, strict=False):
        if "|" in name and word not in name.split("|"):
            choices = name.replace("|", ", ")
            raise UserError(f"the first word must be one of {choices}, got {word!r}")


def _split(arguments, values):
    """(the flags, each with its value, the words) of the arguments, in their order."""
    given, words = [], []
    rest = iter(arguments)
    for each in rest:
        if each == "--":
            words += rest
        elif each == "-" or not each.startswith("-"):
            words.append(each)
        elif "=" in each or not _takes_value(_name(each), values):
            _check_switch(each, values)
            given.append(each)
        elif (value := next(rest, None)) is None:
            raise UserError(f"{_name(each)} must have a value, got none")
        else:
            given.append(f"{each}={value}")
    return given, words


def _name(argument):
    """The name of a flag, without dashes and value."""
    return argument.lstrip("-").partition("=")[0]


def _check_switch(argument, values):
    """UserError for --noNAME=VALUE."""
    name = _name(argument)
    if "=" in argument and name not in values and name.removeprefix("no") in values:
        raise UserError(f"--{name} must have no value, got {argument}")


def _takes_value(name, values):
    if name in values:
        return not values[name].boolean
    return type(settings_lib.defaults().get(name.removeprefix("config."), False)) is not bool


def _name_words(found, words, given):
    """The words as flags: those that are not given as flags, in order."""
    names = [_name(flag) for flag in given]
    free = [name for name in words if name not in names]
    if len(found) == 1 and free[:2] == ["config", "workdir"] and not _is_config(found[0]):
        free = ["workdir"]  # of a run, which resumes with its own config
    if len(found) > len(free):
        name, word = next(pair for pair in zip(words, found, strict=False) if pair[0] in names)
        raise UserError(f"{name} must be given once, got the word {word} and --{name} too")
    return [f"--{name}={word}" for name, word in zip(free, found, strict=False)]


def _is_config(word):
    return bool(VARIANT.fullmatch(word)) or word.partition(":")[0].endswith(".py")


def _find_config(given, values):
    """Moves --config to the front, as ml_collections wants it, with the path of its file.

    A command with --workdir that is given no --config takes the config of the run in workdir.
    """
    texts = {_name(flag): flag.partition("=")[2] for flag in given}
    configs = [flag.partition("=")[2] for flag in given if _name(flag) == "config"]
    if len(configs) > 1:
        raise UserError(f"config must be given once, got {' and '.join(configs)}")
    given[:] = [flag for flag in given if _name(flag) != "config"]
    if "config" in texts:
        given.insert(0, f"--config={_locate(texts['config'])}")
    elif "workdir" in values and texts.get("workdir"):
        given.insert(0, f"--config={OWN_CONFIG}:{texts['workdir']}")


def _locate(text):
    """PATH[:VARIANT] of a config that is given as such or as a size of the paper."""
    if size := VARIANT.fullmatch(text):
        return f"{CONFIGS}/imagenet256.py:{_spell(size)}"
    path, colon, variant = text.partition(":")
    if not path:
        raise UserError("config must not be empty")
    path = Path(os.path.expanduser(path))  # unlike a shell, which leaves ~ alone after --config=
    installed = CONFIGS.parent / path  # configs/ is beside the package
    if not path.is_file() and installed.is_file():
        path = installed
    if not path.is_file():
        raise UserError(f"config must be a Python file that exists, got {text}{_offer(path)}")
    # The file may say `from configs import base`, so the parent of its folder is importable.
    sys.path.insert(0, str(path.resolve().parent.parent))
    size = VARIANT.fullmatch(variant)
    return f"{path}{colon}{_spell(size) if size else variant}"


def _spell(size):
    """SIZE/PATCH as configs write it."""
    letters = size[1].upper()
    return f"{'Ti' if letters == 'TI' else letters}/{size[2]}"


def _offer(path):
    """What could be meant by a path that is no file."""
    names = sorted(each.stem for each in CONFIGS.glob("[a-z]*.py") if each.stem != "base")
    if path.stem in names:
        return f"; did you mean {CONFIGS / path.stem}.py?"
    found = ", ".join(f"{name}.py" for name in names)
    return f"; {CONFIGS} has {found}, and DiT-XL/2 stands for imagenet256.py:XL/2" if names else ""


def _check_fields(given):
    """UserError for --config.X=... without a field X."""
    for flag in given:
        topic, dot, name = _name(flag).partition(".")
        known = settings_lib.defaults()
        if topic in ("config", "noconfig") and dot and name not in known:
            if not any(field.startswith(f"{name}.") for field in known):
                is_plain = all(map(str.isidentifier, name.split(".")))
                shown = name if is_plain else repr(name)
                raise UserError(f"config has no field {shown}{_suggest(name)}")
            if "=" not in flag:  # ml_collections would take the next argument as its value
                example = f"--config.{name}.FIELD=VALUE"
                raise UserError(f"--config.{name} must be set field by field, as {example}")


def _suggest(name):
    near = [f"--config.{field}" for field in settings_lib.nearest(name)]
    return (f"; did you mean {' or '.join(near)}?" if near else ";") + " --help lists all fields"


def _suggest_flag(name, values):
    known = [each for each in values if "." not in each]
    if near := difflib.get_close_matches(name, known, 1, cutoff=0.6):
        return f"; did you mean --{near[0]}?"
    if "config" in values and settings_lib.nearest(name):
        return _suggest(name)
    return "; --help lists all flags"


def _parse_flags(values, given):
    argv, sys.argv = sys.argv, [sys.argv[0], *given]  # where ml_collections looks for fields
    try:
        values(sys.argv)
    except (SyntaxError, ImportError) as error:
        path = given[0].partition("=")[2].partition(":")[0]
        raise UserError(f"config must be a Python file that runs, got {path}: {error}") from error
    except (KeyError, AttributeError) as error:
        path = given[0].partition("=")[2].partition(":")[0]
        field = compat.unknown_config_field(error)
        if not field:
            line = f"config must be a Python file with a get_config(), got {path}"
            raise UserError(line) from error
        near = settings_lib.nearest(field)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"config has no field {field}{hint}") from error
    except flags.IllegalFlagValueError as error:
        raise UserError(compat.explain_flag_error(error, values)) from error
    except flags.UnrecognizedFlagError as error:
        hint = _suggest_flag(error.flagname, values)
        raise UserError(f"there is no flag --{error.flagname}{hint}") from error
    finally:
        sys.argv = argv


def _check_values(values, required):
    for name in required:
        if values[name].value is None:
            raise UserError(f"--{name} must be given")
    for name in values:
        value = values[name].value
        if value in ("", []):
            raise UserError(f"{name} must not be empty")
        if "." not in name and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be finite, got {value}")  # absl's bounds accept nan
        if isinstance(value, str) and value.startswith("--"):  # `--vae --labels=1`
            raise UserError(f"{name} must have a value, got {value}")
    if "config" in values and values.config:
        settings(values)  # checks them


def describe(values):
    """The flags for --help, and the fields of a config if there is one."""
    lines = ["Flags:", *(_describe_flag(values[name]) for name in values if "." not in name)]
    if "config" in values:
        lines += ["", "Fields and their defaults; your config file may set others:"]
        for name, default in settings_lib.defaults().items():
            rule = settings_lib.rule(name)
            lines.append(f"  --config.{name}={default}".ljust(44) + rule)
    return "\n".join(lines)


def _describe_flag(flag):
    has_default = flag.default not in (None, "") and flag.default is not False
    text = flag.help + (f" Default: {flag.default}." if has_default else "")
    first, *more = textwrap.wrap(text, 76)
    return "\n".join([f"  --{flag.name}".ljust(24) + first, *(" " * 24 + line for line in more)])
