import notebooks

PATH = notebooks.COLAB / "understand.ipynb"


def test_it_draws_the_paper(tmp_path):
    notebook = notebooks.execute(PATH, tmp_path)
    pngs = [name for name in notebooks.pictures(notebook) if name.endswith(".png")]
    assert len(pngs) == 13
    text = "\n".join(map(notebooks.texts, notebook.cells))
    assert "XL/2      256     674.8 M  118.62    19.47" in text  # table 4 of the paper has 118.64
    assert "S/8        16      33.1 M    0.36   153.60" in text
