"""Shared-parameter fits: planted arms, the test of sharing, extrapolated differences, arms as fits."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, law, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.jet import Jet
from scalelab.laws.joint import Joint
from scalelab.laws.objective import LOG_SQUARES, SQUARES
from scalelab.laws.shared import SharedFit, _alike, fit_shared

OTHER = {**TRUTH, "A": 330.0, "alpha": 0.33}  # E, B and beta in common
BUDGETS = np.geomspace(1e18, 1e20, 5)


def arms(noise=0.0, seed=0, other=OTHER, sizes=5, budgets=BUDGETS):
    return {
        "base": sweep(budgets, sizes, noise, 2 * seed),
        "new": sweep(budgets, sizes, noise, 2 * seed + 1, truth=other),
    }


@pytest.mark.parametrize("shared", [("E", "B", "beta"), ("E",), ("E", "A", "B", "beta"), ()])
def test_planted_parameters_are_recovered(shared):
    other = {**OTHER, "A": TRUTH["A"]} if "A" in shared else OTHER
    fit = fit_shared(arms(other=other), shared=shared, bootstrap=0)
    assert fit.converged
    assert fit.record["free"] == 10 - len(shared)
    for arm, truth in (("base", TRUTH), ("new", other)):
        np.testing.assert_allclose(fit.arm(arm).params, list(truth.values()), rtol=1e-5)


def test_nothing_shared_is_every_arm_by_itself():
    tables = arms(0.004)
    fit = fit_shared(tables, shared=(), bootstrap=0)
    alone = {name: laws.fit("chinchilla", table, bootstrap=0) for name, table in tables.items()}
    for name, one in alone.items():
        np.testing.assert_allclose(fit.arm(name).params, one.params, rtol=1e-6)
    assert fit.record["value"] == pytest.approx(sum(f.record["value"] for f in alone.values()), rel=1e-9)


def test_any_law_any_objective_any_number_of_arms():
    mine = laws.define(
        "mine", lambda p, x: p.E + p.A * x.tokens**-p.beta, inputs=("tokens",), E=laws.positive(0.1, 10, linear=True),
        A=laws.positive(1, 1e5, linear=True), beta=laws.free(0.05, 1.5), objective=SQUARES,
    )  # fmt: skip
    D = np.geomspace(1e8, 1e11, 9)
    tables = {name: {"tokens": D, "loss": 1.8 + A * D**-0.3} for name, A in (("c", 300.0), ("a", 500.0), ("b", 800.0))}
    fit = fit_shared(tables, mine, ("E", "beta"), bootstrap=0)
    assert fit.arms == ("a", "b", "c")
    for name, A in (("a", 500.0), ("b", 800.0), ("c", 300.0)):
        np.testing.assert_allclose(fit.arm(name).params, [1.8, A, 0.3], rtol=1e-5)


def test_fixed_and_tied_hold_within_every_arm():
    tables = arms(0.004)
    fit = fit_shared(tables, shared=("E", "B"), bootstrap=0, fixed={"E": 1.7}, tied={"beta": "alpha"})
    for name in fit.arms:
        p = fit.arm(name).params
        assert p["E"] == 1.7
        assert p["alpha"] == pytest.approx(p["beta"], rel=1e-9)
    assert fit.arm("base").params["B"] == pytest.approx(fit.arm("new").params["B"], rel=1e-9)
    assert fit.record["free"] == 2 + 1 + 2
    with_shared_tie = fit_shared(tables, shared=("alpha",), bootstrap=0, tied={"beta": "alpha"})
    exponents = {with_shared_tie.arm(n).params[p] for n in fit.arms for p in ("alpha", "beta")}
    assert max(exponents) - min(exponents) < 1e-9


def test_derivatives_of_the_joint_problem():
    joint = Joint(laws.Chinchilla(), ["b", "a"])
    tables = arms(0.004)
    frame = pd.concat([t.assign(arm=k) for k, t in enumerate(tables.values())])
    columns = {c: frame[c].to_numpy(float) for c in ("arm", "params", "tokens", "loss")}
    problem = joint.problem(columns, "log")
    theta = problem.internal(np.array([[*TRUTH.values(), *OTHER.values()]]))
    weights = np.linspace(0.5, 2, len(frame))[None]
    _, gradient, hessian, _ = problem.evaluate(theta, weights, LOG_SQUARES)
    step = 1e-5
    for i in range(10):
        e = step * np.eye(10)[[i]]
        ends = [problem.evaluate(theta + s * e, weights, LOG_SQUARES) for s in (1, -1)]
        assert (ends[0][0] - ends[1][0]) / (2 * step) == pytest.approx(gradient[:, i], rel=1e-5, abs=1e-9)
        np.testing.assert_allclose((ends[0][1] - ends[1][1]) / (2 * step), hessian[:, i], rtol=1e-5, atol=1e-7)
        slope = (problem.model(theta + e) - problem.model(theta - e))[0] / (2 * step)
        np.testing.assert_allclose(problem.jacobian(theta[0])[:, i], slope, rtol=1e-6, atol=1e-9)
    params = problem.natural(theta)
    np.testing.assert_allclose(np.log(joint.evaluate(params, columns)), problem.model(theta), rtol=1e-12)


def test_extrapolated_differences_gain_from_sharing():
    """Two arms of 15 runs up to 3e19 predict the loss difference at 1e22: sharing what is shared gains a factor."""
    budgets = np.geomspace(1e18, 3e19, 3)
    other = {**TRUTH, "A": 370.0}
    at = np.array([1e22])

    def best(params):
        return laws.Chinchilla().optimum(np.asarray(params, float)[None], at, 6.0)[2][0, 0]

    truth = best(list(other.values())) - best(list(TRUTH.values()))
    errors = {shared: [] for shared in ((), ("E", "B", "beta"), ("E", "B", "alpha", "beta"))}
    for seed in range(12):
        tables = arms(0.004, seed, other, 5, budgets)
        for shared, found in errors.items():
            fit = fit_shared(tables, shared=shared, bootstrap=0)
            found.append(best(fit.arm("new").params) - best(fit.arm("base").params) - truth)
    rms = {shared: np.sqrt(np.mean(np.square(found))) for shared, found in errors.items()}
    assert rms[("E", "B", "beta")] < rms[()] / 2
    assert rms[("E", "B", "alpha", "beta")] < rms[()] / 8


def test_the_interval_of_a_shared_parameter_narrows():
    tables = arms(0.004, seed=3)
    alone = laws.fit("chinchilla", tables["base"], bootstrap=300).conf_int().loc["E"]
    shared = fit_shared(tables, bootstrap=300).arm("base").conf_int().loc["E"]
    assert shared.upper - shared.lower < 0.9 * (alone.upper - alone.lower)
    assert shared.lower < TRUTH["E"] < shared.upper


def test_sharing_what_differs_is_rejected_and_said():
    differs = {**TRUTH, "E": 1.76, "A": 330.0}
    fit = fit_shared(arms(0.004, other=differs), shared=("E", "B", "beta", "alpha"), bootstrap=0)
    test = fit.sharing(draws=199)
    assert test.p_value <= 0.01
    assert test.constraints == 4
    rejected = [n for n in fit.warnings if n.code == "sharing-rejected"]
    assert rejected
    assert rejected[0].numbers["p_value"] < 0.05
    assert "p = 0.00" in fit.summary()


def test_sharing_what_is_shared_passes():
    fit = fit_shared(arms(0.004, seed=1), bootstrap=0)
    assert fit.sharing().p_value > 0.05
    assert "sharing-rejected" not in {n.code for n in fit.warnings}
    same = fit.sharing()
    assert same is fit.sharing()
    exact = fit_shared(arms(0.0), bootstrap=0)
    assert exact.sharing(draws=99).p_value > 0.01  # rounding is no evidence


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param("huber", marks=pytest.mark.study), "log-squares"])
@pytest.mark.parametrize("noise", ["normal", pytest.param("t3", marks=pytest.mark.study)])
def test_false_alarms_of_the_sharing_test(objective, noise):
    """Planted nulls, 15 runs an arm: the nominal 5 % test rejects at most 5 % + 2.5 binomial errors."""
    worlds, alarms = 100, 0
    tables = arms(sizes=3)
    for seed in range(worlds):
        rng = np.random.default_rng(seed)
        drawn = {}
        for name, table in tables.items():
            e = rng.standard_normal(len(table)) if noise == "normal" else rng.standard_t(3, len(table)) / np.sqrt(3)
            drawn[name] = table.assign(loss=table["loss"] * np.exp(0.005 * e))
        alarms += fit_shared(drawn, bootstrap=0, objective=objective).sharing(draws=99).p_value <= 0.05
    assert alarms <= worlds * 0.05 + 2.5 * np.sqrt(worlds * 0.05 * 0.95)


def test_noise_under_sharing_is_like_the_residuals():
    """Planted row and cluster variances come back from residuals that a fit has taken its share of."""
    rng = np.random.default_rng(0)
    n, J = 120, rng.standard_normal((120, 10))
    M = np.eye(n) - J @ np.linalg.pinv(J)
    table = sweep(np.geomspace(1e18, 1e20, 10), 12).assign(run=np.repeat(np.arange(30), 4))
    rows = laws.fit("chinchilla", table, bootstrap=0).rows
    found = []
    for _ in range(30):
        noise = 0.5 * rng.standard_normal(n) + 1.5 * np.repeat(rng.standard_normal(30), 4)
        (drawn,) = _alike(M @ noise, J, rows, 400, 0)
        within = drawn.reshape(400, 30, 4)
        found.append([within.var(axis=2, ddof=1).mean(), np.mean(within[:, :, 0] * within[:, :, 1])])
    np.testing.assert_allclose(np.mean(found, axis=0), [0.25, 2.25], rtol=0.15)


@pytest.mark.slow
def test_clusters_do_not_raise_false_alarms():
    """Four checkpoints a run whose noise is the run's: a test that took rows as independent would reject often."""
    worlds, alarms = 60, 0
    for seed in range(worlds):
        rng = np.random.default_rng(seed)
        drawn = {}
        for name, truth in (("base", TRUTH), ("new", OTHER)):
            runs = sweep(BUDGETS, 3, truth=truth)
            parts = [runs.assign(tokens=runs["tokens"] * s, run=np.arange(15)) for s in (0.4, 0.6, 0.8, 1.0)]
            noise = 0.005 * rng.standard_normal(15)
            drawn[name] = pd.concat(
                [p.assign(loss=law(p["params"], p["tokens"], truth) * np.exp(noise)) for p in parts], ignore_index=True
            ).drop(columns=["id", "flops"])
        alarms += fit_shared(drawn, bootstrap=0, objective="log-squares").sharing(draws=99).p_value <= 0.05
    assert alarms <= worlds * 0.05 + 2.5 * np.sqrt(worlds * 0.05 * 0.95)


