"""Figures of studies: what they show are the studies' numbers, in the axes that they are given."""

import copy
import itertools
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent / "laws"))
from planted import TRUTH, rows_of, sweep

from scalelab import laws, study_plots
from scalelab.errors import BadInput


@pytest.fixture(scope="module")
def world():
    table = sweep(budgets=(1e18, 1e19, 1e20, 1e21), noise=0.004, sizes=7)
    table = table.assign(family=np.where(np.arange(len(table)) % 2, "a", "b"))
    fit = laws.fit("chinchilla", table, bootstrap=120)
    return SimpleNamespace(
        table=table, fit=fit,
        calibration=fit.calibrate(12),
        ranking=laws.rank(table, ["chinchilla", "kaplan", "power"]),
        plan=laws.plan(fit, 1e20, 1e22, n=60),
        comparison=laws.compare(
            {"old": table, "new": sweep(noise=0.004, sizes=8, seed=1, truth={**TRUTH, "A": 320.0, "alpha": 0.33})},
            law="chinchilla", bootstrap=80,
        ),
    )  # fmt: skip


DRAWN = {
    "profile": lambda w, ax: w.fit.plot.profile("alpha", ax=ax),
    "sensitivity": lambda w, ax: w.fit.plot.sensitivity(ax=ax),
    "trim_drift": lambda w, ax: w.fit.plot.trim_drift(ax),
    "expanding": lambda w, ax: w.fit.plot.expanding(ax),
    "leave budget out": lambda w, ax: w.fit.plot.leave_group_out("budget", ax),
    "leave family out": lambda w, ax: w.fit.plot.leave_group_out("family", ax),
    "prediction": lambda w, ax: w.fit.plot.prediction(ax=ax),
    "beside_isoflop": lambda w, ax: w.fit.plot.beside_isoflop(ax),
    "coverage": lambda w, ax: w.calibration.plot(ax),
    "coverage of fit": lambda w, ax: w.fit.plot.coverage(w.calibration, ax),
    "ranking": lambda w, ax: w.ranking.plot(ax),
    "plan": lambda w, ax: w.plan.plot(ax),
    "multiplier": lambda w, ax: w.comparison.plot.multiplier(ax),
    "difference": lambda w, ax: w.comparison.plot.difference(ax),
}


def lines(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def band(ax, label):
    """Lower and upper edge of a filled band, by its x."""
    found = next(c for c in ax.collections if c.get_label() == label)
    points = found.get_paths()[0].vertices
    edges = {}
    for x, y in points:
        edges.setdefault(x, []).append(y)
    x = np.array(sorted(edges))
    return x, np.array([min(edges[v]) for v in x]), np.array([max(edges[v]) for v in x])


@pytest.mark.parametrize("name", DRAWN)
def test_axes_are_taken_returned_and_labelled(world, name):
    ax = Figure().add_subplot()
    before = list(world.fit.warnings)
    assert DRAWN[name](world, ax) is ax
    assert ax.get_xlabel()
    assert ax.lines
    assert world.fit.warnings == before  # a figure asks nothing that a careful reader should be told of


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_overlaps_at_half_a_pages_width(world, name):
    """At 3.3 inches and 8 points: tick labels keep apart, texts stay inside the figure."""
    ax = DRAWN[name](world, None)
    figure = ax.figure
    assert figure.get_size_inches()[0] == 4.125  # at 10 points
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    render = canvas.get_renderer()
    for axis, low, high in ((ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1")):
        shown = [t.get_window_extent(render) for t in axis.get_ticklabels(which="both") if t.get_text()]
        shown = sorted((b for b in shown if inside(b, ax, axis is ax.xaxis)), key=lambda b: getattr(b, low))
        assert len(shown) >= 2
        for a, b in itertools.pairwise(shown):
            assert getattr(a, high) <= getattr(b, low) + 1, (name, axis)
    whole = figure.bbox
    boxes = [t.get_window_extent(render) for t in (ax.title, ax.xaxis.label) if t.get_text()]
    if ax.get_legend():
        boxes.append(ax.get_legend().get_window_extent(render))
        assert not boxes[0].overlaps(boxes[-1]) or not ax.get_title()
    for box in boxes:
        assert whole.x0 - 1 <= box.x0 <= box.x1 <= whole.x1 + 1, name
        assert whole.y0 - 1 <= box.y0 <= box.y1 <= whole.y1 + 1, name


def inside(box, ax, horizontal):
    """Whether a tick label belongs to a tick within the axes' limits."""
    middle = (box.x0 + box.x1) / 2 if horizontal else (box.y0 + box.y1) / 2
    low, high = (ax.bbox.x0, ax.bbox.x1) if horizontal else (ax.bbox.y0, ax.bbox.y1)
    return low - 1 <= middle <= high + 1


def test_profile_shows_both_intervals(world):
    found = world.fit.profile("alpha")
    ax = world.fit.plot.profile("alpha")
    curve = ax.lines[0]
    at = np.isin(found.table["alpha"], curve.get_xdata())
    np.testing.assert_allclose(curve.get_ydata(), found.table["t"][at] ** 2)
    span = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose([span.x0, span.x1], [found.lower, found.upper], rtol=1e-6)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), found.quantile**2)
    np.testing.assert_allclose(ax.lines[2].get_xdata(), world.fit.conf_int().loc["alpha"])
    assert f"{found.lower:.4g} to {found.upper:.4g}" in ax.get_title()
    point = laws.fit("chinchilla", world.table, bootstrap=0)
    assert "bootstrap" not in point.plot.profile("alpha").get_title()


def test_plane_shows_the_regions_over_the_draws(world):
    ax = world.fit.plot.plane("alpha", "beta")
    found = world.fit.plane("alpha", "beta")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), world.fit.draws[["alpha", "beta"]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [world.fit.params[["alpha", "beta"]]])
    levels = [found.threshold(0.5), found.threshold(0.95)]
    np.testing.assert_allclose(next(c.levels for c in ax.collections if len(c.levels) == 2), levels)
    assert ax.get_xlabel() == "alpha"
    assert "50 and 95 %" in ax.get_title()


