"""Exact derivatives against differences, and laws of one's own against the built-in ones."""

import numpy as np
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.jet import Jet
from scalelab.laws.objective import NAMED, Objective
from scalelab.laws.regression import FormRegression, low_discrepancy

X = np.linspace(0.3, 2.0, 7)
FUNCTIONS = {
    "powers": lambda a, b, c: a * X**-b + c**2 + (a + X) ** c + 2.0**c,
    "exponentials": lambda a, b, c: np.exp(-a * X) * np.expm1(b) + np.log1p(c * X),
    "quotients": lambda a, b, c: (1 - a) / (b + X) / c + np.reciprocal(a) - X / b,
    "logs": lambda a, b, c: np.log(a + b * X) + np.log10(c) * np.log2(b) + np.sqrt(a * c),
    "kinks": lambda a, b, c: np.maximum(a * X, b) + np.minimum(c, X) + np.abs(a - X) + np.clip(b * X, 0.4, 1.1),
    "choices": lambda a, b, c: np.where(X > 1, a * b, c) + np.tanh(a - c * X) + np.square(b * X),
    "sums": lambda a, b, c: np.sum(np.exp(-a[..., None] * np.outer(X, X)) * b[..., None], axis=-1) * c,
    "floors": lambda a, b, c: np.logaddexp(a * X, b) - (-c) + (+a),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name):
    f = FUNCTIONS[name]
    theta = np.array([[0.9, 1.3, 0.7], [1.7, 0.45, 1.2]])

    def plain(t):
        return np.broadcast_to(f(*(t[:, i, None] for i in range(3))), (2, 7))

    jet = f(*(Jet.variable(theta[:, i, None], i) for i in range(3)))
    np.testing.assert_allclose(np.broadcast_to(jet.value, (2, 7)), plain(theta), rtol=1e-13)
    h = 1e-4
    for i in range(3):
        e = np.eye(3)[i] * h
        slope = (plain(theta + e) - plain(theta - e)) / (2 * h)
        np.testing.assert_allclose(np.broadcast_to(jet.gradient.get(i, 0.0), (2, 7)), slope, rtol=1e-6, atol=1e-6)
        for j in range(i, 3):
            d = np.eye(3)[j] * h
            bend = (plain(theta + e + d) - plain(theta + e - d) - plain(theta - e + d) + plain(theta - e - d)) / (
                4 * h * h
            )
            np.testing.assert_allclose(
                np.broadcast_to(jet.hessian.get((i, j), 0.0), (2, 7)), bend, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", NAMED)
def test_objectives_are_the_integrals_of_their_slopes(name):
    goal = (
        NAMED[name] if NAMED[name].delta or name == "squares" or "squares" in name else Objective("student", "log", 0.3)
    )
    r = np.array([-2.0, -0.3, -0.01, 4e-4, 0.2, 1.7])
    h = 1e-7
    value, slope, bend, weight = goal.rho(r)
    np.testing.assert_allclose((goal.rho(r + h)[0] - goal.rho(r - h)[0]) / (2 * h), slope, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        (goal.rho(r + h)[1] - goal.rho(r - h)[1]) / (2 * h), bend * np.ones(6), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(weight * r, slope, rtol=1e-12)
    assert (value >= 0).all()


def mine():
    return laws.define(
        "mine",
        lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta,
        inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True),
        A=laws.positive(1, 1e5, linear=True),
        B=laws.positive(1, 1e5, linear=True),
        alpha=laws.free(0.05, 1.5),
        beta=laws.free(0.05, 1.5),
    )


def test_a_law_of_ones_own_is_the_built_in_one(tmp_path):
    table = sweep(np.geomspace(1e17, 1e20, 4), 8, noise=0.004)
    own, built_in = (laws.fit(law, table, bootstrap=60) for law in (mine(), "chinchilla"))
    np.testing.assert_allclose(own.params, built_in.params, rtol=1e-6)
    np.testing.assert_allclose(own.samples, built_in.samples, rtol=1e-4)
    closed, searched = built_in.optimal([1e19, 1e20]), own.optimal([1e19, 1e20])
    np.testing.assert_allclose(searched, closed, rtol=1e-4)
    again = laws.load(own.save(tmp_path / "fit.json"), law=mine())
    assert np.array_equal(again.samples, own.samples)
    assert again.summary() == own.summary()
    with pytest.raises(BadInput, match="law of your own"):
        laws.load(tmp_path / "fit.json")


def test_without_linear_parameters_the_search_still_finds_it():
    law = laws.define(
        "blind",
        lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta,
        inputs=("params", "tokens"),
        E=laws.positive(0.1, 10),
        A=laws.positive(1, 1e5),
        B=laws.positive(1, 1e5),
        alpha=laws.free(0.05, 1.5),
        beta=laws.free(0.05, 1.5),
    )
    table = sweep(np.geomspace(1e17, 1e20, 4), 8, noise=0.004)
    found = law.fit(table, bootstrap=0, starts=16)
    np.testing.assert_allclose(found.params, laws.fit("chinchilla", table, bootstrap=0).params, rtol=1e-5)
    assert found.record["agreeing"] >= 8


def test_fixed_and_tied_parameters():
    table = sweep(np.geomspace(1e17, 1e20, 4), 8, noise=0.004)
    for law in (laws.Chinchilla(), mine()):
        tied = law.fit(table, tied={"beta": "alpha"}, bootstrap=20)
        assert tied.params.alpha == pytest.approx(tied.params.beta, rel=1e-12)
        fixed = law.fit(table, fixed={"E": 1.7, "A": 400.0}, bootstrap=20)
        assert pytest.approx(1.7, rel=1e-12) == fixed.params.E
        assert pytest.approx(400.0, rel=1e-9) == fixed.params.A
        assert fixed.record["value"] >= law.fit(table, bootstrap=0).record["value"]
        assert fixed.bse.alpha < law.fit(table, bootstrap=20).bse.alpha
    with pytest.raises(BadInput, match="fixed"):
        mine().fit(table, fixed={"gamma": 1.0})
    with pytest.raises(BadInput, match=r"fixed\[alpha\].*-1"):
        laws.fit("chinchilla", table, fixed={"alpha": -1.0})
    with pytest.raises(BadInput, match=r"tied\[beta\]"):
        laws.fit("chinchilla", table, tied={"beta": "E"})


def test_starts_fill_the_box():
    points = low_discrepancy(1024, 5)
    for axis in points.T:
        assert np.abs(np.histogram(axis, 8, (0, 1))[0] - 128).max() <= 8


def test_a_formula_that_forgets_its_parameters_is_named():
    law = laws.define("flat", lambda p, x: 2.0 + 0 * x.params, inputs=("params",), alpha=laws.free(0, 1))
    with pytest.raises(BadInput, match="does not depend"):
        law.fit(sweep())


def test_problem_of_a_form_on_values():
    table = sweep(noise=0.004)
    columns = {name: table[name].to_numpy() for name in ("params", "tokens", "loss")}
    problem = FormRegression(mine(), columns, "value")
    theta = problem.internal(np.array([[1.7, 400.0, 1200.0, 0.34, 0.37]]))
    goal = NAMED["squares"]
    value, gradient, hessian, _ = problem.evaluate(theta, np.ones((1, len(table))), goal)
    for j in range(5):
        step = np.eye(5)[[j]] * 1e-5
        up, down = (problem.evaluate(theta + s * step, np.ones((1, len(table))), goal) for s in (1, -1))
        np.testing.assert_allclose((up[0] - down[0]) / 2e-5, gradient[:, j], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose((up[1] - down[1]) / 2e-5, hessian[:, :, j], rtol=1e-5, atol=1e-8)
    assert value[0] > 0
