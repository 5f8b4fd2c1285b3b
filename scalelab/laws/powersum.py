"""Sums of powers, L = E + sum_k A_k X_k^-gamma_k: residuals, derivatives and starting points for the solver.

Power law with a floor (one term), Chinchilla (two) and their kin differ in their columns only. Inside, parameters are
theta = (ln E, ln A_1', ..., ln A_K', gamma_1, ..., gamma_K), with A_k' the term's value at the geometric mean of X_k:
centring takes away most of the correlation between a coefficient and its exponent.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from scalelab.laws.regression import Regression
from scalelab.laws.solver import ALONE, eliminate

EXPONENTS = (1e-3, 4.0)  # what a fitted exponent may be
LOG_TERM = (-35.0, 5.0)  # a term at the centre of the data, relative to the geometric mean of the loss
GRID = np.geomspace(0.03, 1.6, 16)  # exponents tried in the search for starts
BLOCKS = 4  # the grid is cut into BLOCKS^K blocks, each of which gives a start
COARSE_GRID = np.geomspace(0.1, 1.0, 8)  # for each bootstrap resample's own second start


class PowerSum(Regression):
    """The regression of ln L on K positive columns.

    `columns` is K arrays of n positive numbers, `loss` n positive numbers. The model in logs is a log-sum-exp, which
    cannot overflow.
    """

    def __init__(self, columns: list[Float[np.ndarray, " n"]], loss: Float[np.ndarray, " n"]):
        logs = [np.log(c) for c in columns]
        self.centres = np.array([x.mean() for x in logs])
        self.x = [x - c for x, c in zip(logs, self.centres, strict=True)]
        self.terms, self.rows = len(columns), len(loss)
        self.data = np.log(loss)
        self.level = self.data.mean()
        coefficients = self.terms + 1
        self.lower = np.array([self.level + LOG_TERM[0]] * coefficients + [EXPONENTS[0]] * self.terms)
        self.upper = np.array([self.level + LOG_TERM[1]] * coefficients + [EXPONENTS[1]] * self.terms)
        # u = (ln E, ln A_k, gamma_k), with ln A_k = ln A_k' + gamma_k centre_k
        self.to_units = np.eye(2 * self.terms + 1)
        for k, centre in enumerate(self.centres):
            self.to_units[1 + k, 1 + self.terms + k] = centre
        one = np.ones(self.rows)
        self._relative = np.zeros((self.terms, 2 * self.terms + 1, self.rows))  # theta -> ln of a term over the floor
        for k, x in enumerate(self.x):
            self._relative[k, 0], self._relative[k, 1 + k], self._relative[k, 1 + self.terms + k] = -one, one, -x
        self._features = {
            (k, l): np.stack([one, self.x[k], self.x[l], self.x[k] * self.x[l]], axis=1)
            for k in range(self.terms)
            for l in range(k + 1)
        }

    # ---------------------------------------------------------------------------------------- parameters

    def natural(self, theta: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        """theta -> (E, A_1, ..., A_K, gamma_1, ..., gamma_K) in the units of the columns.

        A floor under 2e-9 of the mean loss is where the solver gave up going down: it is given as zero.
        """
        K = self.terms
        gamma = theta[..., K + 1 :]
        floor = np.where(theta[..., :1] < self.level - 20, 0.0, np.exp(theta[..., :1]))
        return np.concatenate([floor, np.exp(theta[..., 1 : K + 1] + gamma * self.centres), gamma], axis=-1)

    def internal(self, params):
        K = self.terms
        with np.errstate(divide="ignore"):
            logs = np.log(params[..., : K + 1])
        logs[..., 1:] -= params[..., K + 1 :] * self.centres
        return np.clip(np.concatenate([logs, params[..., K + 1 :]], axis=-1), self.lower, self.upper)

    def model(self, theta):
        return self.shares(theta)[0]

    def shares(self, theta: Float[np.ndarray, "S P"]) -> tuple[Float[np.ndarray, "S n"], list[np.ndarray]]:
        """ln of the model, and each term's share of it (floor first).

        Terms are taken relative to the floor, which the box of theta keeps from overflowing.
        """
        K = self.terms
        p = []
        for k in range(K):
            u = theta @ self._relative[k]
            p.append(np.exp(u, out=u))
        total = 1.0 + p[0]
        for q in p[1:]:
            total += q
        floor = 1.0 / total
        for q in p:
            q *= floor
        model = np.log(total, out=total)
        model += theta[:, :1]
        return model, [floor, *p]

    # ---------------------------------------------------------------------------------------- derivatives

    def evaluate(self, theta, weights, objective, data=None):
        """See `Regression`. With z = ln model and shares p_k: dz = sum_k p_k c_k for log-terms linear in theta,
        d2z = sum_k p_k c_k c_k' - dz dz'; so every entry of the matrices is a sum over rows of a product of shares
        times a monomial in the columns, which one matrix product per pair of terms gives."""
        K = self.terms
        residual, p = self.shares(theta)
        residual -= self.data if data is None else data
        loss, push, bend, robust = objective.rho(residual)
        value = np.vecdot(weights, loss)
        push = weights * push
        bend = weights * bend
        bend -= push
        robust = weights * robust

        S, P = theta.shape
        gradient, hessian, metric = np.empty((S, P)), np.empty((S, P, P)), np.empty((S, P, P))
        gradient[:, 0] = np.vecdot(push, p[0])
        square = p[0] * p[0]
        hessian[:, 0, 0] = np.vecdot(bend, square) + gradient[:, 0]
        metric[:, 0, 0] = np.vecdot(robust, square)
        for k in range(K):
            c, g = 1 + k, 1 + K + k
            own = self._features[k, k]
            pushed = push * p[1 + k]
            first = pushed @ own
            gradient[:, c], gradient[:, g] = first[:, 0], -first[:, 1]
            pair = p[1 + k] * p[0]
            for matrix, weight in ((hessian, bend), (metric, robust)):
                s = (weight * pair) @ own
                matrix[:, 0, c] = matrix[:, c, 0] = s[:, 0]
                matrix[:, 0, g] = matrix[:, g, 0] = -s[:, 1]
            for l in range(k + 1):
                d, h = 1 + l, 1 + K + l
                pair = p[1 + k] * p[1 + l]
                for matrix, weight in ((hessian, bend), (metric, robust)):
                    s = (weight * pair) @ self._features[k, l]
                    if k == l and matrix is hessian:
                        s += first
                    matrix[:, c, d] = matrix[:, d, c] = s[:, 0]
                    matrix[:, g, d] = matrix[:, d, g] = -s[:, 1]
                    matrix[:, c, h] = matrix[:, h, c] = -s[:, 2]
                    matrix[:, g, h] = matrix[:, h, g] = s[:, 3]
        return value, gradient, hessian, metric

    def jacobian(self, theta: Float[np.ndarray, " P"]) -> Float[np.ndarray, "n P"]:
        """d ln(model) / d theta, row by row."""
        _, p = self.shares(theta[None])
        columns = [q[0] for q in p] + [-p[1 + k][0] * self.x[k] for k in range(self.terms)]
        return np.stack(columns, axis=1)

    # ---------------------------------------------------------------------------------------- starting points

    def starts(self, weights, objective, count):
        return self.grid_starts(weights[None], GRID, BLOCKS)[0, :count]

    def cold_starts(self, weights):
        size = max(1, ALONE // (len(COARSE_GRID) * self.rows))
        parts = [self.grid_starts(weights[i : i + size], COARSE_GRID, 1)[:, 0] for i in range(0, len(weights), size)]
        return np.concatenate(parts)

    def grid_starts(
        self, weights: Float[np.ndarray, "R n"], grid: np.ndarray, blocks: int
    ) -> Float[np.ndarray, "R S P"]:
        """Starting points by variable projection (Golub & Pereyra 1973), for every row of weights.

        For fixed exponents the law is linear in E and A_k: relative least squares over the whole grid of exponents
        needs only sums over rows, which are matrix products. The grid is cut into `blocks` per exponent and each
        block's best point is returned, best first, so that the starts are spread and not neighbours.
        """
        K, G, R = self.terms, len(grid), len(weights)
        relative = np.exp(self.level - self.data)
        basis = [np.exp(-grid[:, None] * x) * relative for x in self.x]  # (G, n): X_k^-gamma / L
        index = np.indices((G,) * K).reshape(K, -1)  # (K, G^K)
        shape = (index.shape[1], R)
        gram, right = np.empty((K + 1, K + 1, *shape)), np.empty((K + 1, *shape))
        gram[0, 0], right[0] = np.stack([relative**2, relative]) @ weights.T
        for k in range(K):
            gram[0, k + 1] = gram[k + 1, 0] = ((basis[k] * relative) @ weights.T)[index[k]]
            right[k + 1] = (basis[k] @ weights.T)[index[k]]
            gram[k + 1, k + 1] = (basis[k] ** 2 @ weights.T)[index[k]]
            for l in range(k):
                both = np.stack([(row * basis[l]) @ weights.T for row in basis[k]])  # (G, G, R)
                gram[k + 1, l + 1] = gram[l + 1, k + 1] = both[index[k], index[l]]
        size = np.sqrt(np.einsum("ii...->i...", gram))
        scaled = gram / (size[:, None] * size)
        scaled[np.arange(K + 1), np.arange(K + 1)] += 1e-12
        coefficient = eliminate(scaled, right / size)[0] / size
        # Coefficients are in units of the mean loss; a negative one restarts as a small positive term.
        coefficient = np.fmax(coefficient, 1e-3)
        score = (coefficient * ((gram * coefficient).sum(1) - 2 * right)).sum(0)  # (G^K, R)
        block = (blocks ** np.arange(K)) @ (index * blocks // G)
        best = np.stack([np.where(block[:, None] == b, score, np.inf).argmin(0) for b in range(blocks**K)])
        best = np.take_along_axis(best, np.take_along_axis(score, best, 0).argsort(0), 0)  # (S, R)
        chosen = np.take_along_axis(coefficient, best[None], 1)  # (K + 1, S, R)
        return np.concatenate([np.log(chosen) + self.level, grid[index[:, best]]]).T
