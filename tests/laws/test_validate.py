"""Hold-out by compute: what is held out, errors beside baselines, refusals."""

import numpy as np
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.validate import budgets, default_cut


def test_the_largest_budget_is_predicted():
    table = sweep(noise=0.002)
    held = laws.fit("chinchilla", table, bootstrap=100).holdout()
    assert held.ok
    assert (held.fitted, held.held_out) == (12, 6)
    assert held.cut == pytest.approx(1e20)
    assert held.distance == pytest.approx(1)
    assert sorted(held.table.index) == sorted(table.index[table.flops == 1e20])
    assert list(held.errors.index) == ["law", "nearest run", "power law in C"]
    assert held.error < 0.02
    assert held.error < held.errors.mean_abs["nearest run"]
    assert (held.table.lower < held.table.predicted).all()
    assert (held.table.predicted < held.table.upper).all()
    np.testing.assert_allclose(held.table.error, held.table.predicted / held.table.loss - 1)
    assert "1e+20" in held.summary()


def test_the_prediction_has_not_seen_the_held_out_runs():
    table = sweep(noise=0.002)
    other = table.assign(loss=np.where(table.flops == 1e20, table.loss * 2, table.loss))
    a, b = (laws.fit("chinchilla", t, bootstrap=0).holdout() for t in (table, other))
    np.testing.assert_allclose(a.table.predicted, b.table.predicted, rtol=1e-9)
    assert b.error > 0.4


def test_noise_free_prediction_is_exact():
    held = laws.fit("chinchilla", sweep(), bootstrap=0).holdout()
    assert held.error < 1e-7
    assert held.table.lower.isna().all()  # no draws, no band


def test_a_cut_of_one_s_own():
    fit = laws.fit("chinchilla", sweep(np.geomspace(1e17, 1e20, 4), noise=0.002), bootstrap=0)
    held = fit.holdout(cut=5e18)
    assert (held.fitted, held.held_out) == (12, 12)
    assert fit.holdout(cut=5e18) is held
    for cut in (1e17, 1e21):
        with pytest.raises(BadInput, match="cut"):
            fit.holdout(cut=cut)


def test_too_few_runs_to_hold_out_is_said():
    held = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=5), bootstrap=0).holdout()
    assert not held.ok
    assert np.isnan(held.error)
    assert "5 different runs" in held.summary()


def test_budgets_and_cuts():
    flops = np.array([1e18, 1.02e18, 1e19, 0.99e19, 1.01e18, 3e20])
    assert budgets(flops).tolist() == [0, 0, 1, 1, 0, 2]
    assert default_cut(np.repeat([1e17, 1e18, 1e19], 4)) == 1e19
    assert default_cut(np.append(np.repeat(np.geomspace(1e15, 1e19, 5), 6), 1e20)) == 1e19  # one run is no budget
    assert default_cut(np.geomspace(1e17, 1.5e17, 10)) == pytest.approx(np.geomspace(1e17, 1.5e17, 10)[8])
