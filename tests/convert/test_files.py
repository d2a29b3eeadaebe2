"""State dicts and output folders: reading, refusing, writing atomically."""

import argparse
import json
import os
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import torch as safetensors_torch

from dit_jax.convert import files
from dit_jax.errors import UserError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3)}
EMA = {name: x + 10 for name, x in TENSORS.items()}


def expect_same(state_dict, tensors):
    assert state_dict.keys() == tensors.keys()
    for name, x in tensors.items():
        assert isinstance(state_dict[name], np.ndarray)
        np.testing.assert_array_equal(state_dict[name], x.float().numpy())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_bare_state_dict_is_read(tmp_path, options):
    torch.save(TENSORS, tmp_path / "x.pt", **options)
    expect_same(files.read_state_dict(tmp_path / "x.pt"), TENSORS)


def test_checkpoint_of_the_official_script_is_read(tmp_path):
    """It has an optimizer, arguments, and the prefixes of DDP and torch.compile."""
    path = tmp_path / "x.pt"
    wrapped = {f"module._orig_mod.{name}": x for name, x in TENSORS.items()}
    optimizer = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(100, 100)}}}
    args = argparse.Namespace(model="DiT-XL/2", image_size=256)
    torch.save({"model": wrapped, "ema": EMA, "opt": optimizer, "args": args}, path)
    expect_same(files.read_state_dict(path), EMA)
    expect_same(files.read_state_dict(path, "model"), TENSORS)
    assert files.groups(path) == ["ema", "model"]
    torch.save({"model": wrapped}, path)
    with pytest.raises(
        ValueError, match="weights must be model for .*x.pt, got ema: use --weights=model"
    ):
        files.read_state_dict(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision_is_read(tmp_path, dtype, suffix):
    tensors = {name: x.to(dtype) for name, x in TENSORS.items()}
    path = tmp_path / f"x{suffix}"
    save = torch.save if suffix == ".pt" else safetensors_torch.save_file
    save(tensors, path)
    state_dict = files.read_state_dict(path)
    expected = np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16
    assert {x.dtype for x in state_dict.values()} == {np.dtype(expected)}
    expect_same({name: np.float32(x) for name, x in state_dict.items()}, tensors)


@pytest.mark.parametrize(
    "content, sets",
    [
        ({"state_dict": TENSORS, "state_dict_ema": EMA, "epoch": 3}, ["ema", "model"]),  # timm
        ({"model": TENSORS, "model_ema": EMA, "optimizer": {}}, ["ema", "model"]),  # ConvNeXt
        ({"model_state_dict": TENSORS, "ema_state_dict": EMA}, ["ema", "model"]),
        ({"state_dict": TENSORS, "pytorch-lightning_version": "2.1"}, ["model"]),
        ({"module": TENSORS, "global_steps": 7}, ["model"]),  # DeepSpeed
    ],
)
def test_sets_of_other_training_scripts_are_read(tmp_path, content, sets):
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    assert files.groups(path) == sets
    for name in sets:
        expect_same(files.read_state_dict(path, name), EMA if name == "ema" else TENSORS)
    expect_same(files.read_state_dict(path, None), EMA if "ema" in sets else TENSORS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "ema_model.module."])
