"""The solver: batched damped Newton for robust regressions, in float64.

A `Regression` knows its residuals; the solver knows nothing of laws. Lanes (starting points, bootstrap resamples) run
in lockstep along the first axis, with the rows' weights per lane: a resample is a vector of row counts. Lanes that
are done leave the batch.

The damping metric is the diagonal of the iteratively reweighted Gauss-Newton matrix, so that no step, bound or stopping
rule depends on the scale of the objective, on units, or on whether the rows' losses are summed or averaged.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from scalelab.laws.objective import Objective
from scalelab.laws.regression import Regression

# Relative to the objective: the most that the quadratic model of a converged lane still promises to gain.
TOLERANCE = 1e-13
# A residual this small, relative to the data, is rounding: the objective of a perfect fit is never asked to fall below.
ROUNDING = 1e-14
LANE_ELEMENTS = 1 << 14  # lanes x rows that are worked on at once: the arrays stay in the second-level cache


@dataclasses.dataclass(frozen=True)
class Solution:
    theta: Float[np.ndarray, "S P"]
    value: Float[np.ndarray, " S"]
    converged: Bool[np.ndarray, " S"]
    iterations: Int[np.ndarray, " S"]


def minimise(
    problem: Regression,
    theta: Float[np.ndarray, "S P"],
    weights: Float[np.ndarray, "S n"] | Float[np.ndarray, " n"],
    objective: Objective,
    *,
    data: Float[np.ndarray, "S n"] | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 300,
) -> Solution:
    """Each lane's local minimum of sum_i w_i rho(r_i(theta)), from its own start.

    `data` gives lanes targets of their own, on the objective's scale (wild and parametric bootstraps).

    A lane has converged when its quadratic model promises less than `tolerance` times the objective. Lanes that do
    not get there in `max_iterations` come back as they are, with `converged` False.
    """
    theta = np.clip(np.array(theta, dtype=np.float64, ndmin=2), problem.lower, problem.upper)
    weights = np.broadcast_to(np.asarray(weights, dtype=np.float64), (len(theta), problem.rows))
    lanes = max(1, LANE_ELEMENTS // max(1, problem.rows))
    parts = [
        _newton(
            problem,
            theta[i : i + lanes],
            weights[i : i + lanes],
            objective,
            None if data is None else data[i : i + lanes],
            tolerance,
            max_iterations,
        )
        for i in range(0, len(theta), lanes)
    ]
    return Solution(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Solution)))


def _newton(problem: Regression, theta, weights, objective, data, tolerance, max_iterations) -> Solution:
    size = len(theta)
    out = Solution(theta.copy(), np.full(size, np.inf), np.zeros(size, bool), np.zeros(size, int))
    lane = np.arange(size)  # where each working lane reports to
    value, gradient, hessian, metric = problem.evaluate(theta, weights, objective, data)
    damping = np.full(size, 1e-3)
    smallest = 0.5 * (ROUNDING * max(1.0, float(np.abs(problem.data).max()))) ** 2
    for iteration in range(max_iterations + 1):
        step, promise = _step(problem, theta, gradient, hessian, metric, damping)
        floor = smallest * weights.sum(axis=1)
        done = promise <= tolerance * (value + floor) + floor
        done &= np.isfinite(value)
        stuck = (damping > 1e15) | ~np.isfinite(value)
        if iteration == max_iterations:
            stuck[:] = True
        leaving = done | stuck
        if leaving.any():
            out.theta[lane[leaving]] = theta[leaving]
            out.value[lane[leaving]] = value[leaving]
            out.converged[lane[leaving]] = done[leaving]
            out.iterations[lane[leaving]] = iteration
            if leaving.all():
                break
            stay = ~leaving
            lane, theta, weights, value, gradient, hessian, metric, damping, step = (
                a[stay] for a in (lane, theta, weights, value, gradient, hessian, metric, damping, step)
            )
            data = None if data is None else data[stay]
        trial = np.clip(theta + step, problem.lower, problem.upper)
        step = trial - theta
        predicted = -((gradient * step).sum(-1) + 0.5 * np.einsum("si,sij,sj->s", step, hessian, step))
        new = problem.evaluate(trial, weights, objective, data)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = (value - new[0]) / predicted
        good = (new[0] < value) & (predicted > 0)
        # Gain ratio near 1: the model is right, trust it further; small: shorten the step (Levenberg, Marquardt).
        damping = np.where(good & (gain > 0.75), damping * 0.2, np.where(good & (gain > 0.2), damping, damping * 4))
        damping = np.maximum(damping, 1e-12)
        theta = np.where(good[:, None], trial, theta)
        value, gradient, hessian, metric = (
            np.where(good.reshape(-1, *(1,) * (old.ndim - 1)), fresh, old)
            for fresh, old in zip(new, (value, gradient, hessian, metric), strict=True)
        )
    return out


def _step(problem, theta, gradient, hessian, metric, damping):
    """The damped Newton step, and what the undamped one promises: half the squared Newton decrement.

    Eigenvalues enter by magnitude, so that the step goes downhill where the objective curves the other way.
    Parameters that sit on a bound and are pushed against it are held.
    """
    held = ((theta <= problem.lower) & (gradient > 0)) | ((theta >= problem.upper) & (gradient < 0))
    scale = 1.0 / np.sqrt(np.maximum(metric, 1e-300))
    slope = np.where(held, 0.0, gradient * scale)
    scaled = hessian * scale[:, :, None] * scale[:, None, :]
    scaled = np.where(held[:, :, None] | held[:, None, :], 0.0, scaled)
    scaled[:, np.arange(theta.shape[1]), np.arange(theta.shape[1])] += held
    curvature, basis = np.linalg.eigh(scaled)
    curvature = np.maximum(np.abs(curvature), 1e-12)
    along = np.einsum("sij,si->sj", basis, slope)
    promise = 0.5 * (along**2 / curvature).sum(-1)
    step = -scale * np.einsum("sij,sj->si", basis, along / (curvature + damping[:, None]))
    longest = np.abs(step).max(axis=-1, keepdims=True)
    return step * np.minimum(1.0, 1.0 / np.maximum(longest, 1e-300)), promise