def test_an_arm_is_a_fit():
    tables = arms(0.004)
    fit = fit_shared(tables, bootstrap=100)
    arm = fit.arm("new")
    np.testing.assert_allclose(arm.predict(tables["new"]), arm.fittedvalues)
    best = arm.optimal(1e20)
    assert best["loss_lower"] < best["loss"] < best["loss_upper"]
    assert arm.nobs == 25
    assert list(arm.draws.columns) == list(TRUTH)
    assert "E" in arm.summary()
    assert arm.holdout() is fit.holdout()
    assert fit.holdout().ok
    with pytest.raises(BadInput, match="with the others"):
        arm.refit()
    with pytest.raises(BadInput, match="every arm has its own"):
        fit.optimal(1e20)
    table = tables["new"].assign(arm="new")
    np.testing.assert_allclose(fit.predict(table), arm.fittedvalues)
    text = fit.summary()
    assert "shared by all arms: E, B, beta" in text
    assert text.count("\n       E ") == 1
    assert isinstance(fit.refit(), SharedFit)


def test_an_arm_has_the_findings_of_its_form(monkeypatch):
    found = laws.Notice("odd-arm", "warning", "odd.", "look.")
    monkeypatch.setattr(laws.Chinchilla, "findings", lambda self, fit: [found] if fit.params["A"] < 365 else [])
    fit = fit_shared(arms(0.0), bootstrap=0)
    assert [n.code for n in fit.arm("new").warnings].count("odd-arm") == 1
    assert "odd-arm" not in {n.code for n in fit.arm("base").warnings}


