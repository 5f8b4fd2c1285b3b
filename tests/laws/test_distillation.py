"""Distillation, transfer and the M4 law: planted truth, limits, derivatives through the solution."""

import itertools
import types

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.laws.forms import M4, Distillation
from scalelab.laws.forms.distillation import solve_logit
from scalelab.laws.jet import Jet

TRUTH = {
    "c0": 2.5, "c1": 3.0, "d1": 1.3, "f1": 0.1, "A": 2243.0, "B": 24181.0, "alpha": 0.32, "beta": 0.41, "gamma": 0.75,
}  # fmt: skip
CURVE = {"E": 1.5, "L0": 9.0, "alpha": 0.7, "B": 50.0, "c": 0.3}


def supervised(N, D):
    return 1.2 + (2e3 / N**0.41 + 6e3 / D**0.43) ** 0.6


def students(noise=0.0, seed=0):
    levels = [np.geomspace(1.5e8, 8e9, 5), np.geomspace(4e9, 5e11, 5), np.geomspace(1e8, 8e9, 4)]
    table = pd.DataFrame(list(itertools.product(*levels)), columns=["params", "tokens", "teacher"])
    table["supervised_loss"] = supervised(table.params, table.tokens)
    table["teacher_loss"] = supervised(table.teacher, 20 * table.teacher)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(table)))
    return table.assign(loss=Distillation().predict(TRUTH, table) * scatter)


def test_distillation_recovers_planted_truth():
    table = students()
    fit = laws.fit("distillation", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(TRUTH.values()), rtol=1e-6)
    assert fit.ok, fit.warnings


def test_distillation_under_noise():
    fit = laws.fit("distillation", students(noise=0.002), bootstrap=60)
    assert fit.converged
    interval, truth = fit.conf_int(0.999), pd.Series(TRUTH)
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    assert np.abs(fit.fittedvalues / Distillation().predict(TRUTH, students()) - 1).max() < 0.004


def test_distillation_limits():
    law = Distillation()
    at = {"params": [1e9], "tokens": [1e11], "supervised_loss": [2.2]}
    p = pd.Series(TRUTH)
    left = (p.A / 1e9**p.alpha + p.B / 1e11**p.beta) ** p.gamma

    def above(teacher):
        return law.predict(TRUTH, at | {"teacher_loss": [teacher]})[0] - teacher

    plain = 1.9**-p.c0 * (1 + (1.9 / (2.2 * p.d1)) ** (1 / p.f1)) ** (-p.c1 * p.f1) * left
    assert above(1.9) == pytest.approx(plain, rel=1e-12)
    assert above(0.5) == pytest.approx(0.5**-p.c0 * left, rel=1e-3)  # a teacher far beyond: the first branch
    far = 20.0**-p.c0 * (20.0 / (2.2 * p.d1)) ** -p.c1 * left
    assert above(20.0) == pytest.approx(far, rel=1e-3)  # a teacher far behind: the second
    endless = law.predict(TRUTH, {"params": [1e60], "tokens": [1e60], "supervised_loss": [1.2], "teacher_loss": [1.9]})
    assert endless[0] == pytest.approx(1.9, rel=1e-6)  # with size and data without end the student is its teacher


def test_coefficients_follow_units():
    table = students(noise=0.002)
    plain = laws.fit("distillation", table, bootstrap=0)
    other = laws.fit("distillation", table.assign(params=table.params / 1e9, tokens=table.tokens / 1e9), bootstrap=0)
    same = ["c0", "c1", "d1", "f1", "alpha", "beta", "gamma"]
    np.testing.assert_allclose(other.params[same], plain.params[same], rtol=1e-5)
    np.testing.assert_allclose(other.params.A, plain.params.A / 1e9**plain.params.alpha, rtol=1e-4)


@pytest.mark.parametrize("fixed", [{"A": 2243.0}, {"alpha": 0.32, "B": 24181.0}])
def test_held_coefficients_are_held(fixed):
    fit = laws.fit("distillation", students(), fixed=fixed, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(TRUTH.values()), rtol=1e-5)