def test_prefixes_of_names_are_dropped(tmp_path, prefix):
    wrapped = {prefix + name: x for name, x in TENSORS.items()}
    torch.save({"n_averaged": torch.tensor(3)} | wrapped, tmp_path / "x.pt")
    expect_same(files.read_state_dict(tmp_path / "x.pt"), TENSORS)
    torch.save(wrapped | TENSORS, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt must hold a.weight once, got it with several pref"):
        files.read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_part_of_a_larger_model_is_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    whole = {f"stage.{name}": x for name, x in TENSORS.items()} | {"other.weight": torch.ones(1)}
    save = torch.save if suffix == ".ckpt" else safetensors_torch.save_file
    save(whole, path)
    expect_same(files.read_state_dict(path, part="stage."), TENSORS)
    expect_same(files.read_state_dict(path, part="none."), whole)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_state_dict_is_read_from_its_index(tmp_path, suffix):
    save = safetensors_torch.save_file if suffix == ".safetensors" else torch.save
    index = tmp_path / f"x{suffix}.index.json"
    names = {name: f"x-{i}{suffix}" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        save({name: TENSORS[name]}, tmp_path / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    expect_same(files.read_state_dict(index), TENSORS)
    assert files.digests(index).keys() == {index.name, *names.values()}
    assert files.groups(index) == [] and files.read_args(index) == {}
    (tmp_path / f"x-1{suffix}").unlink()
    with pytest.raises(UserError, match=f"index.json needs x-1{suffix}, which is missing"):
        files.read_state_dict(index)
    for text in ("{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="must have a weight_map from names to files"):
            files.read_state_dict(index)


class Leftover:
    """An object beside the weights, such as a callback of Lightning."""

    def __init__(self):
        self.best = {"score": 1.0}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_other_objects_beside_the_weights_are_ignored(tmp_path, options):
    args = argparse.Namespace(data_path=pathlib.Path("/data"), image_size=256)
    content = {"ema": EMA, "args": args, "best_fid": np.float64(9.6), "dtype": np.dtype("f4")}
    content |= {"callbacks": {Leftover: Leftover()}, "scale": np.ones(2)}
    torch.save(content, tmp_path / "x.pt", **options)
    expect_same(files.read_state_dict(tmp_path / "x.pt"), EMA)
    assert files.read_args(tmp_path / "x.pt")["image_size"] == 256


def test_args_of_a_training_script_are_read(tmp_path):
    torch.save({"ema": EMA, "args": {"model": "SiT-XL/2"}}, tmp_path / "x.pt")
    assert files.read_args(tmp_path / "x.pt") == {"model": "SiT-XL/2"}
    for content in (TENSORS, {"ema": EMA, "args": "none"}):
        torch.save(content, tmp_path / "x.pt")
        assert files.read_args(tmp_path / "x.pt") == {}


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_written_state_dict_is_read_back(tmp_path, suffix):
    arrays = {name: x.numpy() for name, x in TENSORS.items()}
    path = tmp_path / f"x{suffix}"
    files.write_state_dict(path, arrays)
    expect_same(files.read_state_dict(path), TENSORS)
    assert path.stat().st_mode & 0o044 == 0o044  # readable by other users


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_pickle_with_code_is_refused_and_does_not_run(tmp_path, options):
    path, trace = tmp_path / "x.pt", tmp_path / "trace"
    torch.save({"a": Exploit(trace)}, path, **options)
    with pytest.raises(UserError, match="x.pt must contain only tensors, got posix.mkdir, which"):
        files.read_state_dict(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # without the protection, the code runs
    assert trace.exists()


@pytest.mark.parametrize("content", [Leftover(), {"a": Leftover()}])
def test_object_in_place_of_a_tensor_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="only tensors, got .*test_files.Leftover, which could run"):
        files.read_state_dict(tmp_path / "x.pt")


def test_plain_pickle_with_code_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Exploit(tmp_path / "trace")))
    with pytest.raises(UserError, match="x.pt"):
        files.read_state_dict(tmp_path / "x.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0, 0.3, 0.9])
def test_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"x{suffix}"
    files.write_state_dict(path, {"a": np.zeros((50, 50), np.float32)})
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=f"x{suffix} is truncated or not a"):
        files.read_state_dict(path)


def test_other_content_or_path_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt must contain a state dict, got list"):
        files.read_state_dict(tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="file must end with .pt, .pth, .bin, .ckpt, .safetensors, got x.bin2"
    ):
        files.read_state_dict("x.bin2")
    with pytest.raises(UserError, match="checkpoint must be a file, got nowhere.pt"):
        files.read_state_dict("nowhere.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": TENSORS}, "must contain a state dict, got a dict of weights"),
        ({"state_dict": TENSORS}, "weights must be model for .*, got ema: use --weights=model"),
        ({"model": TENSORS, "ema": None}, "weights must be model for .*, got ema: use --weights"),
        ({"ema": {"a": "b"}}, "must contain a state dict, got a dict of a"),
        ({1: torch.zeros(2)}, "must contain a state dict, got a dict of 1"),
        (
            {"a": torch.zeros(2, 2).to_sparse()},
            "^a must be a plain dense tensor, got torch.float32",
        ),
        (
            {"a": torch.zeros(2).to(torch.float8_e4m3fn)},
            "^a must have a type that NumPy supports, got",
        ),
        ({"a": torch.zeros(2, device="meta")}, "^a must be a plain dense tensor, got"),
    ],
)
def test_dict_without_plain_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        files.read_state_dict(tmp_path / "x.pt")


def test_float8_in_safetensors_is_refused(tmp_path):
    tensors = {"a": torch.zeros(2).to(torch.float8_e4m3fn)}
    safetensors_torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors must have types that NumPy supports, got"):
        files.read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", [b"\x89PNG\r\n\x1a\n123", b"# a text", pickle.dumps([1], 4)])
def test_file_of_another_program_is_refused(tmp_path, text):
    (tmp_path / "x.pt").write_bytes(text)
    with pytest.raises(
        ValueError, match=r"^[^\n]*x.pt is truncated or not a PyTorch file$|state dict, got"
    ):
        files.read_state_dict(tmp_path / "x.pt")