def test_pairs_are_drawn_together(tmp_path):
    """Noise that both arms' runs have in common leaves the difference of their parameters."""
    rng = np.random.default_rng(5)
    common = np.exp(0.01 * rng.standard_normal(25))
    tables = arms()
    for name, table in tables.items():
        noise = common * np.exp(0.002 * rng.standard_normal(25))
        tables[name] = table.assign(loss=table["loss"] * noise, pair_id=np.arange(25))
    widths = {}
    for pair in (None, "pair_id"):
        fit = fit_shared(tables, shared=("alpha", "beta"), pair=pair, bootstrap=300)
        gap = np.log(fit.draws["A[new]"] / fit.draws["A[base]"])
        widths[pair] = gap.quantile(0.975) - gap.quantile(0.025)
    assert widths["pair_id"] < 0.6 * widths[None]
    path = fit.save(tmp_path / "shared.json")
    again = laws.load(path)
    assert isinstance(again, SharedFit)
    assert again.record["pair"] == "pair_id"
    pd.testing.assert_frame_equal(again.draws, fit.draws)
    assert again.arm("new").optimal(1e20).equals(fit.arm("new").optimal(1e20))
    assert again.summary() == fit.summary()
    part = fit.arm("new").save(tmp_path / "arm.json")
    assert laws.load(part).params.equals(fit.arm("new").params)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"shared": ("gamma",)}, "shared"),
        ({"fixed": {"gamma": 1.0}}, "fixed"),
        ({"pair": "nothing"}, "pair"),
        ({"pair": "loss"}, "pair"),  # no value in both arms
        ({"cluster": "nothing"}, "cluster"),
        ({"law": "chinchila"}, "law"),
    ],
)
def test_bad_input(arguments, field):
    with pytest.raises(BadInput) as error:
        fit_shared(arms(0.004), bootstrap=0, **arguments)
    assert error.value.field == field


def test_more_bad_input():
    tables = arms(0.004)
    with pytest.raises(BadInput, match="two arms"):
        fit_shared({"a": tables["base"]}, bootstrap=0)
    with pytest.raises(BadInput, match="nothing to fit"):
        fit_shared({"a": tables["base"], "b": tables["new"].iloc[:0]}, bootstrap=0)
    with pytest.raises(BadInput, match="nothing to test"):
        fit_shared(tables, shared=(), bootstrap=0).sharing()
    with pytest.raises(BadInput, match="one of base, new"):
        fit_shared(tables, bootstrap=0).arm("old")


def test_formulas_take_a_parameter_vector_per_row():
    """`evaluate_each`, which searches for optima use, against one vector at a time."""
    form = laws.Chinchilla()
    params = np.array([[*TRUTH.values()], [*OTHER.values()]])
    columns = {"params": np.array([1e8, 3e9]), "tokens": np.array([2e9, 5e10])}
    each = form.evaluate_each(params, columns)
    np.testing.assert_allclose(each, np.diag(form.evaluate(params, columns)), rtol=1e-14)
    assert not isinstance(each, Jet)
