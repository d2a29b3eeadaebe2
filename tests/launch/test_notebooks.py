"""The notebooks of launch/colab: their form, what their first cell uses, and whether they run."""

import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import notebooks
import pytest
import random_run
from packaging.requirements import Requirement
from PIL import Image

from dit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
COLAB = ROOT / "launch" / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
REPOSITORY = "https://github.com/dit-jax/dit_jax"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/dit-jax/dit_jax/blob/main/launch/colab/{name})"
)
MAX_LINES = 20  # of a cell; only the first one, which Colab folds, has more
ABSOLUTE = re.compile(r"""["'\s(=]/(?!/)\w+/""")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def colab(monkeypatch):
    """The modules of launch/colab, as the first cell imports them."""
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.colab import install, start, weights

    return SimpleNamespace(install=install, start=start, weights=weights)


@each_notebook
def test_a_notebook_is_valid_and_has_no_outputs(path):
    import nbformat

    notebook = notebooks.read(path)
    nbformat.validate(notebook)
    assert path.read_text() == nbformat.writes(notebook) + "\n"  # so a diff shows changes only
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


@each_notebook
def test_the_cells_of_a_notebook_are_short_and_compile(path):
    first, *others = [x.source for x in notebooks.read(path).cells if x.cell_type == "code"]
    assert first == first_cell(NOTEBOOKS[0])
    for source in (first, *others):
        compile(source, path.name, "exec")  # no magic: Python alone
        assert not ABSOLUTE.search(source), source
    assert max(source.count("\n") + 1 for source in others) <= MAX_LINES


def first_cell(path):
    return next(x.source for x in notebooks.read(path).cells if x.cell_type == "code")


@each_notebook
def test_the_badge_and_the_first_cell_have_the_same_address(path):
    notebook = notebooks.read(path)
    assert BADGE.format(name=path.name) in notebook.cells[0].source
    assert f'REPOSITORY = "{REPOSITORY}"  # @param' in first_cell(path)
    assert set(re.findall(r"github\.com/([\w.-]+/[\w.-]+)", first_cell(path))) == {
        REPOSITORY.partition(".com/")[2]
    }
    assert path.name in (COLAB / "README.md").read_text()


def test_pins_fit_all_requirements(colab):
    pins = colab.install.read_pins()
    needed = {colab.install.normal(x.name): x for x in map(Requirement, setup_requirements())}
    assert pins.keys() == needed.keys()
    assert [name for name in pins if not needed[name].specifier.contains(pins[name])] == []


