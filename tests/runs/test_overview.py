import json

import pytest
import written_run

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import overview


def test_runs_are_a_table(tmp_path):
    run = written_run.write(tmp_path / "study" / "small", frechet_distance=2.5)
    written_run.saved(run, 100)
    written_run.write(tmp_path / "new", [], events=[written_run.STARTED])
    header, new, small = overview.describe(tmp_path).splitlines()
    assert header.split() == [*overview.HEADER[:-1], "best", "score"]
    assert new.split()[:5] == ["new", "Ti/4", "digits", "0/100", "-"]
    assert "no step was logged yet" in new
    assert small.split()[:4] == ["study/small", "Ti/4", "digits", "100/100"]
    assert "  finished  " in small
    assert small.endswith("Frechet distance (classifier features): 2.5 at step 10")
    assert float(small.split()[4]) == pytest.approx(0.01, abs=2e-3)


def test_a_folder_that_is_a_run_is_one_row(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.write(path / "checkpoints" / "inner")
    assert len(overview.describe(path).splitlines()) == 2


def test_the_size_is_of_all_files(tmp_path):
    path = written_run.write(tmp_path / "run")
    before = disk.total_size(path)
    (path / "checkpoints" / "3").mkdir(parents=True)
    (path / "checkpoints" / "3" / "array").write_bytes(bytes(2_000_000))
    assert disk.total_size(path) == before + 2_000_000
    assert "2 MB" in overview.describe(path)


def test_a_damaged_run_is_a_row_with_its_reason(tmp_path):
    written_run.write(tmp_path / "a")
    path = written_run.write(tmp_path / "b")
    (path / "config.json").write_text(json.dumps({"model": {"size": []}, "run": {}}))
    _, good, bad = overview.describe(tmp_path).splitlines()
    assert "damaged" not in good
    assert "; damaged: " in bad and "model.size must be text, got []" in bad


def test_deep_and_hidden_folders_are_not_searched(tmp_path):
    written_run.write(tmp_path / "a" / "b" / "c" / "found")
    written_run.write(tmp_path / ".hidden" / "run")
    with pytest.raises(UserError, match="DIR must have runs of dit-train in or below it, got "):
        overview.describe(tmp_path)
    assert "found" in overview.describe(tmp_path / "a")
