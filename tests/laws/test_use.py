"""Findings about what a fit is asked for: intervals, extrapolation, predictions, published constants."""

import numpy as np
import pytest
from checked import DS, NS, clean, codes, fit, grid

from scalelab.errors import BadInput


def test_bootstrap_that_cannot_identify_the_law():
    rows = np.tile(np.arange(25), (40, 1))
    rows[:10] = 3  # a quarter of the draws hold one row only
    found = fit(grid(NS, DS), bootstrap=rows)
    assert codes(found)["bootstrap-degenerate"].numbers["failed"] == 10
    assert np.isnan(found.draws.iloc[:10]).all().all()


def test_bootstrap_without_spread_is_suspected():
    found = fit(grid(NS, DS, noise=0.0005), bootstrap=np.tile(np.arange(25), (40, 1)))
    assert "bootstrap-degenerate" in codes(found)


def test_bad_bootstrap_arguments():
    table = grid(NS, DS)
    with pytest.raises(BadInput, match="bootstrap"):
        fit(table, bootstrap=-1)
    with pytest.raises(BadInput, match="0 to 24"):
        fit(table, bootstrap=np.full((3, 25), 25))
    with pytest.raises(BadInput, match="row indices"):
        fit(table, bootstrap=np.zeros((3, 25)))
    table.loc[4, "status"] = "failed"
    with pytest.raises(BadInput, match="left out"):
        fit(table, bootstrap=np.tile(np.arange(25), (3, 1)))


def test_far_extrapolation():
    table = grid(NS, DS)
    found = fit(table)
    found.predict(table)
    found.optimal(3e18)
    assert found.warnings == []
    found.optimal(table.flops.max() * 2)
    note = codes(found)["far-extrapolation"]
    assert note.severity == "note"
    found.optimal(table.flops.max() * 1000)
    warning = codes(found)["far-extrapolation"]
    assert warning.severity == "warning"
    assert warning.numbers["decades"]["C"] == pytest.approx(3)
    assert warning.numbers["holdout_error"] < 0.05
    assert sum(n.code == "far-extrapolation" for n in found.warnings) == 1
    found.predict({"params": [1e8], "tokens": [1e15]})
    assert codes(found)["far-extrapolation"].numbers["decades"]["D"] == pytest.approx(4)


def test_inputs_of_a_prediction_are_checked():
    with pytest.raises(BadInput, match="tokens"):
        fit(grid(NS, DS)).predict({"params": [1e8], "tokens": [-1.0]})
    with pytest.raises(BadInput, match="needs a column tokens"):
        fit(grid(NS, DS)).predict({"params": [1e8]})


def test_at_start():
    found = fit(grid([1e8], np.geomspace(1e9, 1e11, 12)))
    assert codes(found)["at-start"].numbers["parameters"] == ["alpha"]
    assert not found.ok


def test_asking_further_than_the_runs_span():
    found = fit(grid(NS, DS))
    found.optimal(6e20 * 10**2)
    assert "narrow-range" not in codes(found)
    found.optimal(6e20 * 10**4.5)
    assert codes(found)["narrow-range"].numbers["distance"] == pytest.approx(4.5)


def test_floor_dominates():
    found = fit(clean())
    found.optimal(1e22)
    assert "floor-dominates" not in codes(found)
    found.optimal(1e26)
    assert codes(found)["floor-dominates"].severity == "note"


def test_published_constants_are_marked_stale():
    found = fit(clean())
    frame = found.published()
    assert frame.loc["E", "Besiroglu 2024"] == 1.8172
    assert frame.loc["mean error here", "this fit"] < 0.01
    assert codes(found)["stale-compare"].numbers["published"] == ["Hoffmann 2022", "Besiroglu 2024"]