def test_missing_module_is_reported_with_install_command():
    with pytest.raises(UserError, match=r"nothing_of_that_name must be .*dit_jax\[convert\]"):
        files.require("nothing_of_that_name")


def write(out, *, folder=False, overwrite=False, source=__file__):
    """Writes an output and its report as a conversion does."""
    options = {"source": source, "folder": folder, "overwrite": overwrite}
    with files.temporary_output(out, **options) as temporary:
        if folder:
            temporary.mkdir()
            (temporary / "parity.json").write_text("new")
        else:
            temporary.write_text("new")
            files.report_path(temporary).write_text("new report")


def test_exception_leaves_no_output(tmp_path):
    options = {"source": __file__, "folder": True, "overwrite": False}
    with pytest.raises(RuntimeError):
        with files.temporary_output(tmp_path / "out", **options) as temporary:
            temporary.mkdir()
            (temporary / "half").touch()
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_are_deleted_at_the_end_and_when_a_signal_ends_the_process(tmp_path):
    with files.scratch(dir=tmp_path) as folder:
        (folder / "x").write_text("text")
    assert list(tmp_path.iterdir()) == []
    with files.scratch(dir=tmp_path) as folder:
        (folder / "x").write_text("text")
        files.remove_unfinished()
        assert list(tmp_path.iterdir()) == []


def test_file_and_report_are_replaced_only_with_overwrite(tmp_path):
    out, report = tmp_path / "out.pt", tmp_path / "out.pt.parity.json"
    for old in (out, report):  # also the report alone
        old.write_text("old")
        with pytest.raises(
            UserError, match=f"output must not exist unless --overwrite .* got {old}"
        ):
            write(out)
        assert old.read_text() == "old"
        old.unlink()
    write(out)
    write(out, overwrite=True)
    assert (out.read_text(), report.read_text()) == ("new", "new report")
    assert sorted(tmp_path.iterdir()) == [out, report]


def test_folder_is_replaced_only_with_overwrite(tmp_path):
    out = tmp_path / "out"
    write(out, folder=True)
    (out / "parity.json").write_text("old")
    with pytest.raises(UserError, match="output must not exist unless --overwrite is given, got"):
        write(out, folder=True)
    write(out, folder=True, overwrite=True)
    assert (out / "parity.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_discarded_output_replaces_nothing(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    options = {"source": __file__, "folder": False, "overwrite": True}
    with files.temporary_output(out, **options) as temporary:
        temporary.write_text("worse")
        files.discard(temporary)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_file_and_folder_never_replace_each_other(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, folder, message in (
        ("file", True, "output to overwrite must be a folder, got .*/file"),
        ("folder", False, "output to overwrite must be a file, got .*/folder"),
        ("link", True, "output to overwrite must not be a symbolic link, got .*/link"),
    ):
        with pytest.raises(UserError, match=message):
            write(tmp_path / name, folder=folder, overwrite=True)
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 3


def test_directory_that_is_missing_or_not_writable_is_refused(tmp_path):
    with pytest.raises(UserError, match="output must be in an existing directory, got"):
        write(tmp_path / "no" / "out")
    with pytest.raises(UserError, match="output must be where you may write, got /proc/out: No"):
        write("/proc/out")


def test_output_in_a_folder_of_steps_is_refused(tmp_path):
    (tmp_path / "30").mkdir()
    (tmp_path / "30" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(
        UserError, match="output must not be in a folder of checkpoint steps, got .*/40"
    ):
        write(tmp_path / "40", folder=True)


def test_first_of_two_concurrent_conversions_wins(tmp_path):
    out = tmp_path / "out"
    options = {"source": __file__, "folder": True, "overwrite": False}
    with pytest.raises(UserError, match="output must not exist"):
        with files.temporary_output(out, **options) as temporary:
            temporary.mkdir()
            write(out, folder=True)
    assert (out / "parity.json").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_foreign_folder_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="must be empty or written by dit-convert, got"):
        write(out, folder=True, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("out, source", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/../a", "a")])
def test_output_that_overlaps_the_input_is_refused(tmp_path, out, source):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "parity.json").touch()
    with pytest.raises(UserError, match="output must be separate from the input .*/a"):
        write(tmp_path / out, folder=True, overwrite=True, source=tmp_path / source)
    assert (tmp_path / "a" / "parity.json").is_file()


def test_digests_of_folder_and_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "empty").touch()
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.digests(tmp_path) == {"sub/empty": empty}
    assert files.digests(tmp_path / "sub" / "empty") == {"empty": empty}
