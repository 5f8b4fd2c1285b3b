"""Objectives, weights, units, fixed and tied parameters: what is minimised, for built-in and user-defined laws."""

import numpy as np
import pytest
from planted import TRUTH, sweep
from scipy.optimize import least_squares

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.objective import NAMED
from scalelab.laws.parameter import Parameter
from scalelab.laws.powersum import PowerSum
from scalelab.laws.regression import Constrained, FormRegression

LINEAR = {"E": laws.positive(0.1, 10, linear=True), "alpha": laws.free(0.05, 1.5), "beta": laws.free(0.05, 1.5)}


def mine(scale=1.0):
    """Chinchilla's law by a user, its coefficients sought around `scale`."""
    return laws.define(
        "mine",
        lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta,
        inputs=("params", "tokens"),
        A=laws.positive(scale, 1e5 * scale, linear=True),
        B=laws.positive(scale, 1e5 * scale, linear=True),
        **LINEAR,
    )


TABLE = sweep(np.geomspace(1e17, 1e20, 4), 10, noise=0.01, seed=5)
LAWS = {"built-in": laws.Chinchilla, "user": mine}


@pytest.mark.parametrize("objective", NAMED)
@pytest.mark.parametrize("law", LAWS)
def test_sum_or_mean_is_the_same(law, objective):
    delta = "auto" if objective == "student" else None
    fits = [
        LAWS[law]().fit(TABLE, objective=objective, delta=delta, bootstrap=20, weights=np.full(len(TABLE), w))
        for w in (1.0, 1 / len(TABLE), 1e6)
    ]
    for other in fits[1:]:
        assert other.converged
        np.testing.assert_allclose(other.params, fits[0].params, rtol=1e-6)
        np.testing.assert_allclose(other.samples, fits[0].samples, rtol=1e-4)


@pytest.mark.parametrize("objective", ["huber", "log-squares", "squares"])
def test_units_and_row_order_do_not_matter_to_a_law_of_ones_own(objective):
    reference = mine().fit(TABLE, objective=objective, bootstrap=20)
    shuffled = mine().fit(TABLE.sample(frac=1, random_state=2), objective=objective, bootstrap=20)
    np.testing.assert_allclose(shuffled.params, reference.params, rtol=1e-6)
    np.testing.assert_allclose(shuffled.samples, reference.samples, rtol=1e-4)
    units = TABLE.assign(params=TABLE.params / 1e6, tokens=TABLE.tokens / 1e9)
    scaled = mine(1e-3).fit(units, objective=objective, bootstrap=20)
    same = ["E", "alpha", "beta"]
    np.testing.assert_allclose(scaled.params[same], reference.params[same], rtol=1e-6)
    np.testing.assert_allclose(scaled.params.A * 1e6**scaled.params.alpha, reference.params.A, rtol=1e-5)
    np.testing.assert_allclose(scaled.draws[same], reference.draws[same], rtol=1e-4)


