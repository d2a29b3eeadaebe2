"""dit-evaluate with Inception from end to end: existing images, a model, references, receipts."""

import json
import shutil

import numpy as np
import pictures
import pytest
import random_run
from PIL import Image
from testdata import evaluation

from dit_jax.cli import evaluate
from dit_jax.data import imagefolder, prepare
from dit_jax.evals import classifier, features, receipt
from dit_jax.sampling import extractor, generate


@pytest.fixture(autouse=True)
def few_images_per_device(monkeypatch):
    """Less work for few images: 2,048 would be sampled at once."""
    monkeypatch.setattr(extractor, "PER_DEVICE", 1)
    monkeypatch.setattr(generate, "images_at_once", lambda config: 8)


@pytest.fixture(scope="module")
def files(golden_eval, tmp_path_factory):
    """(samples.npz, reference.npz) of the golden scores."""
    folder = tmp_path_factory.mktemp("files")
    _, reference, samples = evaluation.evaluated_images()
    arrays = {"arr_0": reference}
    for part, names in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        x = golden_eval[f"e2e/stats_{part}"].astype(np.float64)
        arrays |= {names[0]: x.mean(axis=0), names[1]: np.cov(x, rowvar=False)}
    np.savez(folder / "reference.npz", **arrays)
    np.savez(folder / "samples.npz", samples)
    return folder / "samples.npz", folder / "reference.npz"


@pytest.fixture(scope="module")
def judged(files, inception_path, tmp_path_factory):
    """The flags that judge the samples, and the folder where a first call has judged them."""
    samples, reference = files
    out = tmp_path_factory.mktemp("judged") / "out"
    return [f"--inception={inception_path}", f"--reference={reference}"], samples, out


@pytest.mark.slow
def test_the_scores_are_those_of_adm(call, judged, golden_eval):
    given, samples, out = judged
    code, text, errors = call(evaluate, samples, out, *given)
    assert code == 0, errors
    found = receipt.read(out)
    expected = {k[4:]: float(x) for k, x in golden_eval.items() if k[:4] == "e2e/" and not x.ndim}
    values = {name: score["value"] for name, score in found["scores"].items()}
    names = {"FID-36": "fid", "sFID-36": "sfid", "Inception Score": "is"}
    for name, key in names.items():
        assert values[name] == pytest.approx(expected[key], rel=1e-5)  # of the features
    tf = golden_eval["e2e/tf_pr"]
    assert [values["precision"], values["recall"]] == pytest.approx(list(tf), rel=1e-12)
    assert values["precision (float32)"] == pytest.approx(expected["precision"], rel=1e-12)
    assert values["recall (float32)"] == pytest.approx(expected["recall"], rel=1e-12)
    assert values["KID"] == pytest.approx(expected["kid"], abs=1e-6)
    assert [line.split()[0] for line in text.splitlines()][:2] == ["FID-36", "sFID-36"]
    assert found["samples"]["count"] == 36 and found["reference"]["images"] == 30
    assert found["model"] is None and found["name"] is None
    assert list(found["features"]) == ["0000000.npz"]


@pytest.mark.slow
def test_a_receipt_is_repeated_and_compared(call, judged, tmp_path):
    given, samples, out = judged
    code, _, errors = call(evaluate, samples, out, *given)
    assert code == 0, errors
    code, text, errors = call(evaluate, f"--repeat={out}/receipt.json", tmp_path / "again")
    assert code == 0, errors
    assert "features: 1 of 1 shards are the same, bit for bit" in text and "DIFFERS" not in text
    code, text, _ = call(evaluate, "--compare", out, tmp_path / "again")
    assert code == 0
    assert text.splitlines()[0].split() == [str(out), str(tmp_path / "again")]
    assert "samples." not in text  # nothing differs


@pytest.mark.slow
def test_a_folder_of_the_same_images_has_the_same_features(call, judged, tmp_path, monkeypatch):
    """And few images at a time, as a killed evaluation leaves them."""
    given, samples, out = judged
    code, _, errors = call(evaluate, samples, out, *given)
    assert code == 0, errors
    with np.load(samples) as file:
        for i, image in enumerate(file["arr_0"]):
            path = tmp_path / "images" / f"{i:05d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
    monkeypatch.setattr(features, "SHARD", 20)
    code, _, errors = call(evaluate, tmp_path / "images", tmp_path / "out", *given)
    assert code == 0, errors
    assert receipt.read(tmp_path / "out")["scores"] == receipt.read(out)["scores"]


