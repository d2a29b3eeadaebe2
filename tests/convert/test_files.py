import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors_torch

from dit_jax.convert import files

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3)}
AVERAGE = {name: x + 10 for name, x in TENSORS.items()}


def expect_same(state_dict, tensors):
    assert state_dict.keys() == tensors.keys()
    for name, x in tensors.items():
        assert isinstance(state_dict[name], np.ndarray)
        np.testing.assert_array_equal(state_dict[name], x.float().numpy())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_bare_state_dict(tmp_path, options):
    torch.save(TENSORS, tmp_path / "x.pt", **options)
    expect_same(files.read_state_dict(tmp_path / "x.pt"), TENSORS)


def test_what_the_official_script_saves(tmp_path):
    """With optimizer and arguments; prefixes come from its parallel wrapper and torch.compile."""
    path = tmp_path / "x.pt"
    wrapped = {f"module._orig_mod.{name}": x for name, x in TENSORS.items()}
    optimizer = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(100, 100)}}}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    torch.save({"model": wrapped, "ema": AVERAGE, "opt": optimizer, "args": args}, path)
    expect_same(files.read_state_dict(path), AVERAGE)
    expect_same(files.read_state_dict(path, "model"), TENSORS)
    assert files.groups(path) == ["ema", "model"]
    torch.save({"model": wrapped}, path)
    with pytest.raises(
        ValueError, match="weights must be model for .*x.pt, got ema: give --weights=model"
    ):
        files.read_state_dict(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision(tmp_path, dtype, suffix):
    tensors = {name: x.to(dtype) for name, x in TENSORS.items()}
    path = tmp_path / f"x{suffix}"
    save = torch.save if suffix == ".pt" else safetensors_torch.save_file
    save(tensors, path)
    state_dict = files.read_state_dict(path)
    expect_same({name: np.float32(x) for name, x in state_dict.items()}, tensors)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_what_is_written_comes_back(tmp_path, suffix):
    arrays = {name: x.numpy() for name, x in TENSORS.items()}
    path = tmp_path / f"x{suffix}"
    files.write_state_dict(path, arrays)
    expect_same(files.read_state_dict(path), TENSORS)
    assert path.stat().st_mode & 0o044 == 0o044  # others may read it


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, options):
    path, trace = tmp_path / "x.pt", tmp_path / "trace"
    torch.save({"a": Exploit(trace)}, path, **options)
    with pytest.raises(ValueError, match="x.pt was not opened: .* it holds posix.mkdir, which may"):
        files.read_state_dict(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it is a live one
    assert trace.exists()


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Exploit(tmp_path / "trace")))
    with pytest.raises(ValueError, match="x.pt"):
        files.read_state_dict(tmp_path / "x.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0, 0.3, 0.9])
def test_a_file_cut_short(tmp_path, suffix, part):
    path = tmp_path / f"x{suffix}"
    files.write_state_dict(path, {"a": np.zeros((50, 50), np.float32)})
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"x{suffix} is cut short or no"):
        files.read_state_dict(path)


def test_what_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt must hold a state dict, got list"):
        files.read_state_dict(tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="file must end with .pt, .pth, .bin, .safetensors, got x.bin2"
    ):
        files.read_state_dict("x.bin2")
    with pytest.raises(ValueError, match="checkpoint must be a file, got nowhere.pt"):
        files.read_state_dict("nowhere.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"state_dict": TENSORS, "epoch": 3},
            "must hold a state dict, got a dict of state_dict, e",
        ),
        ({"model": TENSORS, "ema": None}, "weights must be model for .*, got ema: give --weights"),
        ({"ema": {"a": "b"}}, "must hold a state dict, got a dict of a"),
        ({1: torch.zeros(2)}, "must hold a state dict, got a dict of 1"),
        (
            {"a": torch.zeros(2, 2).to_sparse()},
            "^a must be a plain dense tensor, got torch.float32",
        ),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "^a must be of a type that NumPy has, got"),
        ({"a": torch.zeros(2, device="meta")}, "^a must be a plain dense tensor, got"),
    ],
)
def test_what_holds_no_tensors_where_they_should_be(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        files.read_state_dict(tmp_path / "x.pt")


def test_a_type_that_numpy_has_not(tmp_path):
    tensors = {"a": torch.zeros(2).to(torch.float8_e4m3fn)}
    safetensors_torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors must hold plain floats, got"):
        files.read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", [b"\x89PNG\r\n\x1a\n123", b"# a text", pickle.dumps([1], 4)])
def test_files_of_other_programs(tmp_path, text):
    (tmp_path / "x.pt").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"^[^\n]*x.pt is cut short or no file of PyTorch's$|state dict, got"
    ):
        files.read_state_dict(tmp_path / "x.pt")


