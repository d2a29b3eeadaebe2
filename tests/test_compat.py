"""Each entry of compat.py does what the package needs, with the installed versions."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bucket
import fsspec
import numpy as np
import processes
import pytest
import tensorstore

from dit_jax import compat

ROOT = Path(__file__).parents[1]
ALONE = """
import sys
import jax
import numpy as np
from dit_jax import compat

jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
client = compat.distributed_client()
client.key_value_set("folder/a", "1")
client.key_value_set("folder/b", "2")
client.key_value_set("other/c", "3")
assert sorted(client.key_value_dir_get("folder")) == [("folder/a", "1"), ("folder/b", "2")]
assert client.key_value_dir_get("empty") == []
compat.sync_processes("here")
"""


def test_distributed_client_is_none_before_initialize():
    assert compat.distributed_client() is None


def test_distributed_client_stores_and_lists_keys():
    command = [sys.executable, "-c", ALONE, processes.free_address()]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_process_allgather_returns_numpy():
    x = np.arange(6, dtype=np.uint32).reshape(2, 3)
    tiled = compat.process_allgather(x, tiled=True)
    assert type(tiled) is np.ndarray and tiled.dtype == np.uint32
    np.testing.assert_array_equal(tiled, x)
    np.testing.assert_array_equal(compat.process_allgather(x).reshape(x.shape), x)


def test_sync_processes_returns_when_all_processes_have_called_it():
    compat.sync_processes("a name")


def test_hybrid_device_grid_crosses_slices_along_the_first_axis_only():
    devices = [
        SimpleNamespace(id=i, slice_index=i // 4, process_index=i, platform="x", device_kind="x")
        for i in range(8)
    ]
    grid = compat.hybrid_device_grid((2, 2, 1), 2, devices)
    assert grid.shape == (4, 2, 1)
    assert sorted(device.id for device in grid.flat) == list(range(8))
    slices = [{device.slice_index for device in row.flat} for row in grid]
    assert slices == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("status", [401, 403])
def test_tensorstore_refusals_match_a_refused_read(storage, monkeypatch, status):
    monkeypatch.setattr(bucket.Handler, "read", lambda self, body, *key: status)
    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "tests"}).result()
    with pytest.raises(ValueError) as caught:
        store.read("a").result()
    assert str(caught.value).startswith(compat.TENSORSTORE_REFUSALS)


BACKEND = """
import sys
from dit_jax import compat
from etils import epath

if sys.argv[1:]:
    compat.keep_etils_off_tensorflow()
assert epath.gpath.importlib.util.find_spec("tensorflow")
epath.gpath._is_zonal_gcs_bucket = lambda bucket: False  # it would ask Google
print(epath.Path("gs://tests/a")._backend is epath.backend.fsspec_backend)
"""


@pytest.mark.parametrize("call, uses_fsspec", [([], "False"), (["call"], "True")])
def test_etils_reaches_buckets_without_tensorflow(tmp_path, call, uses_fsspec):
    (tmp_path / "tensorflow.py").touch()  # as if it were installed
    variables = {name: value for name, value in os.environ.items() if name != "EPATH_USE_TF"}
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", BACKEND, *call]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == uses_fsspec, done.stderr


def test_listings_of_buckets_are_not_cached(storage, bucket_path, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    compat.list_buckets_afresh()
    assert fsspec.config.conf["gcs"] == {"use_listings_cache": False}
    system = fsspec.filesystem("gcs", skip_instance_cache=True)
    folder = f"tests/{bucket_path.name}"
    storage.write(("tests", f"{bucket_path.name}/a"), b"")
    assert len(system.ls(folder)) == 1
    storage.write(("tests", f"{bucket_path.name}/b"), b"")
    assert len(system.ls(folder)) == 2
