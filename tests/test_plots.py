"""Figures: they draw what they are given, into the axes they are given, and leave no global state."""

import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent / "laws"))
from planted import best_size, curves, sweep

from scalelab import laws, plots, study_plots


@pytest.fixture(scope="module")
def world():
    table = sweep(noise=0.003)
    table.loc[5, "status"] = "diverged"
    done = table[(table.flops != 1e20) | (table.params < best_size(1e20))]
    return {
        "table": table,
        "curves": curves(table),
        "fit": laws.fit("chinchilla", table, bootstrap=50),
        "isoflop": laws.isoflop(done, bootstrap=50),
        "isoflop_table": done,
    }


def texts(ax):
    legend = ax.get_legend()
    return [t.get_text() for t in legend.get_texts()] if legend else []


def test_no_pyplot_and_so_no_global_state():
    code = (
        "import sys; from scalelab import plots; ax = plots.new_axes(); ax.plot([1, 2]); "
        "ax.figure.canvas.draw(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


def test_axes_are_taken_and_returned(world):
    ax = Figure().add_subplot()
    assert plots.measured(world["fit"], ax) is ax
    assert world["fit"].plot.residuals(ax) is ax
    assert world["fit"].plot.surface().get_xlabel() == "parameters N"
    assert world["fit"].plot.holdout().get_ylabel() == "predicted loss"
    assert len(world["fit"].plot.frontier([1e18, 1e21])) == 2


def test_loss_curves_show_every_run(world):
    ax = plots.loss_curves(world["curves"], world["table"])
    lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(lines) == 18
    assert sum(line.get_linestyle() == ":" for line in lines) == 1
    first = world["curves"][world["curves"].id == world["table"].id[0]]
    np.testing.assert_allclose(lines[0].get_ydata(), first.loss)
    assert "FLOP" in ax.get_xlabel()
    assert "nats" in ax.get_ylabel()


def test_isoflop_shows_minima_and_refusals(world):
    ax = plots.isoflop(world["isoflop_table"], world["isoflop"])
    assert len(texts(ax)) == 3
    assert [t.endswith("refused") for t in texts(ax)] == [False, False, True]
    vertices = world["isoflop"].vertices
    stars = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(stars, vertices.params[vertices.used])
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1


def test_surface_has_the_frontier_and_its_band(world):
    ax = plots.surface(world["fit"], world["table"])
    frontier = ax.lines[0]
    N, D = frontier.get_xdata(), frontier.get_ydata()
    compute = 6 * N * D
    np.testing.assert_allclose(N, world["fit"].optimal(compute).params, rtol=1e-9)
    assert ax.patches
    assert texts(ax) == ["compute-optimal", "95 % interval"]


def test_drawing_adds_no_warnings():
    fit = laws.fit("chinchilla", sweep(noise=0.003), bootstrap=20)
    before = list(fit.warnings)
    plots.surface(fit)
    plots.allocation({"law": fit}, [1e18, 1e25])
    assert fit.warnings == before


def test_a_fit_without_intervals_has_no_band():
    fit = laws.fit("chinchilla", sweep(noise=0.003), bootstrap=0)
    assert not plots.surface(fit).patches
    axes = plots.allocation({"law": fit}, [1e18, 1e20])
    assert not any(path.vertices.size for band in axes[0].collections for path in band.get_paths())
    assert plots.measured(fit).collections


def test_allocation_marks_where_the_data_end(world):
    axes = plots.allocation({"surface": world["fit"], "IsoFLOP": world["isoflop"]}, [1e18, 1e21])
    assert "surface" in texts(axes[0])
    assert "IsoFLOP" in texts(axes[0])
    assert any("beyond" in t.get_text() for t in axes[0].texts)
    inside = plots.allocation({"surface": world["fit"]}, [1e18, 1e19])
    assert not any("beyond" in t.get_text() for t in inside[0].texts)


def test_holdout_without_enough_runs_says_why():
    fit = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=5), bootstrap=0)
    assert "no hold-out" in plots.holdout(fit).texts[0].get_text()


def test_expanding_shows_each_law_beside_the_baselines(world):
    other = laws.fit("kaplan", sweep(noise=0.003), bootstrap=0)
    ax = study_plots.expanding({"surface": world["fit"], "Kaplan": other})
    assert texts(ax) == ["surface", "Kaplan", "nearest run", "power law in C"]
    expected = world["fit"].expanding().by_distance
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 100 * expected["law"])
    np.testing.assert_allclose(ax.lines[2].get_ydata(), 100 * expected["nearest run"])
    assert world["fit"].plot.expanding(ax) is ax
    few = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=4), bootstrap=0)
    assert "no hold-out" in study_plots.expanding({"few": few}).texts[0].get_text()


def test_allocation_takes_an_envelope_too(world):
    curves = world["curves"].merge(world["table"][["id", "params"]], on="id")
    found = laws.envelope(curves, bootstrap=20)
    axes = plots.allocation({"surface": world["fit"], "envelope": found}, [1e18, 1e21])
    assert texts(axes[0]) == ["surface", "envelope"]
    np.testing.assert_allclose(axes[0].lines[1].get_ydata()[-1], found.optimal(1e21)["params"], rtol=1e-9)


def test_figures_of_a_law_without_parameters_or_loss():
    table = pd.DataFrame({"batch_tokens": np.geomspace(1e4, 1e7, 12)})
    steps = laws.simulate("critical-batch", table, 0.02, params={"S_min": 4000.0, "B_crit": 1e6})
    fit = laws.fit("critical-batch", steps, bootstrap=50)
    assert plots.measured(fit).get_xlabel() == "batch_tokens"
    ax = plots.holdout(fit)
    assert ax.get_ylabel() == "predicted steps"
    assert "power law in batch_tokens" in texts(ax)[1]


@pytest.mark.parametrize(
    ("width", "labels"), [(2.0, ["100M", "1B"]), (6.0, ["100M", "200M", "500M", "1B", "2B", "5B"])]
)
def test_ticks_leave_room_for_their_labels(width, labels):
    ax = plots.new_axes(size=(width, 3.0))
    ax.set(xscale="log", xlim=(9e7, 7e9))
    plots.human_log(ax, "x")
    ticks = [v for v in ax.xaxis.get_majorticklocs() if 9e7 <= v <= 7e9]
    assert [ax.xaxis.get_major_formatter()(v, 0) for v in ticks] == labels


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (1234567, "1.23M"), (999999, "1M"), (2e9, "2B"), (3e12, "3T")]
)
def test_human(value, text):
    assert plots.human(value) == text


def test_every_figure_can_be_drawn(world, tmp_path):
    draw = {
        "curves": lambda: plots.loss_curves(world["curves"], world["table"]),
        "isoflop": lambda: plots.isoflop(world["isoflop_table"], world["isoflop"]),
        "surface": lambda: plots.surface(world["fit"], world["table"]),
        "measured": lambda: plots.measured(world["fit"]),
        "allocation": lambda: plots.allocation({"a": world["fit"], "b": world["isoflop"]}, [1e18, 1e21])[0],
        "holdout": lambda: plots.holdout(world["fit"]),
        "expanding": lambda: study_plots.expanding({"a": world["fit"]}),
    }
    for name, function in draw.items():
        function().figure.savefig(tmp_path / f"{name}.png", dpi=50)
        assert (tmp_path / f"{name}.png").stat().st_size > 3000
