"""Leave-one-out, influence functions and profiles against brute force and textbook formulas."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, sweep
from scipy import stats

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.intervals import curvature, own_coordinate
from scalelab.laws.profiles import Pinned, student_quantile


def table(noise=0.004, seed=0):
    return sweep(np.geomspace(1e18, 1e21, 6), 6, noise, seed)


def power_in_compute():
    return laws.define(
        "power in C",
        lambda p, x: p.E + p.K * (x.flops / 1e19) ** -p.gamma,
        inputs=("flops",),
        objective="log-squares",
        E=laws.positive(0.1, 10, linear=True),
        K=laws.positive(0.01, 10, linear=True),
        gamma=laws.free(0.01, 1),
    )


def test_student_quantiles():
    """Two-sided 95 % and 99 % points of any table of Student's t."""
    for freedom, point in ((1, 12.706), (2, 4.303), (5, 2.571), (11, 2.201), (30, 2.042), (1000, 1.962)):
        assert student_quantile(0.95, freedom) == pytest.approx(point, abs=6e-4)
    assert student_quantile(0.99, 5) == pytest.approx(4.032, abs=1e-3)


@pytest.mark.parametrize("objective", [None, "log-squares", "squares"])
def test_leave_one_out_is_the_fit_without_the_row(objective):
    runs = table()
    fit = laws.fit("chinchilla", runs, bootstrap=0, objective=objective)
    left = fit.leave_one_out()
    assert left.index.equals(runs.index)
    for row in (0, 17, 35):
        alone = laws.fit("chinchilla", runs.drop(row), bootstrap=0, objective=objective)
        np.testing.assert_allclose(left.loc[row], alone.params, rtol=2e-4)


