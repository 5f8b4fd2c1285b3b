"""Compute-optimal allocation: golden values, the numeric optimum against the closed form, no invented optimum."""

import numpy as np
import pytest
from planted import TRUTH, best_size, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import allocate

BESIROGLU = np.array([[1.8172, 482.01, 2085.43, 0.3478, 0.3658]])
HOFFMANN_PRINTED = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])


def test_golden_values():
    """Direct evaluations of published constants."""
    N, D, L = allocate.optimum(BESIROGLU, np.array([1e21, 5.76e23]), 6.0)
    np.testing.assert_allclose(N[0], [2.77846e9, 7.22487e10], rtol=1e-4)
    np.testing.assert_allclose(D[0], [5.99853e10, 1.32874e12], rtol=1e-4)
    np.testing.assert_allclose(L[0, 0], 2.30553, rtol=1e-4)
    N, D, _ = allocate.optimum(HOFFMANN_PRINTED, np.array([5.76e23]), 6.0)
    np.testing.assert_allclose([N[0, 0], D[0, 0] / N[0, 0]], [3.21899e10, 92.647], rtol=1e-4)


def test_exponents():
    a, b, gamma = allocate.exponents(BESIROGLU)[0]
    assert a == pytest.approx(0.5126, abs=1e-4)
    assert a + b == pytest.approx(1)
    assert gamma == pytest.approx(0.3478 * 0.3658 / (0.3478 + 0.3658))


def test_a_function_as_cost_agrees_with_the_closed_form():
    budgets = np.array([1e18, 1e20, 1e23])
    for exact, found in zip(
        allocate.optimum(BESIROGLU, budgets, 6.0), allocate.optimum(BESIROGLU, budgets, lambda N: 6 * N), strict=True
    ):
        np.testing.assert_allclose(found, exact, rtol=1e-7)


def test_a_general_cost_against_brute_force():
    def cost(N):
        return 6 * N + 3e4 * N ** (2 / 3)

    N, D, loss = allocate.optimum(BESIROGLU, np.array([1e19]), cost)
    n = np.geomspace(N[0, 0] / 10, N[0, 0] * 10, 200001)
    E, A, B, alpha, beta = BESIROGLU[0]
    every = E + A / n**alpha + B / (1e19 / cost(n)) ** beta
    assert n[every.argmin()] == pytest.approx(N[0, 0], rel=1e-3)
    assert loss[0, 0] <= every.min() * (1 + 1e-12)
    assert D[0, 0] * cost(N)[0, 0] == pytest.approx(1e19)


def test_no_interior_optimum_is_said_and_not_invented():
    fit = laws.fit("chinchilla", sweep(noise=0.002), bootstrap=20)
    best = fit.optimal(1e19, lambda N: np.full(N.shape, 1e10))  # size is free: the larger the better
    assert np.isnan(best.params)
    assert np.isnan(best.params_lower)
    assert "no-interior-optimum" in [n.code for n in fit.warnings]


def test_optimal_of_a_fit():
    table = sweep(noise=0.003)
    fit = laws.fit("chinchilla", table, bootstrap=200)
    frame = fit.optimal([1e18, 1e20])
    assert list(frame.columns) == ["flops"] + [
        f"{n}{end}" for n in ("params", "tokens", "loss") for end in ("", "_lower", "_upper")
    ]
    for row in frame.itertuples():
        assert row.params_lower < row.params < row.params_upper
        assert row.tokens_lower < row.tokens < row.tokens_upper
        assert row.loss_lower < row.loss < row.loss_upper
        assert row.params_lower < best_size(row.flops) < row.params_upper
    one = fit.optimal(1e18)
    assert one.params == frame.params[0]
    assert one.params_upper == frame.params_upper[0]
    np.testing.assert_allclose(fit.optimal(1e18, 8.0).params, fit.optimal(6 / 8 * 1e18).params)
    a = fit.allocation().loc["a"]
    assert a.lower < TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]) < a.upper
    assert fit.optimal(1e18, laws.flops_per_token(table.params, table.tokens, table.flops)).params == pytest.approx(
        one.params, rel=1e-6
    )


@pytest.mark.parametrize("bad", [0.0, -1e18, np.nan, [[1e18]]])
def test_bad_budgets(bad):
    fit = laws.fit("chinchilla", sweep(), bootstrap=0)
    with pytest.raises(BadInput, match="C ="):
        fit.optimal(bad)


def test_bad_costs():
    fit = laws.fit("chinchilla", sweep(), bootstrap=0)
    with pytest.raises(BadInput, match="flops_per_param_token"):
        fit.optimal(1e18, 0.0)
    with pytest.raises(BadInput, match="flops_per_param_token"):
        fit.optimal(1e18, lambda N: -N)


def test_flops_per_token_of_a_family():
    N = np.geomspace(1e5, 1e8, 12)

    def true(n):
        return 6 * n + 200 * n ** (2 / 3)

    cost = laws.flops_per_token(N, np.full(12, 1e9), 1e9 * true(N))
    inside = np.geomspace(1e5, 1e8, 50)
    np.testing.assert_allclose(cost(inside), true(inside), rtol=0.01)
    np.testing.assert_allclose(cost(np.array([1e9])), true(1e9), rtol=0.15)
    exact = laws.flops_per_token(N, np.full(12, 1e9), 6e9 * N)
    np.testing.assert_allclose(exact(np.array([1e3, 1e7, 1e12])), [6e3, 6e7, 6e12], rtol=1e-9)
    single = laws.flops_per_token(N[:1], np.array([1e9]), 6e9 * N[:1])
    np.testing.assert_allclose(single(np.array([1e6])), 6e6, rtol=1e-9)
