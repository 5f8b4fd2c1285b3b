"""Coverage on the user's own design: what is simulated, what is counted, and that the intervals hold."""

import numpy as np
import pytest
from planted import TRUTH, law, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.calibrate import simulated

DESIGNS = {16: (4, 4), 36: (6, 6), 100: (10, 10)}


def fit(runs, noise=0.005, seed=0, **options):
    budgets, sizes = DESIGNS[runs]
    table = sweep(np.geomspace(1e18, 1e21, budgets), sizes, noise, seed)
    return laws.fit("chinchilla", table, **({"bootstrap": 100} | options))


def test_the_simulated_noise_is_the_fit_s():
    found = fit(100)
    rng = np.random.default_rng(0)
    draws = np.stack([simulated(found, rng) for _ in range(200)])
    noise = np.log(draws) - np.log(found.fittedvalues.to_numpy())
    sd = np.sqrt((found.resid - found.resid.mean()).pow(2).sum() / 95)
    assert noise.std() == pytest.approx(sd, rel=0.02)
    assert abs(noise.mean()) < 0.1 * sd
    assert np.abs(np.corrcoef(noise[:, :8].T) - np.eye(8)).max() < 0.3


def test_simulated_clusters_share_their_noise():
    table = sweep(np.geomspace(1e18, 1e21, 6), 6, 0.001).assign(run=lambda t: np.arange(36) // 3)
    table["loss"] *= np.exp(0.01 * np.repeat(np.random.default_rng(0).standard_normal(12), 3))
    found = laws.fit("chinchilla", table, bootstrap=0)
    rng = np.random.default_rng(0)
    noise = np.stack([np.log(simulated(found, rng) / found.fittedvalues.to_numpy()) for _ in range(300)])
    within, across = np.corrcoef(noise[:, 0], noise[:, 1])[0, 1], np.corrcoef(noise[:, 0], noise[:, 3])[0, 1]
    assert within > 0.5
    assert abs(across) < 0.2


def test_calibration_counts_and_repeats():
    found = fit(36)
    a, b = found.calibrate(12, seed=3), found.calibrate(12, seed=3)
    assert a.table.equals(b.table)
    assert list(a.table.index) == [*found.names, "loss"]
    assert a.table.coverage.between(0.5, 1).all()
    np.testing.assert_allclose(a.table.truth[list(found.names)], found.params)
    best = found.optimal(1e22)
    assert a.table.truth["loss"] == pytest.approx(best.loss, rel=1e-9)
    assert a.table.coverage["alpha"] * 12 == pytest.approx(round(a.table.coverage["alpha"] * 12))
    assert "95 %" in a.summary()
    narrow = found.calibrate(12, level=0.5, seed=3)
    assert (narrow.table.width < a.table.width).all()
    assert narrow.table.coverage.mean() < a.table.coverage.mean()


def test_fixed_parameters_have_no_coverage():
    found = fit(16, fixed={"E": 1.7})
    assert "E" not in found.calibrate(3).table.index


def test_bad_arguments():
    found = fit(16, bootstrap=0)
    for bad in (0, -3, 2.5):
        with pytest.raises(BadInput, match="n ="):
            found.calibrate(bad)
    with pytest.raises(BadInput, match="level"):
        found.calibrate(2, level=95)


@pytest.mark.slow
@pytest.mark.parametrize("runs", DESIGNS)
def test_planted_worlds_are_covered(runs):
    """100 planted worlds: the 95 % interval of every parameter, and of the loss at 70B on 1.4T tokens, holds the truth
    in 92 to 100 % of them, up to the binomial error of 100 trials at that edge (one in forty)."""
    far = {"params": [7e10], "tokens": [1.4e12]}
    held = []
    for seed in range(100):
        found = fit(runs, seed=seed, bootstrap=200)
        assert found.ok
        interval = found.conf_int()
        lower, upper = found.interval(found.predict_draws(far))
        inside = [interval.lower[n] <= TRUTH[n] <= interval.upper[n] for n in TRUTH]
        held.append([*inside, lower[0] <= law(7e10, 1.4e12) <= upper[0]])
    coverage = dict(zip([*TRUTH, "loss"], np.mean(held, axis=0), strict=True))
    print(runs, coverage)
    assert min(coverage.values()) >= 0.92 - 0.05, coverage
    assert np.mean(list(coverage.values())) >= 0.92, coverage


@pytest.mark.slow
def test_calibrate_agrees_with_planted_worlds():
    found = fit(36, bootstrap=200).calibrate(100)
    assert found.ok, found.summary()
    assert (found.table.coverage >= 0.9).all(), found.summary()