def test_samples_of_a_model_are_drawn_by_index(call, inception_path, tmp_path):
    random_run.save(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "reference.npz", images)
    given = [
        f"--inception={inception_path}",
        f"--reference={tmp_path}/reference.npz",
        "--num_steps=3",
    ]
    code, _, errors = call(
        evaluate, tmp_path / "run", tmp_path / "a", *given, "--num_samples=12", "--cfg_scale=1"
    )
    assert code == 0, errors
    found = receipt.read(tmp_path / "a")
    assert found["samples"]["sampling"]["num_steps"] == "3" and found["samples"]["step"] == 30
    assert found["model"] == {
        "name": "Ti/4",
        "num_params": pytest.approx(1.27e6, rel=0.1),
        "gflops": pytest.approx(0.004, rel=0.5),
        "sampling_gflops": pytest.approx(3 * found["model"]["gflops"]),
        "calls": 3,
        "passes": 3,
    }
    assert set(found["scores"]) >= {"FID-12", "sFID-12", "precision", "KID"}
    with np.load(tmp_path / "a/features/0000000.npz") as file:
        first, labels = file["pool"], file["label"]
    assert len(set(labels.tolist())) > 3 and labels.tolist() != sorted(labels.tolist())
    code, _, errors = call(
        evaluate, tmp_path / "run", tmp_path / "b", *given, "--num_samples=7", "--cfg_scale=1"
    )
    assert code == 0, errors
    with np.load(tmp_path / "b/features/0000000.npz") as file:
        np.testing.assert_array_equal(file["pool"], first[:7])


