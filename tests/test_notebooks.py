"""The notebooks run from top to bottom in a kernel, show their figures, and say what was published.

A real kernel, not `runpy`: what a notebook shows (figures, tables, the progress line) shows nowhere else. It costs the
test extra nbclient, ipykernel and what they stand on (80 MB installed) and a few seconds a notebook.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(os.environ.get("SCALELAB_DATA", ROOT.parent / "shared" / "data")).resolve()
HEADER = "# ---\n# jupyter:\n"
NOTEBOOKS = [path for path in sorted((ROOT / "analysis").glob("*.py")) if path.read_text().startswith(HEADER)]

# Warnings are errors, but for those of the machinery below the notebook.
BEFORE = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="ipykernel|IPython|matplotlib_inline|jupyter|traitlets|zmq|tornado|asyncio")
"""
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
where = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
nbformat.write(notebook, sys.argv[1])
"""

# Per notebook: the data set that it needs, the figures that it shows, and what must have come out.
EXPECTED = {
    "fit_a_law": (
        None,
        1,
        """
assert fit.nobs == len(runs)
assert interval["lower"] < entropy < interval["upper"]
""",
    ),
    "csv_to_plan": (
        "chinchilla_epoch",
        4,
        """
assert abs(fit.record["value"] - 0.001018274018) < 1e-9
assert abs(everything.record["value"] - 0.001826010523) < 1e-9
for name, value in {"E": 1.81722, "alpha": 0.34731, "beta": 0.36717}.items():
    assert abs(fit.params[name] / value - 1) < 1e-3, name
assert {"diverged-run", "outlier-row", "objective-dependent"} <= {notice.code for notice in everything.warnings}
assert round(ratio[0]) == 7 and round(ratio[1]) == 18
assert held.error < 0.012 < held.errors["mean_abs"].iloc[1:].min()
assert set(intervals.index) == {"run", "model size", "budget"}
width = intervals["beta upper"] - intervals["beta lower"]
assert 1.3 < width["budget"] / width["run"] < 3
assert choices[answer].max() / choices[answer].min() > 2.5
assert plan.table["loss_width"].idxmax() == "no new runs"
assert before["loss_lower"] < after["loss"] < before["loss_upper"]
""",
    ),
    "three_approaches": (
        "chinchilla_epoch",
        3,
        """
assert abs(true_a - 0.5126) < 1e-4
assert abs(many["mean a"].iloc[1:] - true_a).max() < 0.006
assert many["share of intervals with the truth"].iloc[1:].min() > 0.7
assert -0.04 < many["mean a"].iloc[0] - true_a < -0.01
found = pd.DataFrame(answers["240 runs"]).T
assert found["lower"].max() < found["estimate"].min() and found["estimate"].max() < found["upper"].min()
assert abs(found["estimate"]["3 surface"] - 0.5139) < 1e-4
assert 0.035 < width < 0.065
assert bias["surface: %"].abs().max() < 1e-6 and bias["N* too large by %"].max() > 10
assert 0.505 < kaplan["estimate"]["total"] < 0.52
assert 0.74 <= kaplan["estimate"]["without embeddings"] < 0.82
""",
    ),
    "farseer_vs_chinchilla": (
        "farseer",
        5,
        """
assert 3.8e-4 < squares <= 3.95e-4
assert abs((printed / runs["bpc"] - 1).mean() + 0.024) < 1e-3
assert ranking.best.law.name == "farseer" and list(ranking.table["verdict"]).count("best") == 1
assert by_size["farseer"] < 0.002 and by_size["chinchilla"] > 5 * by_size["farseer"]
assert less["farseer"].iloc[0] > 1 and less["farseer"].iloc[-1] < 0.2 * less["chinchilla"].iloc[-1]
""",
    ),
    "batch_and_lr": (
        "steplaw",
        4,
        """
