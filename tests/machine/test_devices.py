import types

import jax
import jax.numpy as jnp
import pytest

from dit_jax.errors import UserError
from dit_jax.machine import devices


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_peak_of_listed_devices(kind, tflops):
    assert devices.peak_flops(kind) == tflops * 1e12


def test_unlisted_device_has_no_peak():
    assert devices.peak_flops("cpu") is None
    assert devices.total_peak_flops() is None


def test_the_paper_used_7_percent_of_its_pod():
    # XL/2, batch 256, 5.7 steps/s on 256 cores: 6.6 % of the peak.
    used = 5.7 * 256 * 6 * 118.62e9
    assert used / (256 * devices.peak_flops("TPU v3")) == pytest.approx(0.066, abs=0.001)


def test_attention_on_a_cpu():
    assert devices.resolve_attention("auto", "bfloat16") == "xla"  # no GPU here
    assert devices.resolve_attention("xla", "float32") == "xla"
    with pytest.raises(UserError, match="'cudnn' only on a GPU in bfloat16"):
        devices.resolve_attention("cudnn", "bfloat16")
    assert devices.resolve_attention("another", "bfloat16") == "another"  # the model checks it


def test_attention_on_a_gpu(monkeypatch):
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "gpu")
    assert devices.resolve_attention("auto", "bfloat16") == "cudnn"
    assert devices.resolve_attention("auto", "float32") == "xla"
    with pytest.raises(UserError, match="on gpu in float32"):
        devices.resolve_attention("cudnn", "float32")


def test_description_and_peak_memory():
    assert devices.describe() == "8 x cpu"
    assert 50e6 < devices.peak_memory() < 1e12


def test_linears_multiply_matrices_of_two_axes_on_cpus_only():
    assert devices.resolve_product() == "flat"
    for platform, name in (("cpu", "flat"), ("gpu", "batched"), ("tpu", "batched")):
        device = types.SimpleNamespace(platform=platform)
        assert devices.resolve_product([device]) == name


def test_the_limit_of_the_control_group_counts_if_it_is_lower(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUP_LIMIT", tmp_path / "memory.max")
    total = devices.host_memory()
    assert 2**28 < total < 2**50
    for text, expected in (("max\n", total), (f"{2**60}\n", total), ("1000000\n", 1_000_000)):
        (tmp_path / "memory.max").write_text(text)
        assert devices.host_memory() == expected
    assert devices.memory_limit() == 1_000_000 // 8


def test_a_program_that_needs_more_memory_than_a_device_has_is_refused(monkeypatch):
    step = jax.jit(lambda x: x @ x, donate_argnums=0)
    compiled = step.lower(jax.ShapeDtypeStruct((1000, 1000), jnp.float32)).compile()
    devices.check_memory(compiled)
    monkeypatch.setattr(devices, "memory_limit", lambda: 3_000_000)
    message = "a step must fit into the memory of a device, 0.003 GB, got .* GB: lower train.batch_"
    with pytest.raises(UserError, match=message):
        devices.check_memory(compiled)


def test_a_lack_of_memory_is_a_user_error_and_another_failure_is_not():
    with pytest.raises(UserError, match="compute.remat to dots or full: RESOURCE_EXHAUSTED: Out "):
        with devices.explained_memory():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 GB")
    with pytest.raises(jax.errors.JaxRuntimeError):
        with devices.explained_memory():
            raise jax.errors.JaxRuntimeError("INTERNAL: something")