@pytest.mark.slow
def test_a_reference_is_made_of_prepared_images(call, inception_path, tmp_path):
    pictures.draw(tmp_path / "tree", num_classes=2, per_class=4)
    prepare.write(tmp_path / "data", "train", imagefolder.scan(tmp_path / "tree"), num_shards=1)
    flags = ["--make_reference", "--size=16", f"--inception={inception_path}"]
    code, _, errors = call(evaluate, tmp_path / "data", tmp_path / "reference.npz", *flags)
    assert code == 0, errors
    with np.load(tmp_path / "reference.npz") as file:
        assert file["arr_0"].shape == (8, 16, 16, 3)
        assert [file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")] == [
            *((2048,), (2048, 2048), (2023,), (2023, 2023))
        ]
        assert json.loads(str(file["identity"]))["size"] == 16
        np.savez(tmp_path / "samples.npz", file["arr_0"])
    flags = [f"--inception={inception_path}", f"--reference={tmp_path}/reference.npz"]
    code, _, errors = call(evaluate, tmp_path / "samples.npz", tmp_path / "out", *flags)
    assert code == 0, errors
    scores = receipt.read(tmp_path / "out")["scores"]
    assert scores["FID-8"]["value"] < 1e-3  # the same images
    assert scores["precision"]["value"] == scores["recall"]["value"] == 1


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run of random weights; the first test that judges it fits its classifier."""
    path = tmp_path_factory.mktemp("digits") / "run"
    random_run.save(path)
    return path


@pytest.fixture
def short_fit(monkeypatch):
    monkeypatch.setattr(classifier, "NUM_STEPS", (60, 60))


def test_small_data_are_judged_by_a_classifier_of_their_own(
    call, caplog, tmp_path, digits_run, short_fit
):
    """200 samples of random weights, with real digits beside them."""
    shutil.rmtree(digits_run / "evaluation", ignore_errors=True)
    caplog.set_level("INFO")
    given = [digits_run, tmp_path / "out", "--num_samples=200"]
    code, text, errors = call(evaluate, *given)
    assert code == 0, errors
    found = receipt.read(tmp_path / "out")
    values = {name: score["value"] for name, score in found["scores"].items()}
    name = "Frechet distance (classifier features)"
    assert found["network"]["network"] == "classifier"
    assert values[name] > 3 * found["held_out"][name] > 0  # noise against digits
    assert values["agreement with the label"] < 0.4 < found["held_out"]["agreement with the label"]
    assert values["precision"] < found["held_out"]["precision"]
    assert f"{name}" in text and "(held-out images: " in text
    assert "fitted a classifier to 1350 images" in caplog.text
    caplog.clear()
    code, again, errors = call(evaluate, *given)
    assert code == 0 and again == text and "fitted" not in caplog.text


def test_a_sweep_is_a_plot_and_its_numbers(call, tmp_path, digits_run, short_fit):
    flags = ["--sweep=cfg_scale=1,2", f"--out={tmp_path}/sweep", "--num_samples=40", "--timed"]
    code, text, errors = call(evaluate, *flags, digits_run)
    assert code == 0, errors
    results = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [result["value"] for result in results] == [1.0, 2.0]
    assert [result["receipt"]["model"]["passes"] for result in results] == [4, 8]
    assert results[0]["receipt"]["features"] != results[1]["receipt"]["features"]
    assert all(result["seconds"] > 0 for result in results)
    assert all(result["receipt"]["seconds_per_image"] > 0 for result in results)
    shown = [f"{result['seconds']:.4g}" for result in results]
    assert text.splitlines()[-3:-1] == ["seconds for a sample", "cfg_scale       1.0       2.0"]
    assert text.split()[-2:] == shown
    for name in ("sweep.png", "sampling_seconds.png"):
        with Image.open(tmp_path / "sweep" / name) as image:
            assert image.width > 600


@pytest.mark.slow
def test_a_sweep_over_pairs_is_a_table_and_a_plot_of_network_calls(
    call, tmp_path, digits_run, short_fit
):
    flags = ["--sweep=num_steps=2,4", "--sweep=sampler=ddpm,ddim", "--num_samples=40"]
    code, text, errors = call(evaluate, *flags, f"--out={tmp_path}/sweep", digits_run)
    assert code == 0, errors
    results = json.loads((tmp_path / "sweep/sweep.json").read_text())
    pairs = [(each["options"]["sampler"], each["value"]) for each in results]
    assert pairs == [("ddpm", "2"), ("ddim", "2"), ("ddpm", "4"), ("ddim", "4")]
    folders = {path.name for path in (tmp_path / "sweep/run").iterdir()}
    assert folders == {f"num_steps={steps},sampler={name}" for name, steps in pairs}
    head, first, second = text.splitlines()[-3:]
    assert head.split() == ["num_steps", "2", "4"]
    score = "Frechet distance (classifier features)"
    for line, name in ((first, "ddpm"), (second, "ddim")):
        found = [each for each in results if each["options"]["sampler"] == name]
        values = [f"{each['receipt']['scores'][score]['value']:.4g}" for each in found]
        assert line.split() == [f"run/{name}", *values]
    assert not (tmp_path / "sweep/sweep.png").exists()
    with Image.open(tmp_path / "sweep/sampling_calls.png") as image:
        assert image.width > 600


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["{samples}", "--inception={inception}", "--reference={ref}"],
            "--out must be given for images that exist",
        ),
        (["{samples}", "{out}"], "--inception must be given with images that exist"),
        (["{samples}", "{out}", "--inception={inception}"], "--reference must be given"),
        (["{samples}", "{out}", "--inception={out}", "--reference={ref}"], "inception must be a f"),
        (
            ["{samples}", "{out}", "--inception={inception}", "--reference={no_moments}"],
            "reference must have mu and sigma, or images as arr_0, got",
        ),
        (
            ["{samples}", "{out}", "--inception={inception}", "--reference={small}"],
            "reference must have images of 64 x 64, got 8 x 8 in",
        ),
        (
            ["{samples}", "{out}", "--inception={inception}", "--reference={pickle}"],
            "reference must be an .npz without pickles, got",
        ),
        (
            ["{samples}", "{out}", "--inception={inception}", "--reference={ref}", "--seed=1"],
            "seed must not be given for images that exist",
        ),
        (
            [
                "{samples}",
                "{out}",
                "--num_samples=37",
                "--inception={inception}",
                "--reference={ref}",
            ],
            "num_samples must be at most 36, which are in",
        ),
        (
            ["{samples}", "{out}", "--num_samples=5", "--inception={inception}"],
            "--num_samples must be a whole number in 6 .. 10000000, got 5",
        ),
        (
            ["{folder}", "{folder}", "--inception={inception}", "--reference={small}"],
            "out must not be a run, a checkpoint or the images, got ",
        ),
        (["{samples}", "{out}", "--cfg_scale=2"], "cfg_scale must not be given for images that"),
        (["--compare", "{samples}"], "--compare takes two receipts or more, got 1"),
        (["--compare", "{samples}", "{out}"], "samples.npz"),
        (["--repeat={out}", "x"], "a receipt must be a file that dit-evaluate wrote, got"),
        (
            ["{out}/data", "r.npz", "--make_reference", "--size=8", "--inception={inception}"],
            "checkpoint must exist, got ",
        ),
        (
            ["{folder}", "r.npz", "--make_reference", "--size=8", "--inception={inception}"],
            "dataset must be a directory written by dit-prepare or tensorflow-datasets, got",
        ),
        (
            ["{data}", "{small}", "--make_reference", "--size=8", "--inception={inception}"],
            "out must be new or what --make_reference wrote, got ",
        ),
        (["{samples}", "--make_reference"], "--out must be given with --make_reference"),
        (["--sweep=cfg_scale", "{samples}"], "sweep must be OPTION=VALUE,VALUE,..., got"),
        (["--sweep=cfg_scale=1,2", "{samples}"], "--out must be given with --sweep"),
        (["--sweep=seed=1,2", "{samples}", "--out={out}"], "sweep must be over one of"),
        (["--sweep=cfg_scale=a", "{samples}", "--out={out}"], "cfg_scale must be a number, got"),
        ([], "--checkpoint must be given"),
    ],
)
def test_wrong_use_is_one_line(refuse, files, inception_path, tmp_path, words, message):
    samples, reference = files
    small = np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "small.npz", small)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(small):
        Image.fromarray(image).save(tmp_path / f"folder/{i}.png")
    if "{data}" in words:
        pictures.draw(tmp_path / "tree", num_classes=2, per_class=4)
        prepare.write(tmp_path / "data", "train", imagefolder.scan(tmp_path / "tree"), num_shards=1)
    np.savez(tmp_path / "no_moments.npz", mu=np.zeros(2048))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}, 1]), sigma=np.array([{}, 1]))
    places = {
        "samples": samples,
        "ref": reference,
        "inception": inception_path,
        "out": tmp_path / "out",
        "folder": tmp_path / "folder",
        "data": tmp_path / "data",
    }
    places |= {name: tmp_path / f"{name}.npz" for name in ("small", "no_moments", "pickle")}
    assert message in refuse(evaluate, *(word.format(**places) for word in words))
    assert not (tmp_path / "out/receipt.json").exists()