def test_what_is_missing_comes_with_the_line_that_installs_it():
    with pytest.raises(ValueError, match=r"nothing_of_that_name must be .*dit_jax\[convert\]"):
        files.require("nothing_of_that_name")


def write(out, *, folder=False, overwrite=False, source=__file__):
    """A conversion that writes a file, and a report beside it, or a folder with one."""
    options = {"source": source, "folder": folder, "overwrite": overwrite}
    with files.written_aside(out, **options) as aside:
        if folder:
            aside.mkdir()
            (aside / "parity.json").write_text("new")
        else:
            aside.write_text("new")
            files.report_of(aside).write_text("new report")


def test_nothing_half_written_is_left(tmp_path):
    options = {"source": __file__, "folder": True, "overwrite": False}
    with pytest.raises(RuntimeError), files.written_aside(tmp_path / "out", **options) as aside:
        aside.mkdir()
        (aside / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_its_report_are_replaced_only_if_asked(tmp_path):
    out, report = tmp_path / "out.pt", tmp_path / "out.pt.parity.json"
    for old in (out, report):  # also the report alone
        old.write_text("old")
        with pytest.raises(ValueError, match=f"output must not exist, or --overwrite .* got {old}"):
            write(out)
        assert old.read_text() == "old"
        old.unlink()
    write(out)
    write(out, overwrite=True)
    assert (out.read_text(), report.read_text()) == ("new", "new report")
    assert sorted(tmp_path.iterdir()) == [out, report]


def test_a_folder_is_replaced_only_if_asked(tmp_path):
    out = tmp_path / "out"
    write(out, folder=True)
    (out / "parity.json").write_text("old")
    with pytest.raises(ValueError, match="output must not exist, or --overwrite be given, got"):
        write(out, folder=True)
    write(out, folder=True, overwrite=True)
    assert (out / "parity.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_what_is_discarded_replaces_nothing(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    options = {"source": __file__, "folder": False, "overwrite": True}
    with files.written_aside(out, **options) as aside:
        aside.write_text("worse")
        files.discard(aside)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_a_file_never_takes_the_place_of_a_folder_nor_a_folder_that_of_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, folder, message in (
        ("file", True, "output to overwrite must be a folder, got .*/file"),
        ("folder", False, "output to overwrite must be a file, got .*/folder"),
        ("link", True, "output to overwrite must be no symbolic link, got .*/link"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / name, folder=folder, overwrite=True)
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 3


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="output must be in a directory that exists, got"):
        write(tmp_path / "no" / "out")
    with pytest.raises(ValueError, match="output must be where you may write, got /proc/out: No"):
        write("/proc/out")


def test_an_output_is_not_put_among_the_steps_of_a_run(tmp_path):
    (tmp_path / "30").mkdir()
    (tmp_path / "30" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(ValueError, match="output must not be among the steps of a run, got .*/40"):
        write(tmp_path / "40", folder=True)


def test_of_two_conversions_at_once_the_first_stays(tmp_path):
    out = tmp_path / "out"
    options = {"source": __file__, "folder": True, "overwrite": False}
    with pytest.raises(ValueError, match="output must not exist"):
        with files.written_aside(out, **options) as aside:
            aside.mkdir()
            write(out, folder=True)
    assert (out / "parity.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="must be a folder of dit-convert's own, got"):
        write(out, folder=True, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("out, source", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/../a", "a")])
def test_an_output_is_never_what_is_read(tmp_path, out, source):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "parity.json").touch()
    with pytest.raises(ValueError, match="output must be apart from what is read, .*/a"):
        write(tmp_path / out, folder=True, overwrite=True, source=tmp_path / source)
    assert (tmp_path / "a" / "parity.json").is_file()


def test_digests_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "empty").touch()
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.digests(tmp_path) == {"sub/empty": empty}
    assert files.digests(tmp_path / "sub" / "empty") == {"empty": empty}
