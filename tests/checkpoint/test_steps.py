import pytest
from trees import make_tree, save

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError


def test_a_deleted_step_is_unlisted_before_its_files_are_removed(tmp_path, monkeypatch):
    save(tmp_path, make_tree(), steps=(5, 10))
    with monkeypatch.context() as patch:
        patch.setattr(steps.shutil, "rmtree", lambda *_, **options: None)
        steps.delete(tmp_path, 5)
    assert steps.saved(tmp_path) == [10] and len(list(tmp_path.iterdir())) == 2
    steps.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_latest_is_none_without_a_complete_step(tmp_path):
    assert steps.latest(tmp_path / "missing") is None
    (tmp_path / "20").mkdir()
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    assert steps.latest(tmp_path) is None


def test_locate_takes_a_run_its_steps_or_one_step(tmp_path, monkeypatch):
    directory = tmp_path / "run" / "checkpoints"
    save(directory, make_tree(), steps=(5, 10))
    assert steps.locate(tmp_path / "run") == steps.locate(directory) == (directory, 10)
    assert steps.locate(directory / "5") == (directory, 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert steps.locate("~/run") == (directory, 10)


def test_steps_are_in_a_run_a_checkpoint_and_a_step(tmp_path):
    save(tmp_path / "run/checkpoints", make_tree(), steps=(5,))
    save(tmp_path / "converted", make_tree(), steps=(0,))
    for name in ("run", "run/checkpoints", "run/checkpoints/5", "converted", "converted/0"):
        assert steps.are_in(tmp_path / name)
    for name in ("", "run/evaluation", "nowhere"):
        assert not steps.are_in(tmp_path / name)


def test_locate_takes_the_number_of_a_saved_step(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, make_tree(), steps=(5, 10))
    assert steps.locate(tmp_path, 5) == steps.locate(directory / "5", 5) == (directory, 5)
    for wrong in (7, 0, "5"):
        with pytest.raises(UserError, match=f"step must be one of 5, 10, got {wrong!r}"):
            steps.locate(tmp_path, wrong)
    with pytest.raises(UserError, match="step must be one of 5, got 10"):
        steps.locate(directory / "5", 10)