def test_transfer():
    truth = {"k": 350.0, "alpha": 0.2, "beta": 0.4}
    tokens, params = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e8, 5), np.geomspace(1e6, 1e9, 4)))
    exact = 350.0 * tokens**0.2 * params**0.4
    table = pd.DataFrame({"tokens": tokens, "params": params, "transferred": exact})
    fit = laws.fit("transfer", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(truth.values()), rtol=1e-9)
    assert fit.ok
    noisy = table.assign(transferred=exact * np.exp(0.1 * np.random.default_rng(0).standard_normal(len(table))))
    fit = laws.fit("transfer", noisy, bootstrap=200)
    design = np.stack([np.ones(len(tokens)), np.log(tokens), np.log(params)], axis=1)
    solved = np.linalg.lstsq(design, np.log(noisy.transferred))[0]
    np.testing.assert_allclose(fit.params, [np.exp(solved[0]), *solved[1:]], rtol=1e-7)
    interval, values = fit.conf_int(0.99), list(truth.values())
    assert ((interval.lower <= values) & (values <= interval.upper)).all()


# ------------------------------------------------------------------------------------------------ M4


@pytest.mark.parametrize("alpha", [0.05, 0.7, 1.0, 3.0])
def test_m4_solves_its_equation(alpha):
    x = np.geomspace(1e-6, 1e25, 400)
    p = pd.Series(CURVE | {"alpha": alpha})
    loss = M4().predict(p, {"tokens": x})
    assert ((loss >= p.E) & (loss <= p.L0)).all()
    assert (np.diff(loss) <= 0).all()
    inside = (loss > p.E * (1 + 1e-6)) & (loss < p.L0 * (1 - 1e-6))
    left = (loss - p.E) / (p.L0 - loss) ** alpha
    np.testing.assert_allclose(left[inside], (p.B * x**-p.c)[inside], rtol=1e-8)
    assert inside.sum() > 50
    assert loss.iloc[-1] - p.E == pytest.approx(p.B * x[-1] ** -p.c * (p.L0 - p.E) ** alpha, rel=1e-3)  # a power law


def test_m4_derivatives_pass_through_the_solution():
    law, x = M4(), types.SimpleNamespace(tokens=np.geomspace(1e2, 1e10, 9))
    theta = np.array([list(CURVE.values())])

    def at(values):
        return law.formula(types.SimpleNamespace(**{n: values[:, i, None] for i, n in enumerate(CURVE)}), x)

    jets = [Jet.variable(theta[:, i, None], i) for i in range(5)]
    jet = law.formula(types.SimpleNamespace(**dict(zip(CURVE, jets, strict=True))), x)
    np.testing.assert_allclose(jet.value, at(theta), rtol=1e-14)
    for i in range(5):
        e = np.eye(5)[i] * 1e-4 * theta
        slope = (at(theta + e) - at(theta - e)) / (2 * e[0, i])
        np.testing.assert_allclose(jet.gradient[i], slope, rtol=1e-6, atol=1e-9)
        for j in range(i, 5):
            d = np.eye(5)[j] * 1e-4 * theta
            cross = at(theta + e + d) - at(theta + e - d) - at(theta - e + d) + at(theta - e - d)
            bend = cross / (4 * e[0, i] * d[0, j])
            np.testing.assert_allclose(jet.hessian[i, j], bend, rtol=1e-4, atol=1e-5 * np.abs(bend).max())


def test_solve_logit_is_the_logit_where_alpha_is_1():
    goal = np.linspace(-700, 700, 29)
    np.testing.assert_allclose(solve_logit(goal, 1.0), goal, rtol=1e-12, atol=1e-12)


def test_m4_recovers_planted_truth():
    table = pd.DataFrame({"tokens": np.geomspace(1e2, 1e10, 25)})
    loss = M4().predict(CURVE, table)
    fit = laws.fit("m4", table.assign(loss=loss), bootstrap=0)
    np.testing.assert_allclose(fit.params, list(CURVE.values()), rtol=1e-7)
    assert fit.ok
    noisy = table.assign(loss=loss * np.exp(0.003 * np.random.default_rng(1).standard_normal(25)))
    fit = laws.fit("m4", noisy, fixed={"L0": 9.0}, bootstrap=60)
    interval, truth = fit.conf_int(0.99), pd.Series(CURVE)
    free = ["E", "alpha", "B", "c"]
    assert ((interval.lower[free] <= truth[free]) & (truth[free] <= interval.upper[free])).all(), interval


def test_m4_of_an_error_rate_in_any_unit_of_data():
    truth = {"E": 0.05, "L0": 0.9, "alpha": 1.3, "B": 300.0, "c": 0.5}
    table = pd.DataFrame({"tokens": np.geomspace(1e3, 1e7, 20)})
    table["loss"] = M4().predict(truth, table)
    fit = laws.fit("m4", table.assign(tokens=table.tokens / 1e3), bootstrap=0)
    np.testing.assert_allclose(fit.params, [0.05, 0.9, 1.3, 300 / 1e3**0.5, 0.5], rtol=1e-6)
