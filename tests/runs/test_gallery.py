import base64
import io

import pytest
import written_run
from PIL import Image

from dit_jax.runs import gallery


def open_uri(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize("count, limit", [(0, 5), (3, 5), (5, 5), (17, 5), (1000, 20), (9, 2)])
def test_chosen_paths_are_few_with_the_first_and_the_last(count, limit):
    paths = [*range(count)]
    chosen = gallery.choose(paths, limit)
    assert len(set(chosen)) == len(chosen) == min(count, limit) and sorted(chosen) == chosen
    assert chosen[:1] == paths[:1] and chosen[-1:] == paths[-1:]


def test_a_small_picture_is_kept_as_it_is(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.samples(path, 20, 100)
    (path / "samples" / "notes.txt").write_text("of the user")
    shown, problems = gallery.pictures(path, 20)
    assert not problems
    assert [step for step, _, _ in shown] == [20, 100]
    for step, uri, size in shown:
        original = (path / "samples" / f"{step:07d}.png").read_bytes()
        assert base64.b64decode(uri.partition(",")[2]) == original and size == (40, 20)


def test_a_large_picture_of_noise_becomes_small(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.samples(path, 20, size=(1000, 500))
    (((_, uri, size),), _) = gallery.pictures(path, 20)
    assert uri.startswith("data:image/webp") and len(uri) < 4 / 3 * gallery.MAX_BYTES + 30
    inside = open_uri(uri).size
    assert size == (1000, 500)  # how large it is shown
    assert inside[0] < 500 and inside[0] == pytest.approx(2 * inside[1], abs=2)


def test_a_picture_that_was_drawn_again_is_read_again(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.samples(path, 20)
    before = gallery.pictures(path, 20)
    Image.new("L", (8, 8)).save(path / "samples" / "0000020.png")
    assert gallery.pictures(path, 20) != before


def test_a_picture_that_is_cut_off_is_a_problem(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.samples(path, 20, 40)
    file = path / "samples" / "0000020.png"
    file.write_bytes(file.read_bytes()[:500])
    shown, (problem,) = gallery.pictures(path, 20)
    assert [step for step, _, _ in shown] == [40]
    assert "0000020.png cannot be shown" in problem