def test_sensitivity_shows_every_choice(world):
    table = world.fit.sensitivity()
    column = next(c for c in table if c.startswith("D/N at"))
    ax = world.fit.plot.sensitivity()
    drawn = np.sort(np.concatenate([line.get_xdata() for line in ax.lines]))
    np.testing.assert_allclose(drawn, np.sort(table[column]))
    assert legend(ax) == ["drop 0", "3", "5", "10"]
    assert "without embeddings" in ax.get_title()
    best = world.fit.optimal(float(column.split("= ")[1]))  # the column's name has three digits
    assert best.params_lower < best.params_upper
    span = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert span.x0 < best.tokens / best.params < span.x1


def test_trim_drift_is_in_half_widths(world):
    table, interval = world.fit.trim_drift(), world.fit.conf_int()
    ax = world.fit.plot.trim_drift()
    half = (interval.upper - interval.lower).E / 2
    np.testing.assert_allclose(lines(ax, "E").get_ydata(), (table["E"] - table["E"][0]) / half)
    assert legend(ax) == list(world.fit.names)


def test_expanding_shows_means_by_distance_and_every_prediction(world):
    found = world.fit.expanding()
    ax = world.fit.plot.expanding()
    for column, label in (("law", "chinchilla"), ("nearest run", "nearest run")):
        np.testing.assert_allclose(lines(ax, label).get_ydata(), 100 * found.by_distance[column])
    points = ax.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], found.table["decades"])
    np.testing.assert_allclose(points[:, 1], 100 * found.table["law"].abs())
    assert not study_plots.expanding({"a": world.fit, "b": world.fit}).collections


