"""dit-convert inception from end to end, and wrong use."""

import json

import jax
import numpy as np
import pytest
import torch

from dit_jax.cli import convert, verify
from dit_jax.convert import files, parity, torch_inception
from dit_jax.sampling import extractor


@pytest.fixture(scope="module")
def file(inception_weights, tmp_path_factory):
    """Writes a file like the published one: its format, Parameters, counters of batch norms."""
    tensors = {
        name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in inception_weights.items()
    }
    names = [name for name in tensors if name.endswith("running_mean")]
    counters = {name.replace("running_mean", "num_batches_tracked") for name in names}
    tensors |= dict.fromkeys(sorted(counters), torch.tensor(0))
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def test_published_file_is_converted_and_checked(
    call, file, inception_weights, monkeypatch, tmp_path
):
    sha256 = files.digests(file)[file.name]
    monkeypatch.setattr(torch_inception, "SHA256", sha256)
    out = tmp_path / "out"
    code, text, errors = call(convert, "inception", file, out)
    assert code == 0, errors
    assert "passed: relative error" in text
    report = json.loads((out / "parity.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["pool", "spatial", "logits"]
    assert report["passed"] and report["files"]["from"] == {file.name: sha256}
    assert extractor.describe(out) == {"sha256": sha256, "published": True}
    expected = torch_inception.from_torch(inception_weights)
    jax.tree.map(np.testing.assert_array_equal, extractor.load(out).params, expected)
    _, text, _ = call(convert, "inspect", out)
    assert "Inception of dit_jax" in text and sha256 in text and "23,832,736" in text
    _, text, _ = call(convert, "inspect", file)
    assert "Inception of pytorch-fid (.pth)" in text and "float32, int64" in text
    assert call(verify, out)[0] == 0


def test_failed_parity_check_exits_with_1(call, file, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "INCEPTION_TOLERANCE", 1e-12)
    code, text, _ = call(convert, "inception", file, tmp_path / "out", "--other_weights")
    assert code == 1 and "failed: relative error " in text and "tolerance 1e-12" in text
    assert not extractor.describe(tmp_path / "out")["published"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["/nowhere", "{out}"], "FILE must be an existing file, got /nowhere: download https://gi"),
        (["{folder}", "{out}"], "FILE must be an existing file, got"),
        (["{file}", "{out}"], "FILE must have the sha256 6726825d"),
        (["{small}", "{out}", "--other_weights"], "must have the names of Inception: missing Conv"),
        (["{text}", "{out}", "--other_weights"], "is truncated or not a PyTorch file"),
        (["{file}", "{out}.pt"], "output must be a folder name without .pt, got"),
        (["{file}"], "inception takes FILE OUT, got"),
        (["{file}", "{out}", "--weights=ema"], "inception takes --overwrite, --other_weights, got"),
    ],
)
def test_wrong_use_prints_one_line_and_leaves_no_output(
    refuse, file, tmp_path_factory, tmp_path, args, message
):
    folder = tmp_path_factory.mktemp("files")
    paths = {"small": folder / "small.pth", "text": folder / "text.pth"}
    torch.save({"a": torch.zeros(2)}, paths["small"])
    paths["text"].write_text("no tensors")
    args = [arg.format(file=file, folder=folder, out=tmp_path / "out", **paths) for arg in args]
    assert message in refuse(convert, "inception", *args)
    assert list(tmp_path.iterdir()) == []


def test_other_commands_refuse_an_inception(refuse, inception_weights, tmp_path):
    params = torch_inception.from_torch(inception_weights)
    extractor.save(tmp_path / "x", params, sha256="", published=False)
    message = "checkpoint must be one of a DiT, got"
    assert message in refuse(convert, "to-torch", tmp_path / "x", tmp_path / "x.pt")
