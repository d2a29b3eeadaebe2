"""dit-verify: reports damage, and writes nothing."""

import json
import shutil

import pictures
import pytest
import random_run

from dit_jax.checkpoint import store
from dit_jax.cli import convert, prepare, verify
from dit_jax.convert import commands

OTHER = {"data": {"source": "images", "space": "pixels"}}


@pytest.fixture
def run(tmp_path):
    """A training run with two steps and one that was set aside."""
    for step in (20, 30):
        random_run.save(tmp_path / "run", step=step)
    (tmp_path / "run" / "config.json").write_text(json.dumps(random_run.CONFIG | {"run": {}}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 30, "saved": 30}\n')
    (tmp_path / "run" / "damaged" / "10").mkdir(parents=True)
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_intact_run_has_no_damage_and_is_not_changed(call, run):
    before = contents(run)
    code, said, _ = call(verify, run)
    assert code == 0 and contents(run) == before
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert [name for name, _ in lines[:5]] == [
        *("config.json", "metrics.jsonl", "checkpoints/20", "checkpoints/30", "damaged/10")
    ]
    assert said.splitlines()[-1] == "no damage found"
    assert "arrays of params, ema" in lines[3][1] and "1 record to step 30" in lines[1][1]


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/30"])
def test_a_part_of_a_run_can_be_checked_alone(call, run, inside):
    code, said, _ = call(verify, run / inside)
    assert code == 0 and "checkpoints/30" in said and "config.json" not in said


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: flip(largest(run)), "is damaged: params["),
        (lambda run: largest(run).write_bytes(b"cut"), "cannot be read: "),
        (lambda run: largest(run).unlink(), "cannot be read: "),
        (lambda run: shutil.rmtree(run / "checkpoints" / "30" / "ema"), "cannot be read: "),
        (lambda run: (run / "checkpoints/30/meta/metadata").write_text("{"), "cannot be read: "),
        (lambda run: (run / "config.json").write_text("{"), "config.json must be JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "line 1 of "),
        (lambda run: (run / "config.json").unlink(), "config.json is missing or empty"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty"),
        (
            lambda run: (run / "config.json").write_text(json.dumps(random_run.CONFIG | OTHER)),
            "data.source 'digits', got 'images'",
        ),
        (lambda run: move(run, "30", "31"), "checkpoints/31 is damaged: it was saved as step 30"),
    ],
    ids=[
        *("flipped", "cut", "deleted", "item deleted", "meta", "config", "record"),
        *("no config", "no record", "another config", "another step"),
    ],
)
def test_damage_is_reported(call, run, damage, message):
    damage(run)
    code, said, _ = call(verify, run)
    assert code == 1 and said.splitlines()[-1] == "1 of 5 is damaged"
    (line,) = (line for line in said.splitlines() if "DAMAGED" in line)
    assert message in line


def move(run, old, new):
    (run / "checkpoints" / old).rename(run / "checkpoints" / new)
    shutil.copy(run / "checkpoints" / "20" / "_CHECKPOINT_METADATA", run / "checkpoints" / new)


def test_missing_and_incomplete_steps_are_reported(call, run):
    (run / "checkpoints" / "30" / "_CHECKPOINT_METADATA").unlink()
    code, said, _ = call(verify, run)
    assert code == 1 and "checkpoints/30 is incomplete" in said
    assert "step 30 was saved but is missing" in said
    shutil.rmtree(run / "checkpoints")
    code, said, _ = call(verify, run)
    assert code == 1 and "step 30 was saved but is missing" in said


def test_a_step_that_a_running_training_deletes_is_no_damage(call, run, monkeypatch):
    def vanish(directory, step):
        if step == 20:
            shutil.rmtree(run / "checkpoints" / "20")
            raise store.Damaged("gone")

    monkeypatch.setattr(store, "verify", vanish)
    code, said, _ = call(verify, run)
    assert code == 0 and "was deleted meanwhile by a running training" in said


