"""The solver against other means: derivatives by differences, optima by scipy."""

import numpy as np
import pytest
from planted import sweep
from scipy.optimize import minimize

from scalelab.laws import solver
from scalelab.laws.objective import HUBER
from scalelab.laws.powersum import GRID, PowerSum
from scalelab.laws.regression import Problem
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


def test_lanes_take_the_places_of_those_that_left(monkeypatch):
    """More lanes than fit at once, among them one whose start is void: each comes back in its own place."""
    p = problem()
    starts = np.repeat(p.grid_starts(np.ones((1, 18)), GRID, 4)[0, :5], 4, axis=0)
    weights = np.random.default_rng(0).integers(1, 4, size=(20, 18)).astype(float)
    weights[7] = np.nan
    ticks = []
    whole = minimise(p, starts, weights, HUBER, tick=ticks.append)
    assert sum(ticks) == 20
    monkeypatch.setattr(solver, "LANE_ELEMENTS", 3 * 18)
    few = minimise(p, starts, weights, HUBER)
    for found in (whole, few):
        assert np.flatnonzero(~found.converged).tolist() == [7]
        assert np.array_equal(found.theta[7], starts[7])
        assert np.isinf(found.value[7])
    np.testing.assert_allclose(few.value, whole.value, rtol=1e-9)
    assert (np.abs(few.iterations - whole.iterations) <= 2).all()


def test_data_of_each_lane():
    p = problem()
    start = p.grid_starts(np.ones((1, 18)), GRID, 4)[0, :1]
    truth = p.model(minimise(p, start, np.ones(18), HUBER).theta)[0]
    data = truth + np.array([[0.0], [0.1], [-0.2]])
    found = minimise(p, np.repeat(start, 3, axis=0), np.ones(18), HUBER, data=data)
    assert found.converged.all()
    np.testing.assert_allclose(p.model(found.theta), data, atol=1e-7)


def test_a_race_lets_go_of_what_crawls_above_the_best():
    p = problem(noise=0.02)
    starts = p.starts(np.ones(18), HUBER, 8)
    free, race = (minimise(p, starts, np.ones(18), HUBER, race=r) for r in (False, True))
    assert race.value.min() == pytest.approx(free.value.min(), rel=1e-9)
    assert race.iterations.sum() <= free.iterations.sum()


class Sheared(Problem):
    """Another problem in coordinates phi, theta = shear @ phi: a coefficient far from the centre of its column."""

    def __init__(self, base, shear):
        self.base, self.shear, self.rows, self.data = base, shear, base.rows, base.data
        self.lower, self.upper = np.full(len(shear), -np.inf), np.full(len(shear), np.inf)

    def evaluate(self, theta, weights, objective, data=None):
        value, gradient, *matrices = self.base.evaluate(theta @ self.shear.T, weights, objective, data)
        return value, gradient @ self.shear, *(self.shear.T @ m @ self.shear for m in matrices)


def test_coordinates_hardly_matter():
    """ln A at N = 1 instead of at the mean of ln N ties it to alpha at a correlation of 0.999: as many iterations."""
    p = problem()
    shear = np.eye(5)
    shear[1, 3], shear[2, 4] = -20.0, -22.0
    sheared = Sheared(p, shear)
    theta = p.starts(np.ones(18), HUBER, 8)
    straight = minimise(p, theta, np.ones(18), HUBER)
    found = minimise(sheared, theta @ np.linalg.inv(shear).T, np.ones(18), HUBER)
    assert found.converged.all()
    np.testing.assert_allclose(found.value, straight.value, rtol=1e-9)
    assert np.median(found.iterations) <= 2 * np.median(straight.iterations)


def test_elimination():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 4, 50))
    a = a + a.transpose(1, 0, 2) + np.linspace(0, 8, 50) * np.eye(4)[:, :, None]
    b = rng.normal(size=(4, 50))
    x, pivots = solver.eliminate(a.copy(), b.copy())
    np.testing.assert_allclose(np.einsum("ijs,js->is", a, x), b, atol=1e-8)
    definite = np.linalg.eigvalsh(a.transpose(2, 0, 1)).min(1) > 0
    assert ((pivots > 0).all(0) == definite).all()
    assert 0 < definite.sum() < 50
