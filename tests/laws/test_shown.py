"""What a notebook shows of a result."""

import numpy as np
import pandas as pd
import pytest
from planted import sweep

from scalelab import laws
from scalelab.laws.shown import Notices, percent, pre


@pytest.fixture(scope="module")
def fit():
    table = sweep(noise=0.003, sizes=9)
    table.loc[3, "loss"] *= 1.3
    return laws.fit("chinchilla", table, bootstrap=60)


def test_findings_read_one_a_line_worst_first(fit):
    assert fit.warnings == list(fit.warnings)  # a list, to whoever goes through it
    lines = str(fit.warnings).split("\n")
    assert lines == [str(notice) for notice in fit.warnings]
    assert any("outlier-row" in line or "diverged-run" in line for line in lines)
    assert [n.severity for n in fit.warnings] == sorted((n.severity for n in fit.warnings), reverse=True)
    assert str(Notices()) == "no warnings"
    assert "no warnings" in Notices()._repr_html_()


def test_results_are_shown_by_their_text(fit):
    ranking = laws.rank(sweep(noise=0.003), ["chinchilla", "kaplan"])
    plan = laws.plan(fit, budget=1e20, target=1e21, n=50)
    for result in (fit, fit.holdout(), fit.expanding(), fit.calibrate(5), ranking, plan):
        assert result._repr_html_() == pre(result.summary())
        assert len(result.summary()) > 50
    assert "pre-wrap" in pre("")
    assert pre("a < b & c") == '<pre style="white-space: pre-wrap">a &lt; b &amp; c</pre>'
    assert "nan" not in ranking.summary().lower()


def test_errors_beyond_all_bounds_stay_legible():
    assert percent(0.01234) == "1.23%"
    assert percent(-0.5) == "-50.00%"
    assert percent(np.inf) == percent(1e40) == "over 1000%"


def test_a_law_that_runs_away_is_said_so_in_words():
    """Farseer's nine constants, fitted to four sizes near each other and asked about far larger ones."""
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 2e8, 4), np.geomspace(1e9, 4e9, 5)))
    far = pd.DataFrame({"params": np.geomspace(1e10, 1e12, 8), "tokens": np.geomspace(1e11, 1e13, 8)})
    design = pd.concat([pd.DataFrame({"params": N, "tokens": D}), far])
    table = laws.simulate("farseer", design.reset_index(drop=True), noise=0.02, params="Li 2025", seed=0)
    held = laws.fit("farseer", table, bootstrap=0).holdout(1e21)
    assert held.error > 10
    assert "mean error over 1000%" in held.summary()