assert abs(given_away["published"].mean() - 0.109) < 5e-4
assert abs(given_away["published"].max() - 0.310) < 1e-3
assert given_away.mean().max() < 0.15
assert optima.cells["used"].all()
assert low < 0.5 and 0.2 < slopes.mean() < 0.6
assert B_crit["lower"] < truth["B_crit"] < B_crit["upper"]
assert m["lower"] < -0.527 < m["upper"]
assert abs(laws.step_law_lr(7e9, 1.4e12) / 9.16557e-4 - 1) < 1e-4
""",
    ),
}


def test_every_notebook_is_expected():
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)


def test_pairs_round_trip(tmp_path):
    """Work in the notebook comes back as a diff of that work alone, and outputs stay out of the committed file."""
    (tmp_path / "analysis").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copies = [pathlib.Path(shutil.copy(path, tmp_path / "analysis")) for path in NOTEBOOKS]
    sync = [sys.executable, "-m", "jupytext", "--sync", "--quiet"]
    subprocess.run([*sync, *copies], check=True, cwd=tmp_path)
    twins = [copy.with_suffix(".ipynb") for copy in copies]
    for twin in twins:
        notebook = nbformat.read(twin, 4)
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="an output")], 1
        notebook.cells.append(nbformat.v4.new_code_cell("1 + 1"))
        nbformat.write(notebook, twin)
        os.utime(twin, (time.time() + 10,) * 2)
    subprocess.run([*sync, *twins], check=True, cwd=tmp_path)
    for path, copy in zip(NOTEBOOKS, copies, strict=True):
        assert copy.read_text(encoding="utf-8") == path.read_text(encoding="utf-8") + "\n# %%\n1 + 1\n"


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem == "fit_a_law" else pytest.mark.slow, id=p.stem) for p in NOTEBOOKS]
)
def test_notebook_runs(path, tmp_path):
    data, figures, checks = EXPECTED[path.stem]
    if data and not (DATA / data).is_dir():
        pytest.skip(f"NOT RUN: {DATA / data} is missing; set SCALELAB_DATA")
    cells = [*jupytext.read(path).cells, nbformat.v4.new_code_cell(checks)]
    outputs = [out for cell in execute(cells, path.parent, tmp_path) for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == figures
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    bare = [out.data["text/plain"] for out in outputs if set(out.get("data", {})) == {"text/plain"}]
    assert not [text for text in bare if " object at 0x" in text]


def test_a_kernel_shows_figures_and_a_quiet_progress_line(tmp_path):
    """Figures need no pyplot of the user's; progress needs no widgets, and leaves an empty line."""
    progress = """
from scalelab.laws import progress
progress.PATIENCE = -1.0
seen, write = [], progress._Cell._write
progress._Cell._write = lambda self, text: (seen.append(text), write(self, text))
with progress.progress(4, "refits") as advance:
    for _ in range(3):
        advance(1)
assert seen == ["refits: 25%", "refits: 50%", "refits: 75%", ""]
"""
    cells = [
        nbformat.v4.new_code_cell(code) for code in ("from scalelab import plots\nax = plots.new_axes()", progress)
    ]
    _, figure, line = execute(cells, ROOT, tmp_path)
    assert ["image/png" in out.data for out in figure.outputs] == [True]
    assert [out.data for out in line.outputs] == [{"text/plain": ""}]


def execute(cells, where, tmp_path):
    """The cells, after one that makes warnings errors, with what they showed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BEFORE), *cells])
    nbformat.write(notebook, tmp_path / "run.ipynb")
    env = os.environ | {
        "SCALELAB_DATA": str(DATA), "SCALELAB_QUICK": "1", "PYTHONPATH": str(ROOT),
        # this interpreter's kernel, and nothing of the user's own
        "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_RUNTIME_DIR": str(tmp_path), "IPYTHONDIR": str(tmp_path),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run.ipynb"), str(where)],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return nbformat.read(tmp_path / "run.ipynb", 4).cells
