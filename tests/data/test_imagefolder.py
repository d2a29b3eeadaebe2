import gzip
import tarfile

import pictures
import pytest

from dit_jax.data import imagefolder
from dit_jax.errors import UserError


def pack(folder, path):
    """Packs a folder tree like ILSVRC2012_img_train.tar: a tar with one tar for each class."""
    with tarfile.open(path, "w") as outer:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                inner = path.with_name(f"{child.name}.tar")
                with tarfile.open(inner, "w") as tar:
                    for file in sorted(child.iterdir()):
                        tar.add(file, file.name)
                outer.add(inner, inner.name)
                inner.unlink()
    return path


def test_folder_tree_and_tar_of_tars_have_the_same_listing(tmp_path):
    files = pictures.draw(tmp_path / "tree")
    (tmp_path / "tree" / "c1" / "notes.txt").write_text("not an image")
    (tmp_path / "tree" / "LICENSE").write_text("in no class")
    (tmp_path / "tree" / "c2" / "lost.jpg").symlink_to(tmp_path / "nowhere")
    tar = pack(tmp_path / "tree", tmp_path / "all.tar")
    (tmp_path / "tree" / "c1").rename(tmp_path / "elsewhere")
    (tmp_path / "tree" / "c1").symlink_to(tmp_path / "elsewhere")
    ignored = ["LICENSE", "c1/notes.txt", "c2/lost.jpg"]
    for source, expected in ((tmp_path / "tree", ignored), (tar, ignored[1:2])):
        listing = imagefolder.scan(source)
        assert listing.classes == ["c0", "c1", "c2"] and listing.ignored == expected
        assert [example.name for example in listing.examples] == sorted(files)
        for example in listing.examples:
            assert example.label == int(example.name[1])
            assert example.read() == files[example.name]


def test_source_that_cannot_be_listed_raises(tmp_path):
    with pytest.raises(UserError, match="source must be a folder or a tar that exists, got"):
        imagefolder.scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder of images for each class, got none in"):
        imagefolder.scan(tmp_path / "empty")
    pictures.draw(tmp_path / "tree")
    (tmp_path / "tree" / "c7").mkdir()
    with pytest.raises(UserError, match="every class must have images, got none for c7 in"):
        imagefolder.scan(tmp_path / "tree")
    tar = pack(tmp_path / "tree", tmp_path / "all.tar")
    tar.write_bytes(tar.read_bytes()[: 3 * tar.stat().st_size // 5])
    with pytest.raises(UserError, match="source must be a complete tar of tars, got"):
        imagefolder.scan(tar)
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match="a complete tar of tars, got .*gz: it is compressed"):
        imagefolder.scan(tmp_path / "all.tar.gz")
    (tmp_path / "tree" / "c7" / "line\nbreak.jpg").touch()
    with pytest.raises(UserError, match=r"without control characters, got 'c7/line\\nbreak.jpg'"):
        imagefolder.scan(tmp_path / "tree")
    (tmp_path / "text.tar").write_text("text" * 1000)
    with pytest.raises(UserError, match="source must be a complete tar of tars, got"):
        imagefolder.scan(tmp_path / "text.tar")


def test_files_of_operating_systems_are_neither_classes_nor_images(tmp_path):
    files = pictures.draw(tmp_path / "tree")
    for name in (".git/a.png", "__MACOSX/c0/a.png", "@eaDir/a.jpg", "c0/._000.jpg", "c1/.b/a.jpg"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listing = imagefolder.scan(tmp_path / "tree")
    assert listing.classes == ["c0", "c1", "c2"] and len(listing.ignored) == 5
    assert [example.name for example in listing.examples] == sorted(files)


def test_unicode_spaces_and_joiners_are_allowed_in_names(tmp_path):
    names = ["a b", "a\u00a0b", "a\u3000b", "\U0001f469\u200d\U0001f33e", "n\u0303"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1\u2009000.png").touch()
    assert imagefolder.scan(tmp_path).classes == sorted(names)


@pytest.mark.parametrize("name", [" cat", "cat ", "cat\u00a0"])
def test_a_class_name_with_outer_spaces_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").touch()
    with pytest.raises(
        UserError, match="class name must not begin or end with a space, got '.*cat"
    ):
        imagefolder.scan(tmp_path)


def test_a_folder_of_splits_is_refused_and_one_is_offered(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    message = f"got the splits train, val: prepare {tmp_path}/train$"
    with pytest.raises(UserError, match=message):
        imagefolder.scan(tmp_path)
    assert imagefolder.scan(tmp_path / "train").classes == ["cat", "dog"]


def test_classes_may_have_the_names_of_splits(tmp_path):
    for name in ("test/a.png", "train/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert imagefolder.scan(tmp_path).classes == ["test", "train"]