@pytest.mark.parametrize("objective", ["log-squares", "squares"])
def test_squares_against_scipy(objective):
    log = objective == "log-squares"

    def residual(p):
        model = p[0] + np.exp(p[1]) * TABLE.params ** -p[3] + np.exp(p[2]) * TABLE.tokens ** -p[4]
        return np.log(model) - np.log(TABLE.loss) if log else model - TABLE.loss

    truth = [TRUTH["E"], np.log(TRUTH["A"]), np.log(TRUTH["B"]), TRUTH["alpha"], TRUTH["beta"]]
    theirs = least_squares(residual, truth, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    for law in LAWS.values():
        fit = law().fit(TABLE, objective=objective, bootstrap=0)
        assert fit.record["value"] <= theirs.cost * (1 + 1e-9)
        np.testing.assert_allclose(fit.params[["E", "alpha", "beta"]], theirs.x[[0, 3, 4]], rtol=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_delta_from_the_data(law):
    """1.345 (Huber) or 1 (Student-t) robust scales of the residuals, here of normal noise of 1 %."""
    table = sweep(np.geomspace(1e17, 1e20, 12), 12, noise=0.01)
    for objective, factor in (("huber", 1.345), ("student", 1.0)):
        fit = LAWS[law]().fit(table, objective=objective, delta="auto", bootstrap=30)
        assert fit.record["delta"] == pytest.approx(factor * 0.01, rel=0.2)
        assert f"{fit.record['delta']:g}" in fit.record["objective"]
        assert fit.options.objective.delta == fit.record["delta"]  # draws and refits keep it
        plain = LAWS[law]().fit(table, objective=objective, delta=fit.record["delta"], bootstrap=30)
        np.testing.assert_allclose(fit.params, plain.params, rtol=1e-6)
        np.testing.assert_allclose(fit.samples, plain.samples, rtol=1e-4)


def test_delta_from_the_data_follows_the_unit_of_the_loss():
    a, b = (
        mine().fit(
            TABLE.assign(loss=TABLE.loss * c), objective=laws.Objective("huber", "value"), delta="auto", bootstrap=0
        )
        for c in (1.0, 0.5)
    )
    assert b.record["delta"] == pytest.approx(0.5 * a.record["delta"], rel=1e-4)
    np.testing.assert_allclose(b.params[["alpha", "beta"]], a.params[["alpha", "beta"]], rtol=1e-4)


def test_a_robust_objective_shrugs_off_a_diverged_run():
    table = TABLE.copy()
    table.loc[7, "loss"] = 50.0
    for objective, delta, robust in (
        ("huber", None, True), ("huber", "auto", True), ("student", "auto", True), ("log-squares", None, False)
    ):  # fmt: skip
        clean, hit = (
            laws.fit("chinchilla", t, objective=objective, delta=delta, bootstrap=0).predict(TABLE)
            for t in (TABLE, table)
        )
        assert ((hit / clean - 1).abs().max() < 0.01) == robust


def test_lower_edge_lies_under_the_runs():
    edge, middle = (laws.fit("chinchilla", TABLE, objective=o, bootstrap=0) for o in ("lower-edge", "huber"))
    assert 0.35 < (middle.resid > 0).mean() < 0.65
    assert (edge.resid > 0).mean() > 0.8


def test_bad_objectives():
    for options, message in (
        ({"objective": "l1"}, "objective.*'l1'"), ({"delta": -1}, "delta"), ({"delta": "wide"}, "'auto'"),
        ({"delta": np.nan}, "delta"), ({"objective": "student", "method": "jackknife"}, "method"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            laws.fit("chinchilla", TABLE, **options)
    with pytest.raises(BadInput, match="must be 'log' or 'value'"):
        laws.Objective("huber", "ln")


# ------------------------------------------------------------------------------------------------ fixed and tied


def problems():
    columns = {name: TABLE[name].to_numpy() for name in ("params", "tokens", "loss")}
    yield laws.Chinchilla(), PowerSum([columns["params"], columns["tokens"]], columns["loss"])
    yield mine(), FormRegression(mine(), columns, "log")


@pytest.mark.parametrize("which", [0, 1])
def test_derivatives_under_constraints(which):
    law, base = list(problems())[which]
    specs: list[Parameter] = list(law.parameters.values())
    problem = Constrained(base, list(law.parameters), specs, {"E": 1.7}, {"beta": "alpha"})
    full = base.internal(np.array([[TRUTH[name] for name in law.parameters]]))
    theta = full[:, problem.keep] + 0.01
    weights, goal = np.ones((1, len(TABLE))), NAMED["huber"].widened(30)
    value, gradient, hessian, metric = problem.evaluate(theta, weights, goal)
    assert metric.shape == hessian.shape == (1, 3, 3)
    assert (np.linalg.eigvalsh(metric) >= 0).all()
    for j in range(3):
        step = np.eye(3)[[j]] * 1e-6
        up, down = (problem.evaluate(theta + s * step, weights, goal) for s in (1, -1))
        np.testing.assert_allclose((up[0] - down[0]) / 2e-6, gradient[:, j], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose((up[1] - down[1]) / 2e-6, hessian[:, :, j], rtol=1e-4, atol=1e-6)
    assert value > 0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", ["pairs", "wild", "parametric"])
def test_draws_keep_what_is_held(law, method):
    fit = LAWS[law]().fit(TABLE, fixed={"E": 1.7}, tied={"beta": "alpha"}, bootstrap=40, method=method)
    assert fit.record["free"] == 3
    np.testing.assert_allclose(fit.draws.E, 1.7, rtol=1e-12)
    np.testing.assert_allclose(fit.draws.beta, fit.draws.alpha, rtol=1e-9)
    assert fit.draws.alpha.std() > 0
    np.testing.assert_allclose(fit.bse.E, 0.0, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_holding_a_parameter_where_it_lies_changes_nothing(law):
    free = LAWS[law]().fit(TABLE, bootstrap=0)
    held = LAWS[law]().fit(TABLE, fixed={"alpha": free.params.alpha}, bootstrap=0)
    np.testing.assert_allclose(held.params, free.params, rtol=1e-4)
    assert held.record["value"] == pytest.approx(free.record["value"], rel=1e-9)