def setup_requirements():
    """What setup.py asks for, with the extra of the notebooks."""
    code = """
import json, runpy, setuptools
found = {}
setuptools.setup = lambda **options: found.update(options)
runpy.run_path("setup.py")
print(json.dumps(found["install_requires"] + found["extras_require"]["convert"]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_only_what_is_missing_or_too_old_is_installed(colab, monkeypatch, capsys):
    calls = []

    def pip(*words):
        constraints = Path(words[-1]).read_text() if "--constraint" in words else ""
        calls.append((words, constraints))

    monkeypatch.setattr(colab.install, "_pip", pip)
    colab.install.install()
    assert calls == [] and capsys.readouterr().out == ""

    old, real = {"diffusers": None, "flax": "0.11.1"}, colab.install.version
    monkeypatch.setattr(colab.install, "version", lambda name: old.get(name, real(name)))
    monkeypatch.setattr(colab.install, "accelerator", lambda: "")
    colab.install.install()
    [(words, constraints)] = calls
    assert [word.split("==")[0] for word in words[:-2]] == ["flax", "diffusers"]
    assert f"jax=={real('jax')}\n" in constraints and "flax" not in constraints
    assert "installing flax==" in capsys.readouterr().out


def test_jax_comes_with_the_extra_of_the_accelerator(colab):
    pins = colab.install.read_pins()
    chosen = colab.install.choose_pins(["jax", "flax"], "cuda12")
    assert chosen == [f"jax[cuda12]=={pins['jax']}", f"flax=={pins['flax']}"]
    assert colab.install.choose_pins(["jax"], "") == [f"jax=={pins['jax']}"]


@pytest.mark.parametrize(
    "found, device, words",
    [
        (["tpu", 1, "TPU v5 lite", 17e9], "tpu", "has 1 x TPU v5 lite with 17 GB"),
        (["gpu", 1, "Tesla T4", 15e9], "gpu", "has 1 x Tesla T4 with 15 GB"),
        (["cpu", 1, "cpu", 0], "cpu", "On Colab: Runtime > Change runtime type"),
        ("the TPU is in use", "cpu", "cannot use the accelerator of this machine: the TPU is in"),
    ],
)
def test_the_machine_is_described(colab, monkeypatch, capsys, found, device, words):
    monkeypatch.setattr(colab.start, "_find_devices", lambda: found)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert colab.start.look() == device
    assert words in capsys.readouterr().out


def test_a_command_that_fails_stops_the_notebook(colab, capsys):
    with pytest.raises(colab.start.Failed, match="dit-convert ended with exit code 2; the line ab"):
        colab.start.run("dit-convert", "inspect", "nowhere", device="cpu")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "$ dit-convert inspect nowhere"
    assert shown[1].startswith("dit-convert: FILE_OR_DIR must exist, got")


def test_a_path_is_sought_where_the_notebook_is_first(colab, monkeypatch, tmp_path):
    monkeypatch.setenv("STARTED_IN", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert colab.start.find(" mine ") == tmp_path / "mine"
    assert colab.start.find("other") == Path("other").absolute()
    assert colab.start.find("/mine") == Path("/mine")


def test_what_a_form_names_is_a_checkpoint_or_one_line(colab, tmp_path):
    for name in ("", "nowhere", "DiT-XL-2-1024x1024"):
        with pytest.raises(colab.start.Failed, match=f"DiT-XL-2-512x512 or the folder .*{name!r}"):
            colab.weights.checkpoint(name, tmp_path, smoke=True)
    with pytest.raises(UserError, match="checkpoint must be a directory with a saved step, got"):
        colab.weights.checkpoint(str(tmp_path), tmp_path, smoke=True)
    random_run.save(tmp_path / "run")
    found = colab.weights.checkpoint(f"{tmp_path}/run ", tmp_path, smoke=True)
    assert found == tmp_path / "run"


def test_a_cell_whose_choice_has_changed_says_which_to_run(colab):
    colab.start.need(1, "Sample")
    with pytest.raises(colab.start.Failed, match="run the cell 'Sample' again: it belongs to what"):
        colab.start.need(None, "Sample")


def test_the_stop_button_stops_a_command_which_saves(colab, put, tmp_path, monkeypatch, capsys):
    put("python", "trap 'echo saved; exit 42' TERM\necho step 1\nwhile :; do sleep 0.1; done\n")
    monkeypatch.setattr(colab.start.sys, "executable", str(tmp_path / "bin" / "python"))
    show = colab.start._show_lines

    def press(process):
        monkeypatch.setattr(colab.start, "_show_lines", show)
        print(process.stdout.readline(), end="")
        raise KeyboardInterrupt

    monkeypatch.setattr(colab.start, "_show_lines", press)
    with pytest.raises(colab.start.Stopped, match="dit-train has saved what it did: run this"):
        colab.start.run("dit-train", "configs/digits.py", "runs/digits")
    assert capsys.readouterr().out.splitlines()[1:] == ["step 1", "saved"]


@pytest.fixture
def server():
    """A server of the bytes `data`, of which it sends `most` at a time; `asked` are the ranges."""
    state = SimpleNamespace(data=bytes(range(250)) * 4, most=1000, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            state.asked.append(asked)
            first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            rest = state.data[first:]
            self.send_response(416 if not rest else 206 if asked else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: state.most])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/weights.pt"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def test_a_download_is_resumed_and_whole(colab, server, tmp_path):
    path = tmp_path / "weights.pt"
    server.most = 600
    with pytest.raises(colab.start.Failed, match="600 of 1000 bytes came. Run this cell again to"):
        colab.start.download(server.url, path)
    assert not path.exists()
    assert colab.start.download(server.url, path) == path
    assert path.read_bytes() == server.data
    colab.start.download(server.url, path)
    assert server.asked == [None, "bytes=600-"]


def test_a_download_that_is_complete_but_not_renamed_begins_again(colab, server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(bytes(1000))
    colab.start.download(server.url, tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == server.data


def test_without_a_network_the_rehearsal_is_offered(colab, tmp_path):
    with pytest.raises(colab.start.Failed, match="cannot be downloaded: .*refused.* tick SMOKE in"):
        colab.start.download("http://127.0.0.1:9/weights.pt", tmp_path / "weights.pt")


def test_without_the_hub_the_rehearsal_is_offered(colab, monkeypatch, tmp_path):
    def refuse(name, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(colab.start.Failed, match="got a/vae: no route to the hub. Run .* SMOKE in"):
        colab.weights.autoencoder("a/vae", tmp_path, smoke=False)


def test_the_first_cell_clones_and_starts_again_in_an_empty_folder(tmp_path):
    origin, folder = tmp_path / "origin", tmp_path / "colab"
    folder.mkdir()
    for name in ("launch", "dit_jax"):
        shutil.copytree(ROOT / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", origin]
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", origin], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=all"], check=True)

    def start(address):
        source = first_cell(NOTEBOOKS[0]).replace(f'"{REPOSITORY}"', f'"{address}"')
        command = [sys.executable, "-c", source]
        environment = os.environ | {"SMOKE": "1", "PYTHONPATH": ""}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    failed = start(tmp_path / "nowhere")
    assert "cannot be cloned: see the line above" in failed.stderr and failed.returncode
    for address in (origin.as_uri(), tmp_path / "nowhere"):  # the second time it has a clone
        done = start(address)
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.splitlines()[-2] == f"Files are kept in {folder}/dit_jax_clone/runs/smoke."
        )
        assert (folder / "dit_jax_clone" / "runs" / "smoke").is_dir()


SAMPLE = COLAB / "sample.ipynb"


def test_the_notebook_of_sampling_runs_from_weights_to_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")  # an accelerator that jax cannot use
    notebook = notebooks.execute(SAMPLE, tmp_path, CLASSES="otter, 979, hotpot", STEPS=2)
    said = notebooks.texts(notebook.cells[1])
    assert "jax cannot use the accelerator of this machine: Unable to initialize" in said
    assert "(JAX_PLATFORMS is rocm)" in said
    assert "Everything works on the CPU too, with fewer images and more patience." in said
    by_title = cells_by_title(notebook)
    assert "passed: relative error" in notebooks.texts(by_title["Choose a model"])
    assert "passed: relative error" in notebooks.texts(
        by_title["Open the model and its autoencoder"]
    )
    assert "3 images in" in notebooks.texts(by_title["Sample"])
    found = {name: Image.open(io.BytesIO(x)) for name, x in notebooks.pictures(notebook).items()}
    kinds = [picture.format for picture in found.values()]
    assert kinds == ["PNG", "GIF", "PNG", "PNG", "PNG", "PNG", "PNG"]
    for picture in found.values():
        assert max(picture.size) <= 1300 and len(picture.convert("L").getcolors()) > 50
    assert next(x for x in found.values() if x.format == "GIF").n_frames == 3
    assert len(list((tmp_path / "runs" / "smoke").glob("images-*/*.png"))) == 3


def test_without_a_network_a_notebook_offers_the_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        AssertionError, match="Failed: .*DiT-XL-2-256x256.pt cannot be do.*SMOKE"
    ) as e:
        notebooks.execute(SAMPLE, tmp_path, SMOKE=0)
    assert "Traceback" not in str(e.value)


@pytest.mark.slow
def test_on_a_cpu_the_official_weights_make_fewer_images_and_are_not_converted_again(tmp_path):
    notebooks.execute(SAMPLE, tmp_path, STEPS=2)
    for path in (tmp_path / "runs" / "smoke").iterdir():
        path.rename(tmp_path / "runs" / path.name)
    notebook = notebooks.execute(SAMPLE, tmp_path, SMOKE=0)
    text = "\n".join(map(notebooks.texts, notebook.cells))
    assert "golden retriever, otter: 20 steps each" in text
    assert "2 images in" in text and "$ dit-convert" not in text


def cells_by_title(notebook):
    cells = [x for x in notebook.cells if x.cell_type == "code"]
    return {x.source.splitlines()[0].removeprefix("# @title "): x for x in cells}


@pytest.mark.slow
def test_a_misspelt_class_is_one_line_and_stops_the_notebook(tmp_path):
    with pytest.raises(
        AssertionError, match="UserError: labels must be .* did you mean otter"
    ) as e:
        notebooks.execute(SAMPLE, tmp_path, CLASSES="ottr", STEPS=2)
    assert "Traceback" not in str(e.value)


@pytest.mark.parametrize(
    "checkpoint", ["digits", pytest.param("DiT-XL-2-256x256", marks=pytest.mark.slow)]
)
def test_the_notebook_of_conversion_runs_there_and_back(tmp_path, checkpoint):
    notebook = notebooks.execute(COLAB / "convert.ipynb", tmp_path, CHECKPOINT=checkpoint)
    by_title = cells_by_title(notebook)
    for title in ("Write the bundle", "Write the folder for diffusers"):
        assert "passed: relative error" in notebooks.texts(by_title[title])
    assert "the same to the last bit: True" in notebooks.texts(
        by_title["Convert the bundle to JAX"]
    )
    printed = [notebooks.texts(x) for x in notebook.cells if "compare(" in x.source]
    differences = [int(re.search(r"difference: (\d+) of 255", text)[1]) for text in printed]
    assert len(differences) == 2 and max(differences) <= 2  # roundings at a half
    assert len(notebooks.pictures(notebook)) == 2