def largest(run):
    """The file with most of the newest step's parameters."""
    files = (path for path in (run / "checkpoints" / "30" / "params").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_shards_are_compared_with_their_digests(call, tmp_path):
    pictures.draw(tmp_path / "tree", per_class=4)
    images = tmp_path / "images"
    assert call(prepare, tmp_path / "tree", images, "--num_shards=2")[0] == 0
    code, said, _ = call(verify, images)
    assert code == 0 and said.count(" MB") == 2
    shard = max(images.glob("*array_record*"))
    flip(shard)
    code, said, _ = call(verify, images)
    assert code == 1 and f"{shard} is damaged: its sha256 is not" in said
    shard.unlink()
    assert f"{shard} must have" in call(verify, images)[1]
    (images / "manifest.json").write_text("{")
    code, said, _ = call(verify, images)
    assert code == 1 and "manifest.json must be JSON, but it is damaged" in said


def test_shard_without_a_digest_is_damage(call, tmp_path):
    pictures.draw(tmp_path / "tree", per_class=4)
    images = tmp_path / "images"
    assert call(prepare, tmp_path / "tree", images, "--num_shards=2")[0] == 0
    manifest = json.loads((images / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    del shards[min(shards)]["sha256"]
    (images / "manifest.json").write_text(json.dumps(manifest))
    code, said, _ = call(verify, images)
    assert code == 1 and "must have the size and the sha256 of images-train.array_rec" in said


@pytest.fixture
def convert_unchecked(call, run, monkeypatch):
    """convert_unchecked(*args): a conversion without its parity check, which takes seconds."""

    def convert_run(name, out, *options):
        with monkeypatch.context() as patch:
            patch.setattr(commands.importlib.util, "find_spec", lambda name: None)
            code, _, errors = call(convert, name, run, out, *options)
        assert code == 0, errors
        return out

    return convert_run


@pytest.mark.parametrize(
    "args, weights",
    [
        (("to-torch", "out", "--bundle"), "out/model.safetensors"),
        (("to-diffusers", "out"), "out/transformer/diffusion_pytorch_model.safetensors"),
        (("to-torch", "out.safetensors"), "out.safetensors"),
    ],
)
def test_what_was_converted_for_pytorch_is_compared_with_its_digests(
    call, refuse, tmp_path, convert_unchecked, args, weights
):
    name, out, *options = args
    out, weights = tmp_path / out, tmp_path / weights
    convert_unchecked(name, out, *options)
    code, said, _ = call(verify, out)
    *names, last = (line.split()[0] for line in said.splitlines())
    count = len(names)
    assert code == 0 and last == "no" and count == (4 if out.is_dir() else 1)
    flip(weights)
    code, said, _ = call(verify, out)
    assert code == 1 and said.splitlines()[-1] == f"1 of {count} is damaged"
    assert f"DAMAGED: {weights} is not the file that was written: its sha256 is not" in said
    report = out / "parity.json" if out.is_dir() else tmp_path / "out.safetensors.parity.json"
    if out.is_dir():
        weights.unlink()
        assert f"{weights} is missing" in call(verify, out)[1]
        weights.touch()
        report.write_text("{")
        code, said, _ = call(verify, out)
        assert code == 1 and "parity.json must be JSON, but it is damaged" in said
    report.unlink()
    assert "PATH must have the digests that dit-convert writes (parity.json), got" in refuse(
        verify, out
    )


def test_autoencoder_of_diffusers_has_no_digests(refuse, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    assert "got a folder of diffusers without" in refuse(verify, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"manifest.json": '{"name": "a page", "icons": []}'},
        {"manifest.json": '{"splits": ["train"], "shards": ["a.tar"]}'},
        {"manifest.json": '{"splits": {"train": 3, "test": {"shards": ["a.tar"]}}}'},
        {"manifest.json": '{"shards": {"a.tar": 3}}'},
        {"manifest.json": "{"},
        {"config.json": '{"a": 1}'},
        {"config.json": '{"model": "gpt", "data": {}, "diffusion": {}}'},
        {"config.json": "{"},
        {"metrics.jsonl": '{"step": 1, "loss": 2.0}\n', "config.json": "{}"},
        {"metrics.jsonl": "step,loss\n"},
        {"checkpoints/0400000.pt": "", "log.txt": "of the official script"},
        {"0/cat.png": "", "1/dog.png": ""},
        {"damaged/7/x": ""},
        {"parity.json": '{"files": 3}'},
        {"parity.json": '{"files": {"to": ["a"]}}'},
        {"a.txt": "", "b/c.txt": ""},
    ],
)
def test_a_folder_of_another_program_is_nothing_of_the_kind(refuse, tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert f"got nothing of the kind: {tmp_path}" in refuse(verify, tmp_path)


def test_a_path_that_does_not_exist_is_refused(refuse, tmp_path):
    assert f"PATH must exist, got {tmp_path}/none" in refuse(verify, tmp_path / "none")
    assert refuse(verify, "") == "dit-verify: PATH must not be empty"


def test_a_run_is_known_by_its_config_or_its_record(call, run):
    shutil.rmtree(run / "checkpoints")
    config = (run / "config.json").read_text()
    (run / "config.json").unlink()
    code, said, _ = call(verify, run)
    assert code == 1 and "config.json is missing" in said and "step 30 was saved but is mi" in said
    (run / "metrics.jsonl").unlink()
    (run / "config.json").write_text(config)
    code, said, _ = call(verify, run)  # a run that has not come to its first save
    assert code == 0 and "no record yet" in said
