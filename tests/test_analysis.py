"""The notebooks run from top to bottom."""

import json
import pathlib

import matplotlib
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "analysis").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_and_holds_no_output(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    matplotlib.use("Agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["fit"].nobs == len(names["runs"])
