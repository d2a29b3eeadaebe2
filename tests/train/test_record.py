import json

from PIL import Image

from dit_jax.train import record

MEANS = {"loss": 0.5, "mse": 0.4, "vb": 0.1, "grad_norm": 1.0}


def make_log(path, *, start=0, peak_flops=None):
    return record.make_log(
        path,
        start=start,
        total_steps=10,
        batch_size=32,
        flops_per_step=4e12,
        peak_flops=peak_flops,
    )


def test_a_record_has_the_metrics_and_the_speed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    make_log(path, peak_flops=20e12)(4, MEANS, 0.5)
    (line,) = record.read(path)
    assert line == {
        "step": 4,
        **MEANS,
        "images_per_second": 64,
        "model_tflops_per_second": 8,
        "mfu": 0.4,
        "seconds_left": 3,
    }


def test_there_is_no_mfu_without_a_known_peak(tmp_path):
    make_log(tmp_path / "m")(4, MEANS, 0.5)
    assert "mfu" not in record.read(tmp_path / "m")[0]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = make_log(path)
    for step in (2, 4, 6):
        log(step, MEANS, 0.5)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    log = make_log(path, start=4)
    assert [line["step"] for line in record.read(path)] == [2, 4]
    log(6, MEANS, 0.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_a_new_run_starts_an_empty_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    make_log(path)(2, MEANS, 0.5)
    make_log(path)
    assert record.read(path) == []


def test_the_loss_curve_is_a_picture_with_ink(tmp_path):
    log = make_log(tmp_path / "m")
    for step in range(1, 9):
        log(step, MEANS | {"mse": 1 / step}, 0.5)
    record.plot_losses(tmp_path / "m", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > image.height > 200
        assert image.convert("L").getextrema()[0] < 100
