import notebooks
import pytest

from dit_jax.runs import history, summary

PATH = notebooks.COLAB / "train.ipynb"


def steps(run):
    """(The last saved step of a run, the events of its history)."""
    found = summary.read(run)
    return found.saved[-1], [event["event"] for event in history.read(run)]


def test_it_trains_judges_tunes_and_exports(tmp_path):
    notebook = notebooks.execute(PATH, tmp_path)
    runs = tmp_path / "runs/smoke"
    assert steps(runs / "digits")[0] == 10
    assert steps(runs / "shapes") == (10, ["started", "finished"])
    assert steps(runs / "shapes-on-new_shapes")[0] == 10
    text = "\n".join(map(notebooks.texts, notebook.cells))
    assert "1 label taken, 2 left out, 2 new from the null label" in text
    assert "agreement with the label" in text and "passed: relative error" in text
    pngs = [name for name in notebooks.pictures(notebook) if name.endswith(".png")]
    assert len(pngs) == 9
    assert (runs / "shapes-on-new_shapes-torch.zip").exists()


@pytest.mark.slow
def test_after_a_restart_it_goes_on(tmp_path):
    notebooks.execute(PATH, tmp_path)
    notebook = notebooks.execute(PATH, tmp_path, STEPS=20)
    run = tmp_path / "runs/smoke/shapes"
    assert steps(run) == (20, ["started", "finished", "resumed", "finished"])
    text = "\n".join(map(notebooks.texts, notebook.cells))
    assert f"resuming {run} from step 10" in text


@pytest.mark.slow
def test_it_tunes_the_official_weights_on_latents(tmp_path):
    fields = {"TRAIN_ON": "latents", "BASE": "DiT-XL-2-256x256"}
    notebook = notebooks.execute(PATH, tmp_path, **fields)
    runs = tmp_path / "runs/smoke"
    assert steps(runs / "shapes-latents")[0] == steps(runs / "DiT-XL-2-256x256-on-new_shapes")[0]
    text = "\n".join(map(notebooks.texts, notebook.cells))
    assert "0 labels taken, 1000 left out, 3 new from the null label" in text
    assert "latents of shape (3, 4, 8, 8)" in text
