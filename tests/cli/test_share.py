"""dit-convert card, push and pull, with huggingface_hub and a hub in this process."""

import json
import os
import re
import shlex
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.cli import convert, evaluate, sample, verify
from dit_jax.convert import commands, native

# huggingface_hub sends files with data=, which httpx2 wants to be content=.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMES = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAME = "alice/digits"
FILES = {"README.md", "config.json", "dit.py", "model.safetensors", "parity.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of digits whose classes have names."""
    path = tmp_path_factory.mktemp("run")
    random_run.save(path, class_names=NAMES, data_sha256="12ab")
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the parity checks, as without PyTorch."""
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)


def convert_ok(call, *args):
    code, out, errors = call(convert, *args)
    assert code == 0, errors
    return out


def code_of(card, language):
    """The blocks of code of a card."""
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_what_is_pushed_comes_back_bit_for_bit(call, hub, tmp_path, run):
    said = convert_ok(call, "push", run, NAME, "--license=mit", "--private")
    assert "passed: relative error" in said and f"pushed: {os.environ['HF_ENDPOINT']}/" in said
    assert hub.repositories[NAME].private
    files = hub.files(NAME)
    assert files.keys() == FILES | {".gitattributes"}
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and "agrees with JAX to a relative error of" in card.text
    out = tmp_path / "back"
    assert "passed: relative error" in convert_ok(call, "pull", NAME, out)
    back, expected = dit_jax.load(out), dit_jax.load(run)
    jax.tree.map(np.testing.assert_array_equal, back.params, expected.params)
    assert back.class_names == expected.class_names == tuple(NAMES)
    assert back.config == expected.config and back.sampling == expected.sampling
    assert back.settings.data.source == "digits" and back.digest == expected.digest
    assert (out / "README.md").read_bytes() == files["README.md"]
    commit = hub.repositories[NAME].branches["main"]
    assert native.read_meta(out)["pulled"] == {"repository": NAME, "commit": commit}
    assert call(verify, out)[0] == 0


@pytest.mark.slow  # convert/test_bundle.py runs the code of a bundle's README, which is the same
def test_the_commands_and_the_code_of_a_card_run(call, hub, tmp_path, run, unchecked):
    convert_ok(call, "push", run, NAME)
    card = hub.files(NAME)["README.md"].decode()
    (commands_,), (code,) = code_of(card, "bash"), code_of(card, "python")
    for line in commands_.splitlines():
        program, *args = shlex.split(line)
        module = {"dit-convert": convert, "dit-sample": sample}[program]
        places = {name: tmp_path / name for name in ("digits", "grid.png")}
        status, _, errors = call(module, *(places.get(arg, arg) for arg in args))
        assert status == 0, errors
    assert (tmp_path / "grid.png").is_file()
    alone = "import sys\nfor name in ('jax', 'dit_jax'):\n    sys.modules[name] = None\n"
    check = "\nassert images.shape == (3, 8, 8, 1) and images.dtype == 'uint8'"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", alone + code + check], env=environment, check=True)


def test_scores_go_with_their_receipts(call, hub, tmp_path, run, unchecked):
    meta = native.read_meta(run)
    digest = dit_jax.load(run).digest
    judgments = {"agreement": 0.5, "classifier_accuracy": 0.99, "nearest_distance": 2.5}
    found = {"step": 30, "weights": "ema", "seed": 0, "digest": digest, "judgments": judgments}
    found |= {"samples": {"guided": 1000, "unguided": 1500}, "sampling": meta["config"]["sampling"]}
    (tmp_path / "judgments.json").write_text(json.dumps(found))
    convert_ok(call, "push", run, NAME, f"--scores={tmp_path}")
    files = hub.files(NAME)
    assert json.loads(files["scores/judgments.json"]) == found
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "agreement with the label": 0.5,
        "distance to the nearest training digit": 2.5,
    }
    assert "| agreement with the label | 0.5 | 0.99 |" in card.text
    convert_ok(call, "pull", NAME, tmp_path / "back")
    convert_ok(call, "push", tmp_path / "back", "alice/again")  # its scores are found again
    again = hub.files("alice/again")
    assert again["scores/judgments.json"] == files["scores/judgments.json"]
    assert f"pulled from [{NAME}]" in again["README.md"].decode()
    convert_ok(call, "push", run, NAME)  # without the scores, which are then deleted
    assert hub.files(NAME).keys() == FILES | {".gitattributes"}
    assert "None: these parameters were not judged" in hub.files(NAME)["README.md"].decode()


def test_an_upload_that_failed_goes_on(call, refuse, hub, tmp_path, run, unchecked):
    for where in ("PUT /store", "POST .*/commit/"):
        hub.refused = where
        line = refuse(convert, "push", run, NAME)
        assert f"{NAME} could not be read or written: " in line and "no space left" in line
        assert hub.files(NAME).keys() == {".gitattributes"}
        assert "without config.json" in refuse(convert, "pull", NAME, tmp_path / "x")
    hub.refused = ""
    assert hub.times_sent() == 2  # one refused, one stored
    convert_ok(call, "push", run, NAME)
    assert hub.times_sent() == 2 and hub.files(NAME).keys() == FILES | {".gitattributes"}
    commits = len(hub.repositories[NAME].commits)
    convert_ok(call, "push", run, NAME)  # nothing is new
    assert len(hub.repositories[NAME].commits) == commits and hub.times_sent() == 2


def test_a_download_that_breaks_off_goes_on(call, hub, tmp_path, run, unchecked):
    convert_ok(call, "push", run, NAME)
    hub.cut = set(hub.large)
    convert_ok(call, "pull", NAME, tmp_path / "back")
    assert not hub.cut
    assert dit_jax.load(tmp_path / "back").digest == dit_jax.load(run).digest


@pytest.mark.parametrize("part", ["model", "dit.py"])
def test_damage_on_the_way_is_found(call, refuse, hub, tmp_path, run, unchecked, part):
    convert_ok(call, "push", run, NAME)
    hub.damaged = set(hub.large) if part == "model" else {part}
    line = refuse(convert, "pull", NAME, tmp_path / "back")
    assert f"of {NAME} is damaged: its sha256 is not that of parity.json; delete /" in line
    assert list(tmp_path.iterdir()) == []
    os.unlink(line.split("; delete ")[1].split(" and pull again")[0])
    hub.damaged = set()
    convert_ok(call, "pull", NAME, tmp_path / "back")


def test_branches_and_commits(call, refuse, hub, tmp_path, run, unchecked):
    convert_ok(call, "push", run, NAME, "--revision=ema")
    assert hub.files(NAME).keys() == {".gitattributes"}  # main
    assert hub.files(NAME, "ema").keys() == FILES | {".gitattributes"}
    convert_ok(call, "push", run, NAME, "--weights=params")
    commit = hub.repositories[NAME].branches["main"]
    convert_ok(call, "push", run, NAME, "--revision=other")  # starts from main
    for revision, weights in ("ema", "ema"), (commit, "params"), ("other", "ema"):
        convert_ok(call, "pull", NAME, tmp_path / revision, f"--revision={revision}")
        expected = dit_jax.load(run, weights=weights).digest
        assert dit_jax.load(tmp_path / revision).digest == expected
    line = refuse(convert, "pull", NAME, tmp_path / "x", "--revision=none")
    assert f"revision must be a branch, a tag or a commit of {NAME}, got none" in line


def test_a_card_of_ones_own_is_kept(call, refuse, hub, tmp_path, run, unchecked):
    card = tmp_path / "card.md"
    convert_ok(call, "card", run, card, f"--repo={NAME}")
    assert "digits" in card.read_text() and f"pull {NAME} digits" in card.read_text()
    assert "output must not exist unless" in refuse(convert, "card", run, card)
    convert_ok(call, "card", run, card, "--overwrite", "--license=cc-by-4.0")
    card.write_text(card.read_text() + "\nMine.\n")
    convert_ok(call, "push", run, NAME, f"--card={card}")
    assert hub.files(NAME)["README.md"] == card.read_bytes()
    hub.commit(NAME, {"README.md": b"edited", "picture.png": b"png"})
    line = refuse(convert, "push", run, NAME)
    assert f"README.md of {NAME} must be as it was pushed, got an edited one: --card=FILE" in line
    convert_ok(call, "pull", NAME, tmp_path / "back")  # an edited card is no damage
    assert (tmp_path / "back" / "README.md").read_text() == "edited"
    convert_ok(call, "push", run, NAME, "--overwrite")
    files = hub.files(NAME)
    assert files.keys() == FILES | {".gitattributes", "picture.png"}
    assert b"# digits" in files["README.md"]


def test_a_failed_check_uploads_nothing(call, hub, run, monkeypatch):
    monkeypatch.setattr(commands.parity, "TOLERANCE", 1e-12)
    code, out, _ = call(convert, "push", run, NAME)
    assert code == 1 and "failed: relative error" in out and "nothing was uploaded" in out
    assert hub.repositories == {}


PUSH, PULL = ["push", "{run}", NAME], ["pull", NAME, "{out}"]


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["push", "{run}", "digits"],
            "REPO must be NAMESPACE/NAME of the Hugging Face hub, as ali",
        ),
        (["pull", "https://x/a/b", "{out}"], "REPO must be NAMESPACE/NAME of the Hugging Face hub"),
        (
            ["pull", "alice/none", "{out}"],
            "REPO must exist, got alice/none: if it is private, your ",
        ),
        (
            ["pull", "bob/private", "{out}"],
            "REPO must exist, got bob/private: if it is private, yo",
        ),
        (["push", "{run}", "bob/private"], "got bob/private: "),
        (
            ["push", "{run}", "bob/public"],
            "REPO must be one that your token may write, got bob/pub",
        ),
        (["pull", "bob/gated", "{out}"], "REPO must be one whose conditions you have accepted on"),
        (["push", "{run}", "alice/other"], "that dit-convert pushed, got alice/other with a.bin"),
        (
            ["push", "{run}", "alice/public", "--private"],
            "--private must be for a new or a private",
        ),
        (
            ["push", "{run}", "alice/readme"],
            "README.md of alice/readme must be as it was pushed, g",
        ),
        (
            ["pull", "alice/other", "{out}"],
            "that dit-convert pushed, got alice/other without confi",
        ),
        (
            ["pull", "alice/pipe", "{out}"],
            "without config.json: run `hf download alice/pipe --local",
        ),
        (["pull", "alice/lost", "{out}"], "got alice/lost: parity.json lacks config.json"),
        (["pull", NAME, "{out}.pt"], "output must be a folder name without .pt"),
        ([*PULL, "--license=mit"], "pull takes --overwrite, --revision, got --license"),
        ([*PUSH, "--license=MIT"], "license must be a name of the hub, as mit, got 'MIT'"),
        ([*PUSH, "--dataset=a b"], "dataset must be NAMESPACE/NAME on the hub, got 'a b'"),
        ([*PUSH, "--weights=model"], "weights must be ema or params, got 'model'"),
        ([*PUSH, "--card=/nowhere"], "card must be a file that exists, got /nowhere"),
        ([*PUSH, "--card={run}/text.md"], "card must begin with YAML between two lines of ---, go"),
        ([*PUSH, "--card={run}/bad.md"], "card must have YAML that can be read, got"),
        ([*PUSH, "--card={run}/good.md", "--license=mit"], "license must not be given with --card"),
        ([*PUSH, "--scores={run}/text.md"], "text.md must be JSON, but it is damaged"),
        ([*PUSH, "--scores={run}/none.json"], "scores must be a file that dit-evaluate wrote, got"),
        ([*PUSH, "--scores={run}/old.json"], "of step 30 of the checkpoint, got {run}/old.json of"),
        (["card", "{run}", "{out}"], "out must end with .md, got"),
        (["card", "/nowhere", "{out}.md"], "checkpoint must be a directory with a saved step"),
    ],
)
def test_wrong_use_prints_one_line(refuse, hub, tmp_path, run, unchecked, args, message):
    hub.commit("bob/private", {}, private=True)
    hub.commit("bob/public", {".gitattributes": b""})
    hub.commit("bob/gated", {})
    hub.repositories["bob/gated"].gated = True
    hub.commit("alice/other", {"a.bin": b"", "parity.json": b"no JSON"})
    hub.commit("alice/public", {})
    hub.commit("alice/readme", {"README.md": b"hello"})
    hub.commit("alice/pipe", {"model_index.json": b"{}"})
    hub.commit("alice/lost", {name: b'{"files": {"to": {}}}' for name in FILES})
    before = {name: dict(each.branches) for name, each in hub.repositories.items()}
    (run / "text.md").write_text("text")
    (run / "bad.md").write_text("---\na: [\n---\n")
    (run / "good.md").write_text("---\nlicense: mit\n---\n")
    (run / "none.json").write_text("{}")
    old = {"step": 20, "weights": "ema", "seed": 0, "judgments": {}}
    old |= {"samples": {"guided": 1, "unguided": 1}}
    old |= {"sampling": {"sampler": "ddim", "num_steps": "4", "cfg_scale": 2.0}}
    (run / "old.json").write_text(json.dumps(old))
    line = refuse(convert, *(arg.format(run=run, out=tmp_path / "out") for arg in args))
    assert message.format(run=run) in line
    assert list(tmp_path.iterdir()) == []
    after = {name: dict(each.branches) for name, each in hub.repositories.items()}
    assert after == before


@pytest.mark.parametrize(
    "environment, command, message",
    [
        ({"HF_TOKEN": ""}, PUSH, "push must have a token of the Hugging Face hub, got none: run `"),
        (
            {"HF_TOKEN": "hf_x"},
            PUSH,
            "the token of the Hugging Face hub must be valid: run `hf aut",
        ),
        (
            {"HF_TOKEN": "hf_x"},
            PULL,
            "the token of the Hugging Face hub must be valid: run `hf aut",
        ),
        ({"HF_TOKEN": ""}, PULL, f"REPO must exist, got {NAME}: if it is private, run `hf auth"),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            PUSH,
            "hub must be reachable (http://127.0.0.1:9), ",
        ),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            PULL,
            "hub must be reachable (http://127.0.0.1:9), ",
        ),
    ],
)
def test_without_token_or_network(
    refuse, hub, tmp_path, run, unchecked, monkeypatch, environment, command, message
):
    hub.commit(NAME, {}, private=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refuse(convert, *(arg.format(run=run, out=tmp_path / "out") for arg in command))
    assert message in line and list(tmp_path.iterdir()) == []


def test_offline_is_said(refuse, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refuse(convert, "pull", NAME, tmp_path / "out")
    assert f"HF_HUB_OFFLINE must be 0 to reach {NAME}, got 1" in line


def test_a_change_by_someone_else_is_not_overwritten(refuse, hub, run, unchecked, monkeypatch):
    hub.commit(NAME, {".gitattributes": b""})
    write = commands._write_bundle

    def meanwhile(*args):
        hub.commit(NAME, {"note.txt": b"new"})
        return write(*args)

    monkeypatch.setattr(commands, "_write_bundle", meanwhile)
    assert f"{NAME} was changed by someone else meanwhile" in refuse(convert, "push", run, NAME)
    assert hub.files(NAME).keys() == {".gitattributes", "note.txt"}


@pytest.mark.slow
def test_digits_are_judged_after_they_were_pulled(call, hub, tmp_path, run):
    convert_ok(call, "push", run, NAME)
    convert_ok(call, "pull", NAME, tmp_path / "back")
    code, out, errors = call(evaluate, tmp_path / "back")
    assert code == 0 and "agreement with the requested class" in out, errors
    convert_ok(call, "card", tmp_path / "back", tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    assert "Receipt: `scores/judgments.json`" in text and "1,000 samples with guidance" in text
