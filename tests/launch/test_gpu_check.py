"""launch/gpu_check.sh with small models on a CPU, and its table from results written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import numpy as np
import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = {"MODEL": "Pi/8", "DTYPE": "float32", "REPEATS": "2", "XLA_TRIED": "", "CHECKS": ""}


@pytest.fixture
def check_gpu(tmp_path):
    """check_gpu(**settings) -> the ended process and results.json."""

    def call(**settings):
        given = {"WORKDIR": str(tmp_path / "out"), "PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", LAUNCH / "gpu_check.sh"],
            env=os.environ | SMALL | given | settings,
            capture_output=True,
            text=True,
        )
        return done, json.loads((tmp_path / "out" / "results.json").read_text())

    return call


def write_part(folder, name, found, code=0, log="", seconds=9):
    (folder / name).mkdir()
    if found is not None:
        (folder / name / "out.json").write_text(json.dumps(found))
    (folder / name / "log").write_text(log)
    (folder / name / "flags").write_text("--config=a.py\n")
    (folder / name / "status").write_text(f"{code} {seconds}\n")


SPEED = {"images_per_second": 10.0, "compile_seconds": 3.0, "peak_memory_gb": 2.0}


def test_a_small_training_is_measured_and_a_failing_case_is_one_row(check_gpu, tmp_path):
    names = ["train-256-b2-none-xla-scan", "train-256-b2-none-cudnn-scan"]
    done, results = check_gpu(CASES=" ".join(names))
    assert (done.returncode, done.stderr) == (0, "")
    good, bad = results["cases"]
    assert [good["case"], bad["case"]] == names
    assert good["images_per_second"] > 0 and good["batch_size"] == 2
    assert "attention can be 'cudnn' only on a GPU in bfloat16" in bad["reason"]
    profile = results["profile"]
    assert profile["case"] == names[0] and len(profile["kernels"]) == 10
    times = [kernel["ms"] for kernel in profile["kernels"]]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert sum(times) <= profile["kernels_ms"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count(f"| {names[1]} | **failed** | ") == 1 and text.count("| kernel `") == 10


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(check_gpu):
    settings = {"CHECKS": "golden attention resume", "CHECK_MODEL": "Pi/8"}
    done, results = check_gpu(CASES="sample-256-b2-3-xla", SECONDS_LIMIT="500", **settings)
    assert done.returncode == 0, done.stdout
    assert {row["check"] for row in results["checks"]} > {
        "DiT-S/4 forward, float32 highest, xla",
        "attention xla, 258 tokens, head size 72, gradients",
        "resumed training, bit-identical to an unbroken one",
    }
    assert results["cases"][0]["images_per_second"] > 0


def test_without_time_nothing_starts(check_gpu):
    done, results = check_gpu(CASES="sample-256-b2-3-xla", CHECKS="golden", SECONDS_LIMIT="1")
    assert done.returncode == 1
    (case,), (check,) = results["cases"], results["checks"]
    assert case["reason"] == check["reason"] == "not started: no time was left"


def test_the_table_has_a_row_for_each_result(tmp_path):
    rows = [{"check": "a", "error": 1e-3, "bound": 1e-2}, {"check": "b", "reason": "no plan"}]
    write_part(tmp_path, "check-attention", rows)
    peer = {"torch_images_per_second": 5.0, "dit_jax_over_torch": 2.0, "mfu": 0.5}
    write_part(tmp_path, "case-train-1", SPEED | peer)
    write_part(tmp_path, "case-train-2", None, 1, "Traceback\nOutOfMemoryError: a | b\n\n")
    write_part(tmp_path, "case-train-3", None, 124)
    assert gpu_check.table(tmp_path) == 1  # b could not run
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| a | passed | error 1.0e-03 of 1e-02 |",
        "| b | **failed** | no plan |",
        "| train-1 | 10 images/s | MFU 50.0%, compiled in 3 s, 2.0 GB, "
        "torch 5 images/s, ours 2.00 times as fast |",
        "| train-2 | **failed** | exit code 1: OutOfMemoryError: a / b |",
        "| train-3 | **failed** | stopped after 9 s |",
    ]


def test_the_best_training_has_the_most_flops(tmp_path):
    assert gpu_check.best(tmp_path) == ""
    for name, speed in {"train-a": 1.0, "train-b": 3.0, "sample-c": 9.0}.items():
        write_part(tmp_path, f"case-{name}", {"model_tflops_per_second": speed})
    assert gpu_check.best(tmp_path) == "train-b"


def test_nan_does_not_pass(tmp_path):
    error = gpu_check.relative(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    assert not gpu_check.passes({"error": error, "bound": 1})
    write_part(tmp_path, "check-golden", [{"check": "a", "error": error, "bound": 1}])
    assert gpu_check.table(tmp_path) == 1


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({"CASES": "train-128-b2-none-xla-scan"}, "CASE must be a case such as train-256-b32-"),
        ({"CHECKS": "golden speed"}, "CHECK must be golden, attention or resume, got 'speed'"),
        ({"DTYPE": "float16"}, "DTYPE must be bfloat16 or float32, got 'float16'"),
        ({"MODEL": "XL"}, "MODEL must be a model such as XL/2, got 'XL'"),
        ({"REPEATS": "1"}, "REPEATS must be a whole number of at least 2, got '1'"),
        ({"SECONDS_LIMIT": "soon"}, "SECONDS_LIMIT must be a whole number of at least 1"),
    ],
)
def test_a_wrong_setting_of_gpu_check_is_one_line(run, tmp_path, settings, rule):
    done = run("gpu_check.sh", WORKDIR=str(tmp_path / "out"), **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpu_check.sh: {rule}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
