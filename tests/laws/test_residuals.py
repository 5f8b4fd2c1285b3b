"""What residuals show: trends, runs, dependent rows, unequal spread."""

import numpy as np
from checked import DS, clean, codes, fit, grid
from planted import sweep

from scalelab.laws.residuals import runs_test


def test_residual_trend():
    table = clean(noise=0.001)
    x = np.log(table.tokens / table.params / 20)
    notice = codes(fit(table.assign(loss=table.loss * np.exp(0.002 * x**2))))["residual-trend"]
    assert notice.numbers["t"]["D/N"][1] > 10
    waves = np.cos(2 * np.log(table.params / table.params.median()))
    notice = codes(fit(table.assign(loss=table.loss * np.exp(0.01 * waves))))["residual-trend"]
    assert notice.numbers["runs_z"]["N"] < -4


def test_runs_test():
    assert runs_test(np.repeat([1.0, -1.0], 20)) < -5
    assert runs_test(np.tile([1.0, -1.0], 20)) > 5
    rng = np.random.default_rng(0)
    z = [runs_test(rng.standard_normal(50)) for _ in range(400)]
    assert abs(np.mean(z)) < 0.2
    assert 0.85 < np.std(z) < 1.15


def test_dependent_rows_and_the_cluster_that_mends_it():
    table = grid(np.geomspace(1e7, 1e9, 9), DS, noise=0.0005)
    shared = np.random.default_rng(3).standard_normal(9)
    table["loss"] *= np.exp(0.006 * np.repeat(shared, 5))
    found = fit(table, bootstrap=200)
    notice = codes(found)["dependent-rows"]
    assert notice.numbers["cluster"] == "params"
    assert notice.numbers["correlation"]["params"] > 0.5
    mended = fit(table, bootstrap=200, cluster="params")
    assert "dependent-rows" not in codes(mended)
    assert mended.bse.alpha > 1.2 * found.bse.alpha


def test_heteroscedastic():
    table = sweep(np.geomspace(1e18, 1e21, 9), 9)
    rng = np.random.default_rng(0)
    noise = 0.01 * (table.flops / 1e18) ** -0.3 * rng.standard_normal(len(table))
    notice = codes(fit(table.assign(loss=table.loss * np.exp(noise))))["heteroscedastic"]
    assert notice.numbers["ratio"] > 2 or notice.numbers["ratio"] < 0.5