def test_leave_group_out_by_name_and_by_size(world):
    found = world.fit.leave_group_out("budget")
    line = lines(world.fit.plot.leave_group_out("budget"), "chinchilla")
    known = found["law"].notna()
    np.testing.assert_allclose(line.get_xdata(), found.index[known].astype(float))
    np.testing.assert_allclose(line.get_ydata(), found["law"][known])
    ax = world.fit.plot.leave_group_out("family")
    np.testing.assert_allclose(lines(ax, "chinchilla").get_xdata(), world.fit.leave_group_out("family")["law"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_prediction_keeps_curve_and_run_apart(world):
    fit = world.fit
    table = {"params": np.geomspace(1e8, 1e9, 5), "tokens": np.full(5, 2e10)}
    ax = fit.plot.prediction(table)
    own = laws.fit("chinchilla", world.table, bootstrap=120).get_prediction(table).summary_frame()
    for label, name in (("the curve, 95 %", "mean"), ("a new run, 95 %", "obs")):
        x, lower, upper = band(ax, label)
        np.testing.assert_allclose(x, table["params"])
        np.testing.assert_allclose(lower, own[f"{name}_ci_lower"])
        np.testing.assert_allclose(upper, own[f"{name}_ci_upper"])
    assert ax.get_xlabel() == "parameters N"
    along = fit.plot.prediction()
    C, loss = lines(along, "chinchilla").get_data()
    np.testing.assert_allclose(loss, fit.optima(C).loss, rtol=1e-9)
    assert along.get_xlabel() == "training compute C (FLOP)"
    assert "beyond the data" in along.get_title()
    assert "tokens = " in fit.plot.prediction(x="params").get_title()
    with pytest.raises(BadInput, match="x = 'lr': must be one of params, tokens, flops"):
        fit.plot.prediction(x="lr")
    with pytest.raises(BadInput, match="x = 'lr': must be one of params, tokens"):
        fit.plot.prediction(table, x="lr")


@pytest.mark.parametrize("name", ["power", "coverage", "fine-grained-moe", "rl-compute", "parscale"])
def test_prediction_of_any_law(name):
    """Of one input or many, in compute, in shares, with targets that may be 0."""
    law = laws.LAWS[name]()
    fit = law.fit(rows_of(law), bootstrap=10)
    ax = fit.plot.prediction()
    assert np.isfinite(lines(ax, name).get_ydata()).all()


def test_prediction_of_shares_needs_a_table():
    """No share can vary alone."""
    law = laws.DataMixture("web", "code")
    web = np.linspace(0.1, 0.9, 12)
    fit = law.fit({"web": web, "code": 1 - web, "loss": 2 + 0.3 * np.exp(-web)}, bootstrap=10)
    with pytest.raises(BadInput, match=r"table = None: name inputs to draw data-mixture along .*proportions"):
        fit.plot.prediction()
    assert fit.plot.prediction({"web": web, "code": 1 - web}, "web").get_xlabel() == "web"


def test_beside_isoflop_shows_both_with_intervals(world):
    table = world.fit.beside_isoflop()
    ax = world.fit.plot.beside_isoflop()
    markers = [line for line in ax.lines if line.get_marker() in "os" and len(line.get_ydata()) == len(table)]
    for line, column in zip(markers, ("law", "isoflop"), strict=False):
        np.testing.assert_allclose(line.get_ydata(), table[column])
    assert legend(ax) == ["less their bias", "chinchilla", "parabolas"]


def test_coverage_has_its_binomial_error(world):
    found = world.calibration
    ax = found.plot()
    share = found.table["coverage"]
    points = next(line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xdata(), share)
    bars = ax.collections[0].get_segments()
    np.testing.assert_allclose([b[1][0] for b in bars], np.minimum(share + 2 * found.table["error"], 1))
    assert [t.get_text() for t in ax.get_yticklabels()] == [*list(found.table.index[:-1]), "loss*"]
    assert found.target in ax.get_title()


def test_ranking_has_the_floor(world):
    found = world.ranking
    ax = found.plot()
    best = found.table.index[found.table["verdict"] == "best"]
    np.testing.assert_allclose(lines(ax, "best").get_xdata(), found.table.loc[best, "held_out"])
    inside = found.table["inside"].dropna()
    np.testing.assert_allclose(np.sort(lines(ax, "in sample").get_xdata()), np.sort(inside))
    assert ax.patches[0].get_extents().transformed(ax.transData.inverted()).x1 == pytest.approx(found.floor)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(found.table.index)


def test_plan_marks_what_it_recommends(world):
    found = world.plan
    ax = found.plot()
    star = next(line for line in ax.lines if line.get_marker() == "*")
    assert star.get_xdata()[0] == found.table.loc[found.recommended, "loss_width"]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(found.table.index)


def test_multiplier_shows_the_crossing(world):
    found = world.comparison
    ax = found.plot.multiplier()
    row = found.crossings.loc["new"]
    table = found.table(arm="new")
    np.testing.assert_allclose(lines(ax, "new").get_ydata(), table["multiplier"])
    assert 1e18 < row.flops < 1e21
    dotted = next(line for line in ax.lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_xdata(), row.flops)
    thick = next(line for line in ax.lines if line.get_linewidth() == 3.5)
    ends = np.clip([row.lower, row.upper], table["flops"].min(), table["flops"].max())
    np.testing.assert_allclose(thick.get_xdata(), ends)


def test_an_interval_without_an_end_leaves_the_picture(world):
    found = copy.copy(world.comparison)
    endless = found.contrasts["at"] == "compute"
    found.contrasts = found.contrasts.assign(multiplier_upper=found.contrasts["multiplier_upper"].mask(endless, np.inf))
    ax = found.plot.multiplier()
    band = ax.collections[0].get_paths()[0].vertices
    table = found.table(arm="new")
    assert band[:, 1].max() == pytest.approx(ax.get_ylim()[1])
    assert band[:, 1].min() == pytest.approx(table["multiplier_lower"].min())
    assert ax.get_ylim()[1] > table["multiplier"].max()


def test_what_cannot_be_drawn_says_why():
    few = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=4), bootstrap=0)
    assert "no hold-out" in few.plot.expanding().texts[0].get_text()
    assert "no budget can be left out" in few.plot.leave_group_out("budget").texts[0].get_text()
    assert not few.plot.prediction().collections  # a point fit has no band
    assert study_plots.trim_drift(laws.fit("chinchilla", sweep(noise=0.003), bootstrap=0)).get_title()
