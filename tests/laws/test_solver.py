"""The solver against other means: derivatives by differences, optima by scipy."""

import numpy as np
import pytest
from planted import sweep
from scipy.optimize import minimize

from scalelab.laws.objective import HUBER
from scalelab.laws.powersum import GRID, PowerSum
from scalelab.laws.solver import minimise


def problem(seed=0, noise=0.01):
    table = sweep(noise=noise, seed=seed)
    return PowerSum([table.params.to_numpy(), table.tokens.to_numpy()], table.loss.to_numpy())


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_derivatives(terms):
    rng = np.random.default_rng(terms)
    p = PowerSum(list(np.exp(rng.normal(size=(terms, 20)))), np.exp(rng.normal(size=20) * 0.3))
    theta = rng.normal(size=(3, 2 * terms + 1)) * 0.5
    theta[:, terms + 1 :] = np.abs(theta[:, terms + 1 :])
    weights = rng.random((3, 20))
    wide = HUBER.widened(100)
    value, gradient, hessian, metric = p.evaluate(theta, weights, wide)
    assert (np.linalg.eigvalsh(metric) > -1e-12).all()
    for j in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, j] = 1e-6
        up, down = p.evaluate(theta + step, weights, wide), p.evaluate(theta - step, weights, wide)
        np.testing.assert_allclose((up[0] - down[0]) / 2e-6, gradient[:, j], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose((up[1] - down[1]) / 2e-6, hessian[:, :, j], rtol=1e-4, atol=1e-7)
    assert value.shape == (3,)
    for i in range(3):
        jacobian = p.jacobian(theta[i])
        slope = wide.rho(p.model(theta[i : i + 1])[0] - p.data)[1]
        np.testing.assert_allclose(jacobian.T @ (weights[i] * slope), gradient[i], rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_optimum_against_scipy(seed):
    p, n = problem(seed), 18
    starts = p.grid_starts(np.ones((1, n)), GRID, 4)[0, :8]
    ours = minimise(p, starts, np.ones(n), HUBER)

    def scaled(theta):
        value, gradient, *_ = p.evaluate(theta[None], np.ones((1, n)), HUBER)
        return 1e6 * value[0], 1e6 * gradient[0]

    theirs = min(minimize(scaled, s, jac=True, method="BFGS", options={"gtol": 1e-9}).fun for s in starts) / 1e6
    assert ours.converged.any()
    assert ours.value[ours.converged].min() <= theirs * (1 + 1e-9)


def test_lanes_are_independent():
    """A lane's answer does not depend on its company, up to rounding."""
    p = problem()
    starts = p.grid_starts(np.ones((1, 18)), GRID, 4)[0, :6]
    weights = np.random.default_rng(0).integers(1, 4, size=(6, 18)).astype(float)
    together = minimise(p, starts, weights, HUBER)
    for i in range(6):
        alone = minimise(p, starts[i], weights[i], HUBER)
        np.testing.assert_allclose(alone.value[0], together.value[i], rtol=1e-9)


def test_stopping_is_free_of_scale():
    p = problem()
    starts = p.grid_starts(np.ones((1, 18)), GRID, 4)[0, :1]
    a = minimise(p, starts, np.ones(18), HUBER)
    b = minimise(p, starts, np.full(18, 1e-9), HUBER)
    np.testing.assert_allclose(a.theta, b.theta, rtol=1e-7)
    np.testing.assert_allclose(b.value, a.value * 1e-9, rtol=1e-9)


def test_a_floor_of_zero_neither_crashes_nor_loops():
    table = sweep(truth={"E": 1e-12, "A": 400.0, "B": 1200.0, "alpha": 0.34, "beta": 0.37}, noise=0.01)
    p = PowerSum([table.params.to_numpy(), table.tokens.to_numpy()], table.loss.to_numpy() - 0.05)
    starts = p.grid_starts(np.ones((1, 18)), GRID, 4)[0, :4]
    found = minimise(p, starts, np.ones(18), HUBER)
    assert found.converged.all()
    assert np.isfinite(found.value).all()
    assert np.exp(found.theta[:, 0]).max() < 0.05
