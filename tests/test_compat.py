"""Each entry of compat.py does what the package needs, with the installed versions."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bucket
import fsspec
import jax
import numpy as np
import optax
import processes
import pytest
import tensorstore
from absl import flags
from ml_collections import config_flags

from configs import base
from dit_jax import compat
from dit_jax.checkpoint import store
from dit_jax.errors import UserError
from dit_jax.planning import plan

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


def test_sync_processes_waits_with_the_name_of_the_caller(monkeypatch):
    names = []
    monkeypatch.setattr("jax.experimental.multihost_utils.sync_global_devices", names.append)
    compat.sync_processes("a name")
    assert names == ["a name"]


def test_sync_processes_returns_in_a_process_that_is_alone():
    assert compat.sync_processes("a name") is None


@pytest.mark.parametrize(
    "text, reason",
    [
        ("--xla_backend_optimization_level=1", None),
        ("--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1"),
        ("--xla_backend_optimization_level=x", "Couldn't interpret value x for flag xla_backend"),
        ("/no/such/file", 'Could not open file "/no/such/file" to read flags'),
    ],
)
def test_unusable_xla_flags_says_what_xla_would_abort_with(text, reason):
    code = "from dit_jax import compat; print(compat.unusable_xla_flags())"
    environment = os.environ | {"XLA_FLAGS": text, "TF_CPP_MIN_LOG_LEVEL": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(str(reason))


@pytest.mark.parametrize("platforms", ["tpu", "cuda", "gpu", "none"])
def test_unusable_devices_knows_the_errors_of_jax(platforms):
    code = (
        "import jax; from dit_jax import compat\n"
        "try: jax.devices()\n"
        "except Exception as error: print(compat.unusable_devices(error))"
    )
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1 and done.stdout != "None\n"
    assert compat.unusable_devices(pytest.raises(RuntimeError, fail).value) is None


def fail():
    raise RuntimeError("another")


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


@pytest.mark.parametrize("status", [401, 403, 503])
def test_tensorstore_refusals_match_a_refused_read(storage, monkeypatch, status):
    monkeypatch.setattr(bucket.Handler, "read", lambda self, body, *key: status)
    retries = {"max_retries": 2, "initial_delay": "1ms", "max_delay": "1ms"}
    context = tensorstore.Context({"gcs_request_retries": retries})
    spec = {"driver": "gcs", "bucket": "tests"}
    store = tensorstore.KvStore.open(spec, context=context).result()
    with pytest.raises(ValueError) as caught:
        store.read("a").result()
    assert str(caught.value).startswith(compat.TENSORSTORE_REFUSALS)


BACKEND = """
import sys
if sys.argv[1:]:
    from dit_jax import compat
    compat.keep_etils_off_tensorflow()
from etils import epath

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


def test_tpu_devices_need_no_tpu():
    plan._prepare_libtpu()
    devices = compat.tpu_devices("v3:2x2")
    assert len(devices) == 8 and devices[0].device_kind == "TPU v3"


def test_tree_reader_reads_what_fits_its_limit(tmp_path):
    tree = {"a": np.arange(6.0), "b": np.zeros((2, 3), np.int32)}
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path, 1, {"params": tree}, {})
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    back = compat.tree_reader(template).restore(tmp_path / "1" / "params")
    jax.tree.map(np.testing.assert_array_equal, back, tree)


UNRAISABLE = """
import gc
from dit_jax import compat
class Loud:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error
compat.hide_harmless_exceptions()
Loud(RuntimeError("Event loop is closed"))
Loud(KeyboardInterrupt("hidden"))
Loud(RuntimeError("another"))
"""


def test_hide_harmless_exceptions_hides_nothing_else():
    done = subprocess.run([sys.executable, "-c", UNRAISABLE], capture_output=True, text=True)
    assert "another" in done.stderr and done.stderr.count("Traceback") == 1


LOG = """
from absl import logging
from dit_jax import compat
compat.log_plainly(lambda record: "hidden" not in record.getMessage())
logging.info("a %s line", "plain")
logging.info("hidden")
"""


def test_log_plainly_prints_the_message_alone():
    done = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True)
    assert done.stderr == "a plain line\n"


def test_unknown_config_field_is_found_in_the_words_of_ml_collections():
    config = base.get_config()
    with pytest.raises(AttributeError) as caught:
        config.train.learning_rat = 1e-3
    assert compat.unknown_config_field(caught.value) == "learning_rat"


@pytest.mark.parametrize(
    "argument, line",
    [
        ("--config.seed=x", "config.seed must be a whole number, got 'x'"),
        ("--config.train.eps=x", "config.train.eps must be a number, got 'x'"),
        ("--config.data.flip=x", "config.data.flip must be true or false, got 'x'"),
        (
            "--config.train=x",
            "config.train must be set field by field, as --config.train.FIELD=VALUE, got 'x'",
        ),
    ],
)
def test_explain_flag_error_names_the_value(argument, line, monkeypatch):
    arguments = ["command", f"--config={ROOT}/configs/digits.py", argument]
    monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for fields
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError) as caught:
        values(arguments)
    assert compat.explain_flag_error(caught.value, values) == f"--{line}"


def test_an_optax_without_the_right_muon_is_refused(monkeypatch):
    def muon(learning_rate, eps=0.0):
        raise AssertionError("must not be called")

    assert compat.muon(0.1, consistent_rms=0.2, muon_weight_dimension_numbers={}).init
    monkeypatch.setattr(optax.contrib, "muon", muon)
    with pytest.raises(UserError, match="^optimizer must be adamw with optax .*, which needs cons"):
        compat.muon(0.1, eps=0.0, consistent_rms=0.2)
