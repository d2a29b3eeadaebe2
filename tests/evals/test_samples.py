import io

import numpy as np
import pytest
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.evals import samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures in two folders, and what a system adds."""
    for i, image in enumerate(IMAGES):
        path = tmp_path / "pictures" / ("a" if i < 4 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "pictures/a/.hidden.png").write_bytes(b"x")
    (tmp_path / "pictures/notes.txt").write_text("x")
    return tmp_path / "pictures"


def save(path, *args, **arrays):
    np.savez(path, *args, **arrays)
    return path


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_parts(tmp_path, save_npz):
    save_npz(tmp_path / "x.npz", IMAGES)
    opened = samples.open_images(tmp_path / "x.npz")
    assert len(opened) == 7 and opened.shape == (4, 6, 3)
    for start, stop in ((0, 2), (2, 5), (6, 7), (1, 3), (0, 7)):
        np.testing.assert_array_equal(opened.read(start, stop), IMAGES[start:stop])


def test_a_folder_is_read_by_name(folder):
    opened = samples.open_images(folder)
    assert len(opened) == 7 and opened.shape == (4, 6, 3)
    np.testing.assert_array_equal(opened.read(2, 6), IMAGES[2:6])
    before = opened.sha256
    Image.fromarray(IMAGES[0]).save(folder / "b/5.png")
    assert samples.open_images(folder).sha256 != before


def test_a_folder_of_other_images_is_one_line(folder):
    Image.new("RGB", (5, 4)).save(folder / "b/6.png")
    with pytest.raises(UserError, match=r"must have one size, got 6 x 4 in 0.png and 5 x 4 in b/6"):
        samples.open_images(folder).read(0, 7)
    (folder / "b/6.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b/6\.png: image must be a whole image file"):
        samples.open_images(folder).read(0, 7)


def test_what_is_no_npz_of_images_is_one_line(tmp_path):
    cases = {
        "float": ((IMAGES / 255,), "must be uint8 (N, H, W, 3), got float64 (7, 4, 6, 3)"),
        "nan": ((np.full((2, 4, 6, 3), np.nan),), "must be uint8 (N, H, W, 3), got float64"),
        "grey": ((IMAGES[..., 0],), "must be uint8 (N, H, W, 3), got uint8 (7, 4, 6)"),
        "pickle": ((np.array([{}, {}]),), "must be uint8 (N, H, W, 3), got object (2,)"),
        "fortran": ((np.asfortranarray(IMAGES),), "got uint8 (7, 4, 6, 3) in Fortran order"),
        "empty": ((IMAGES[:0],), "must have at least 1 image, got (0, 4, 6, 3)"),
        "flat": ((IMAGES[:, :0],), "must have at least 1 image, got (7, 0, 6, 3)"),
    }
    for name, (arrays, message) in cases.items():
        with pytest.raises(UserError) as error:
            samples.open_images(save(tmp_path / f"{name}.npz", *arrays))
        assert message in str(error.value)
    with pytest.raises(UserError, match=r"x\.npz must hold images as arr_0, got images, labels$"):
        samples.open_images(save(tmp_path / "x.npz", images=IMAGES, labels=IMAGES))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UserError, match=r"text\.npz must be a whole \.npz, got: File is not a zip"):
        samples.open_images(tmp_path / "text.npz")


def test_a_truncated_npz_is_one_line(tmp_path):
    opened = io.BytesIO()
    np.save(opened, IMAGES)
    path = tmp_path / "x.npz"
    with samples.zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", opened.getvalue()[:-100])
    with pytest.raises(UserError, match="must be a whole .npz, got a truncated arr_0"):
        samples.open_images(path).read(0, 7)


def test_other_paths_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="must be a folder with images, got none in"):
        samples.open_images(tmp_path / "empty")
    for name in ("nothing", "nothing.npz"):
        with pytest.raises(UserError, match=f"or an .npz that exists, got .*/{name}"):
            samples.open_images(tmp_path / name)


def test_sizes_of_a_folder_are_checked_without_decoding(folder, monkeypatch):
    samples.open_images(folder).check_sizes()
    Image.new("RGB", (5, 4)).save(folder / "b/6.png")
    opened = samples.open_images(folder)
    decoded = []
    decode = opened._decode
    monkeypatch.setattr(opened, "_decode", lambda file: decoded.append(file.name) or decode(file))
    with pytest.raises(UserError, match=r"must have one size, got 6 x 4 in 0.png and 5 x 4 in b/6"):
        opened.check_sizes()
    assert decoded == ["6.png"]
    (folder / "b/6.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b/6\.png: image must be a whole image file"):
        opened.check_sizes()


def test_photographs_on_their_side_have_one_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (4, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "b.png", exif=exif)
    opened = samples.open_images(tmp_path)
    opened.check_sizes()
    assert opened.read(0, 2).shape == (2, 6, 4, 3)


def test_a_reference_has_moments_or_enough_images_of_one_shape(tmp_path):
    good = save(tmp_path / "good.npz", IMAGES)
    assert len(samples.open_reference(good, (4, 6, 3))) == 7
    moments = save(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert samples.open_reference(moments, (4, 6, 3)) is None
    few, mu = save(tmp_path / "few.npz", IMAGES[:5]), save(tmp_path / "mu.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for path, shape, message in (
        (good, (8, 8, 3), "reference must have images of 8 x 8, got 4 x 6 in"),
        (few, (4, 6, 3), "reference must have at least 6 images, got 5: "),
        (mu, (4, 6, 3), "reference must have mu and sigma, or images as arr_0, got"),
        (tmp_path / "text.npz", (4, 6, 3), "text.npz must be a whole .npz, got: File is not a zip"),
        (tmp_path / "no.npz", (4, 6, 3), "reference must be an .npz of ADM's format that exists"),
    ):
        with pytest.raises(UserError) as error:
            samples.open_reference(path, shape)
        assert message in str(error.value)
