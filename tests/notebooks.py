"""Executes a notebook of launch/colab without a browser, and writes its pictures.

python tests/notebooks.py launch/colab/sample.ipynb OUT [FIELD=VALUE ...]

It executes the notebook in a fresh kernel of this Python, as a rehearsal (SMOKE=1; SMOKE=0 turns
that off), with the files of the notebook in OUT/runs. FIELD=VALUE sets a field of its forms, such
as STEPS=5 or CLASSES='"cat, dog"'. OUT gets the notebook with its outputs and every picture, such
as cell-07-0.png. Exit code 1: a cell failed.
"""

import base64
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLAB = ROOT / "launch" / "colab"
KINDS = {"image/png": "png", "image/gif": "gif"}
FIELD = r"^{name} = (?P<value>.*?)(?P<form>  # @param.*)$"


def execute(path, out, **fields):
    """The executed notebook of a path, of `nbformat`; AssertionError if a cell failed.

    fields: values of its forms. The work is done by another process, which has its own event loop
    and whose warnings are no errors.
    """
    words = [f"{name}={value!r}" for name, value in fields.items()]
    command = [sys.executable, __file__, path, out, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(out / path.name)


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def set_fields(notebook, fields):
    """Writes values into the forms of a notebook; KeyError if it has no such field."""
    for name, value in fields.items():
        cells = [cell for cell in notebook.cells if _set_field(cell, name, value)]
        if not cells:
            raise KeyError(f"the notebook has no field {name}")


def _set_field(cell, name, value):
    """Writes a value into the form of a cell; returns whether it has that field."""
    lines = re.compile(FIELD.format(name=name), re.MULTILINE)
    cell.source, count = lines.subn(lambda found: f"{name} = {value}{found['form']}", cell.source)
    return count > 0


def texts(cell):
    """What a cell printed, as one text."""
    return "".join(x.text for x in cell.get("outputs", []) if x.output_type == "stream")


def pictures(notebook):
    """{name: bytes} of the pictures among the outputs of a notebook, by cell."""
    found = {}
    for i, cell in enumerate(notebook.cells):
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        kept = [
            next((kind, x[kind]) for kind in KINDS if kind in x)
            for x in data
            if KINDS.keys() & x.keys()
        ]
        for j, (kind, text) in enumerate(kept):
            found[f"cell-{i:02d}-{j}.{KINDS[kind]}"] = base64.b64decode(text)
    return found


def times(notebook):
    """{cell: seconds} of an executed notebook."""
    found = {}
    for i, cell in enumerate(notebook.cells):
        stamps = cell.metadata.get("execution", {})
        ends = [stamps.get(f"iopub.status.{name}") for name in ("busy", "idle")]
        if all(ends):
            begun, ended = (datetime.datetime.fromisoformat(x) for x in ends)
            found[i] = (ended - begun).total_seconds()
    return found


def _run(path, out, words):
    """Executes a notebook and writes it and its pictures to a folder; returns the exit code."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    out.mkdir(parents=True, exist_ok=True)
    fields = dict(word.split("=", 1) for word in words)
    environment = {"SMOKE": fields.pop("SMOKE", "1"), "RUNS": str(out / "runs")}
    environment["IPYTHONDIR"] = str(out / "ipython")
    notebook = read(path)
    set_fields(notebook, fields)
    folder = {"metadata": {"path": str(path.parent)}}  # where Jupyter starts a notebook
    client = NotebookClient(notebook, timeout=1800, resources=folder, kernel_name="python3")
    code = 0
    try:
        client.execute(env=os.environ | environment)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        code = 1
    finally:  # also if it is stopped, or if the kernel dies
        nbformat.write(notebook, out / path.name)
        for name, data in pictures(notebook).items():
            (out / name).write_bytes(data)
        for i, seconds in times(notebook).items():
            print(f"cell {i:2d} {seconds:6.1f} s  {notebook.cells[i].source.splitlines()[0]}")
    return code


if __name__ == "__main__":
    path, out, *words = sys.argv[1:]
    sys.exit(_run(Path(path).resolve(), Path(out).resolve(), words))
