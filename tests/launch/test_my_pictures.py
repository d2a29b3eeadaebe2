import io
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def my_pictures(monkeypatch):
    """The module, as a notebook imports it."""
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.colab import my_pictures

    return my_pictures


def find(my_pictures, source, folder):
    return my_pictures.find(source, folder, drawn="shapes", count=2)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.fixture
def pictures():
    """The bytes of a .zip with two classes in a folder, and what an archiver of Macs adds."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("mine/cat/1.png", "mine/dog/2.png", "__MACOSX/mine/cat/._1.png"):
            archive.writestr(name, b"")
    return file.getvalue()


@pytest.fixture
def colab(monkeypatch):
    """Colab's modules: `files` uploads what colab.uploads holds, `auth` counts in colab.asked."""
    colab = types.ModuleType("google.colab")
    colab.uploads, colab.asked = {}, []
    colab.files = types.SimpleNamespace(upload=lambda: colab.uploads)
    colab.auth = types.SimpleNamespace(authenticate_user=lambda: colab.asked.append(1))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    return colab


@pytest.mark.parametrize("drawn", ["shapes", "new_shapes"])
def test_drawn_pictures_have_a_folder_for_each_class(my_pictures, tmp_path, drawn):
    folder = my_pictures.find("drawn here", tmp_path, drawn=drawn, count=2)
    classes = my_pictures.SETS[drawn]
    assert names(folder) == sorted(f"{name}/00{i}.png" for name in classes for i in range(2))
    red, _, blue = np.asarray(Image.open(folder / "red circle/000.png"))[32, 32]
    assert red > blue + 50
    first, second = ((folder / f"red circle/00{i}.png").read_bytes() for i in range(2))
    assert first != second


def test_pictures_are_drawn_once_and_the_same_everywhere(my_pictures, tmp_path):
    first, other = (find(my_pictures, "drawn here", tmp_path / name) for name in "ab")
    name = "blue square/001.png"
    assert (first / name).read_bytes() == (other / name).read_bytes()
    (first / name).unlink()
    assert name not in names(find(my_pictures, "drawn here", tmp_path / "a"))


def test_a_folder_is_taken_as_it_is(my_pictures, tmp_path):
    assert find(my_pictures, str(tmp_path), tmp_path / "out") == tmp_path


def test_a_zip_is_unpacked_once(my_pictures, tmp_path, pictures):
    (tmp_path / "pets.zip").write_bytes(pictures)
    folder = find(my_pictures, str(tmp_path / "pets.zip"), tmp_path / "out")
    assert folder == tmp_path / "out/pets" and names(folder) == ["cat/1.png", "dog/2.png"]
    (folder / "cat/1.png").unlink()
    assert names(find(my_pictures, str(tmp_path / "pets.zip"), tmp_path / "out")) == ["dog/2.png"]


def test_a_zip_of_the_same_name_that_has_other_pictures_is_unpacked_anew(my_pictures, tmp_path):
    path = tmp_path / "pets.zip"
    for name in ("cat/1.png", "dog/2.png"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"")
        assert names(find(my_pictures, str(path), tmp_path / "out")) == [name]


def test_an_unpacking_that_was_stopped_begins_again(my_pictures, tmp_path, pictures):
    (tmp_path / "pets.zip").write_bytes(pictures)
    (tmp_path / "out/pets/mine/cat").mkdir(parents=True)
    folder = find(my_pictures, str(tmp_path / "pets.zip"), tmp_path / "out")
    assert names(folder) == ["cat/1.png", "dog/2.png"]


def test_an_empty_zip_is_one_line(my_pictures, tmp_path):
    zipfile.ZipFile(tmp_path / "pets.zip", "w").close()
    with pytest.raises(my_pictures.Failed, match="must hold a folder for each class, got the empt"):
        find(my_pictures, str(tmp_path / "pets.zip"), tmp_path / "out")


def test_a_zip_of_class_folders_needs_no_folder_around_them(my_pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("cat/1.png", b"")
    assert find(my_pictures, str(tmp_path / "pets.zip"), tmp_path / "out") == tmp_path / "out/pets"


def test_an_uploaded_zip_is_unpacked(my_pictures, tmp_path, colab, pictures):
    colab.uploads["pets.zip"] = pictures
    assert names(find(my_pictures, "upload a zip", tmp_path)) == ["cat/1.png", "dog/2.png"]


def test_no_chosen_file_is_one_line(my_pictures, tmp_path, colab):
    with pytest.raises(my_pictures.Failed, match="no file was chosen"):
        find(my_pictures, "upload a zip", tmp_path)


def test_a_bucket_is_copied_by_gcloud(my_pictures, tmp_path, colab, put, monkeypatch):
    put("gcloud", 'echo "$*" > "$5/words"; touch "$5/copied.png"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    folder = find(my_pictures, "gs://bucket/some/pets/", tmp_path / "out")
    assert folder == tmp_path / "out/pets" and names(folder) == ["copied.png"]
    words = f"storage rsync --recursive gs://bucket/some/pets/ {folder}"
    assert (folder / "words").read_text().strip() == words
    assert colab.asked


@pytest.mark.parametrize(
    "source, message",
    [
        ("upload a zip", "PICTURES = 'upload a zip' needs Colab: name a folder or a .zip instead"),
        (
            "no/such/folder",
            "PICTURES must be a folder or a .zip that exists, got 'no/such/folder': "
            "{here}/no/such/folder",
        ),
        ("", "PICTURES must be a folder or a .zip that exists, got '': {here}"),
        ("gs://bucket/pets", "gcloud, which Colab has, must be installed to read gs://bucket/pets"),
    ],
)
def test_what_is_missing_is_one_line(my_pictures, tmp_path, monkeypatch, source, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(my_pictures.Failed) as raised:
        find(my_pictures, source, tmp_path / "out")
    assert str(raised.value) == message.format(here=Path.cwd())


def test_a_refused_copy_is_one_line(my_pictures, tmp_path, put, monkeypatch):
    put("gcloud", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(my_pictures.Failed, match="gs://bucket/pets cannot be copied"):
        find(my_pictures, "gs://bucket/pets", tmp_path / "out")


def test_a_damaged_zip_is_one_line(my_pictures, tmp_path):
    path = Path(tmp_path / "pets.zip")
    path.write_bytes(b"PK")
    with pytest.raises(my_pictures.Failed, match=r"PICTURES must be a whole .zip, got .*pets.zip"):
        find(my_pictures, str(path), tmp_path / "out")