def test_leave_one_cluster_out():
    runs = table().assign(run=lambda t: np.arange(len(t)) // 4)
    fit = laws.fit("chinchilla", runs, bootstrap=0)
    left = fit.leave_one_out("run")
    assert len(left) == 9
    alone = laws.fit("chinchilla", runs[runs.run != 3], bootstrap=0)
    np.testing.assert_allclose(left.iloc[3], alone.params, rtol=2e-4)
    budgets = fit.leave_one_out("budget")
    np.testing.assert_allclose(budgets.index, np.geomspace(1e18, 1e21, 6), rtol=1e-6)
    assert budgets.index.name == "budget left out"
    with pytest.raises(BadInput, match=r"cluster.*team"):
        fit.leave_one_out("team")


def test_leaving_out_what_is_needed_gives_nan():
    """Six rows, two of them in one cluster: four cannot determine five parameters."""
    runs = table().iloc[[0, 5, 13, 20, 30, 35]].assign(run=[0, 0, 1, 2, 3, 4])
    left = laws.fit("chinchilla", runs, bootstrap=0).leave_one_out("run")
    assert left.iloc[0].isna().all()
    assert left.iloc[1:].notna().all().all()


def test_standard_errors_against_many_worlds():
    """Of estimates over 30 draws of the noise; the influence function's median error is within 40 % of it."""
    for objective, within in ((None, 0.4), ("log-squares", 0.3)):
        fits = [laws.fit("chinchilla", table(0.004, seed), bootstrap=0, objective=objective) for seed in range(30)]
        truth = np.std([f.params[["E", "alpha", "beta"]] for f in fits], axis=0)
        claimed = np.median([f.standard_errors[["E", "alpha", "beta"]] for f in fits], axis=0)
        np.testing.assert_allclose(claimed, truth, rtol=within)


def test_standard_errors_of_least_squares_are_the_textbook_s():
    """A law that is linear in its parameters, on values: the HC3 sandwich."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 30)
    runs = pd.DataFrame({"params": x, "loss": 2 + 3 / x + 0.1 * rng.standard_normal(30)})
    line = laws.define(
        "line", lambda p, x: p.a + p.b / x.params, inputs=("params",), objective="squares",
        a=laws.free(-10, 10, linear=True), b=laws.free(-10, 10, linear=True),
    )  # fmt: skip
    fit = line.fit(runs, bootstrap=0)
    X = np.stack([np.ones(30), 1 / x], axis=1)
    inverse = np.linalg.inv(X.T @ X)
    r = fit.resid.to_numpy()
    leverage = np.einsum("ip,pq,iq->i", X, inverse, X)
    hc3 = inverse @ (X.T * (r / (1 - leverage)) ** 2) @ X @ inverse
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(hc3)), rtol=1e-6)


def test_clusters_add_up_before_they_are_squared():
    runs = table().assign(run=lambda t: np.arange(len(t)) // 3)
    fit = laws.fit("chinchilla", runs, bootstrap=0, objective="log-squares")
    shape = curvature(fit)
    sums = np.stack([shape.influence[3 * g : 3 * g + 3].sum(0) for g in range(12)])
    np.testing.assert_allclose(shape.covariance(), sums.T @ sums, rtol=1e-9)
    assert shape.freedom == 12 - 5


@pytest.mark.parametrize("name", ["E", "A", "B", "alpha", "beta"])
@pytest.mark.parametrize("objective", [None, "log-squares"])
def test_profile_is_the_constrained_fit(name, objective):
    fit = laws.fit("chinchilla", table(), bootstrap=0, objective=objective)
    found = fit.profile(name)
    frame = found.table
    assert list(frame.columns[:3]) == [name, "objective", "t"]
    assert found.lower < fit.params[name] < found.upper
    assert (frame.objective >= fit.record["value"] * (1 - 1e-9)).all()
    inside = frame[(frame[name] > found.lower) & (frame[name] < found.upper)]
    for row in inside.iloc[[0, -1]].itertuples():
        value = float(getattr(row, name))
        held = laws.fit("chinchilla", table(), bootstrap=0, objective=objective, fixed={name: value})
        assert row.objective == pytest.approx(held.record["value"], rel=1e-6)
        np.testing.assert_allclose([getattr(row, n) for n in fit.names], held.params, rtol=1e-3)


def test_profile_of_a_linear_law_is_student_s_interval():
    """Least squares with constant noise, one parameter: the classic t interval."""
    rng = np.random.default_rng(1)
    runs = pd.DataFrame({"params": np.geomspace(1, 10, 40), "loss": 5 + 0.1 * rng.standard_normal(40)})
    mean = laws.define("mean", lambda p, x: p.m + 0 * x.params, inputs=("params",), objective="squares",
                       m=laws.free(0, 10, linear=True))  # fmt: skip
    fit = mean.fit(runs, bootstrap=0)
    found = fit.profile("m", level=0.9)
    half = student_quantile(0.9, 39) * runs.loss.std(ddof=1) / np.sqrt(40)
    assert found.upper - fit.params.m == pytest.approx(half, rel=0.05)
    assert fit.params.m - found.lower == pytest.approx(half, rel=0.05)


def test_the_plane_of_a_line_is_the_classic_ellipse():
    """Least squares with constant noise: t2 is the squared distance in the parameters' covariance, everywhere."""
    rng = np.random.default_rng(1)
    x = np.linspace(1, 3, 40)
    runs = pd.DataFrame({"params": x, "loss": 5 + 2 * x + 0.1 * rng.standard_normal(40)})
    straight = laws.define("line", lambda p, x: p.a + p.b * x.params, inputs=("params",), objective="squares",
                           a=laws.free(0, 10, linear=True), b=laws.free(0, 10, linear=True))  # fmt: skip
    fit = straight.fit(runs, bootstrap=0)
    found = fit.plane("a", "b", level=0.9)
    X = np.column_stack([np.ones(40), x])
    variance = ((runs.loss - X @ fit.params) ** 2).sum() / 38
    away = found.table[["a", "b"]].to_numpy() - fit.params.to_numpy()
    expected = np.einsum("ip,pq,iq->i", away, X.T @ X / variance, away)
    np.testing.assert_allclose(found.table.t2, expected, rtol=0.1, atol=1e-6)
    ratio = (found.table.t2 / expected)[expected > 1e-6]
    np.testing.assert_allclose(ratio, ratio.iloc[0], rtol=1e-6)
    assert not found.cut
    assert found.threshold(0.9) == pytest.approx(2 * stats.f.ppf(0.9, 2, 38), rel=1e-9)


def test_the_plane_is_the_constrained_fit():
    fit = laws.fit("chinchilla", table(), bootstrap=200)
    found = fit.plane("alpha", "E")
    inside = found.table[found.table.t2 < found.threshold(0.95)]
    assert len(inside) > 50
    for row in inside.iloc[:: len(inside) // 5].itertuples():
        held = laws.fit("chinchilla", table(), bootstrap=0, fixed={"alpha": row.alpha, "E": row.E})
        assert row.objective == pytest.approx(held.record["value"], rel=1e-6)
    x, y, t2 = found.grid()
    best = np.unravel_index(t2.argmin(), t2.shape)
    assert x[best[1]] == pytest.approx(fit.params.alpha)
    assert y[best[0]] == pytest.approx(fit.params.E)
    outside = [(n, found.table[n].min(), found.table[n].max()) for n in ("alpha", "E")]
    for name, low, high in outside:  # the joint region is wider than either profile
        own = fit.profile(name)
        assert low < own.lower < own.upper < high
        assert inside[name].min() < own.lower * 1.01
    cases = [({"first": "E", "second": "E"}, "another"), ({"first": "E", "second": "F"}, "must be one of")]
    for names, says in cases:
        with pytest.raises(BadInput, match=says):
            fit.plane(**names)
    tied = laws.fit("chinchilla", table(), bootstrap=0, tied={"beta": "alpha"})
    with pytest.raises(BadInput, match="tied"):
        tied.plane("alpha", "beta")


def test_profile_of_fixed_and_tied_parameters():
    fit = laws.fit("chinchilla", table(), bootstrap=100, tied={"beta": "alpha"}, fixed={"E": 1.7})
    alpha, beta = fit.profile("alpha"), fit.profile("beta")
    assert (alpha.lower, alpha.upper) == pytest.approx((beta.lower, beta.upper), rel=1e-9)
    np.testing.assert_allclose(alpha.table.alpha, alpha.table.beta)
    interval = fit.conf_int(method="profile")
    assert interval.loc["E"].tolist() == [1.7, 1.7]
    with pytest.raises(BadInput, match="held fixed"):
        fit.profile("E")
    with pytest.raises(BadInput, match="gamma"):
        fit.profile("gamma")
    with pytest.raises(BadInput, match="level"):
        fit.profile("alpha", level=95)


def test_a_parameter_that_the_data_do_not_bound():
    """One budget and hardly any spread of sizes: E may be anything from zero up."""
    runs = sweep((1e18, 1e19), 6, noise=0.03, spread=2.0)
    found = laws.fit("chinchilla", runs, bootstrap=0, objective="log-squares").profile("E")
    assert found.lower == 0.0
    assert found.upper > 2


def test_pinned_lanes_keep_their_value():
    fit = laws.fit("chinchilla", table(), bootstrap=0)
    problem, theta = fit.solved
    row, constant, pivot = own_coordinate(fit, "A")
    pinned = Pinned(problem, row[None], [pivot])
    free = np.random.default_rng(0).normal(size=(4, 5))
    np.testing.assert_allclose(pinned.theta(free) @ row, free[:, pivot])
    at = theta.copy()
    at[pivot] = row @ theta
    np.testing.assert_allclose(pinned.theta(at[None])[0], theta, rtol=1e-12)
    assert at[pivot] + constant == pytest.approx(np.log(fit.params.A))


def test_conf_int_by_name_of_statsmodels_and_by_profile():
    fit = laws.fit("chinchilla", table(), bootstrap=200)
    pd.testing.assert_frame_equal(fit.conf_int(alpha=0.1), fit.conf_int(0.9))
    by_profile = fit.conf_int(method="profile")
    ratio = (by_profile.upper - by_profile.lower) / (fit.conf_int().upper - fit.conf_int().lower)
    assert ratio.between(0.5, 2).all(), ratio
    with pytest.raises(BadInput, match="method"):
        fit.conf_int(method="guess")


def test_a_law_in_compute_has_all_of_it():
    runs = pd.DataFrame({"flops": np.geomspace(1e18, 1e22, 24)})
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(24))
    runs["loss"] = (1.7 + 1.5 * (runs.flops / 1e19) ** -0.15) * noise
    fit = power_in_compute().fit(runs, bootstrap=100)
    assert fit.leave_one_out().shape == (24, 3)
    truth = {"E": 1.7, "K": 1.5, "gamma": 0.15}
    interval = fit.conf_int(0.99, method="profile")
    for name, value in truth.items():
        assert interval.lower[name] < value < interval.upper[name]
    assert fit.warnings == []
    assert fit.expanding().ok
    assert list(fit.sensitivity().columns[:3]) == ["dropped", "rows", "objective"]
    assert fit.trim_drift().z.max() < 4
    assert fit.calibrate(5).simulations == 5
    assert "flops 1e+18 to 1e+22" in fit.card()["runs"]
    assert np.isfinite(fit.diagnostics["runs test along C"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param(None, marks=pytest.mark.study), "log-squares"])
def test_coverage_of_the_profile(objective):
    hits = []
    for seed in range(150):
        fit = laws.fit("chinchilla", table(0.005, seed), bootstrap=0, objective=objective)
        found = {n: fit.profile(n) for n in TRUTH}
        hits.append([found[n].lower <= TRUTH[n] <= found[n].upper for n in TRUTH])
    coverage = np.mean(hits, axis=0)
    print(dict(zip(TRUTH, coverage.round(3), strict=True)))
    assert (coverage >= 0.92).all(), coverage


@pytest.mark.slow
def test_coverage_of_curve_and_prediction_intervals():
    """New runs at the design's own points and one decade on."""
    curve, runs = [], []
    where = sweep((1e20, 1e22), 3)
    for seed in range(100):
        fit = laws.fit("chinchilla", table(0.005, seed), bootstrap=200)
        frame = fit.get_prediction(where).summary_frame()
        new = where.loss * np.exp(0.005 * np.random.default_rng(1000 + seed).standard_normal(len(where)))
        curve.append((frame.mean_ci_lower <= where.loss) & (where.loss <= frame.mean_ci_upper))
        runs.append((frame.obs_ci_lower <= new) & (new <= frame.obs_ci_upper))
    print(np.mean(curve).round(3), np.mean(runs).round(3))
    assert 0.92 <= np.mean(curve) <= 1
    assert 0.92 <= np.mean(runs) <= 0.99
