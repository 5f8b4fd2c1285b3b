"""The solver: batched damped Newton for robust regressions, in float64.

A `Problem` knows its objective; the solver knows nothing of laws. Lanes (starting points, bootstrap resamples) run
in lockstep along the first axis, with the rows' weights per lane: a resample is a vector of row counts. Lanes that
are done leave the batch.

Steps are damped in the metric of the iteratively reweighted Gauss-Newton matrix, so that neither they nor the stopping
rule depend on the scale of the objective, on units, on whether the rows' losses are summed or averaged, or on how
strongly a coefficient and its exponent hang together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from scalelab.laws.objective import Objective
from scalelab.laws.regression import Problem

# Relative to the objective: the most that the quadratic model of a converged lane still promises to gain.
TOLERANCE = 1e-14
# A residual this small, relative to the data, is rounding: the objective of a perfect fit is never asked to fall below.
ROUNDING = 1e-14
DAMPING = 0.3  # at the start, relative to the metric
HOPE = 100.0  # a lane gains at most so many times what its quadratic model promises
SOFT = 1e-4  # keeps the metric, scaled to a unit diagonal, from being singular
ALONE = 1 << 18  # multiply-adds up to which BLAS does not wake its threads, which here wait longer than they work
LANE_ELEMENTS = 3 << 14  # lanes x rows that are worked on at once: the arrays stay in the second-level cache

# The C library hands freed arrays back to the kernel and fetches them anew, page by page, which costs as much as the
# arithmetic on them; after one large array (untouched, so free of cost) has gone, it keeps up to twice as much.
_large = np.empty(1 << 21)
del _large


@dataclasses.dataclass(frozen=True)
class Solution:
    theta: Float[np.ndarray, "S P"]
    value: Float[np.ndarray, " S"]
    converged: Bool[np.ndarray, " S"]
    iterations: Int[np.ndarray, " S"]


def minimise(
    problem: Problem,
    theta: Float[np.ndarray, "S P"],
    weights: Float[np.ndarray, "S n"] | Float[np.ndarray, " n"],
    objective: Objective,
    *,
    data: Float[np.ndarray, "S n"] | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 1000,
    race: bool = False,
    tick: Callable[[int], None] | None = None,
) -> Solution:
    """Each lane's local minimum of sum_i w_i rho(r_i(theta)), from its own start.

    `data` gives lanes targets of their own, on the objective's scale (wild and parametric bootstraps).

    A lane has converged when its quadratic model promises less than `tolerance` times the objective. Lanes that do
    not get there in `max_iterations` come back as they are, with `converged` False. In a `race`, where lanes are starts
    for one optimum, those that crawl above the best are let go as soon as half of all have converged.
    `tick` is told how many lanes were finished, each time that some are.
    """
    theta = np.clip(np.array(theta, dtype=np.float64, ndmin=2), problem.lower, problem.upper)
    weights = np.broadcast_to(np.asarray(weights, dtype=np.float64), (len(theta), problem.rows))
    return _newton(problem, theta, weights, objective, data, tolerance, max_iterations, race, tick)


def _newton(
    problem: Problem, start: np.ndarray, weights: np.ndarray, objective: Objective, data: Any, tolerance: float,
    max_iterations: int, race: bool, tick: Callable[[int], None] | None,
) -> Solution:  # fmt: skip
    size, P = start.shape
    out = Solution(start.copy(), np.full(size, np.inf), np.zeros(size, bool), np.zeros(size, int))
    smallest = 0.5 * (ROUNDING * max(1.0, float(np.abs(problem.data).max()))) ** 2
    room = min(size, max(1, LANE_ELEMENTS // max(1, problem.rows * problem.load)))
    lane: Any = np.arange(room)  # the lane that each place works on; the next lanes take the places of those that leave
    following = room
    w = weights[lane]
    d: Any = None if data is None else data[lane]
    floor = smallest * w.sum(axis=1)
    theta, trial = start[lane], start[lane]
    value, gradient = np.full(room, np.inf), np.zeros((room, P))
    hessian, metric = np.zeros((room, P, P)), np.zeros((room, P, P))
    damping, predicted, age = np.full(room, DAMPING), np.full(room, np.inf), np.zeros(room, int)
    while len(lane):
        new = problem.evaluate(trial, w, objective, d)
        good = (new[0] < value) & (predicted > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(good, (value - new[0]) / predicted, 0.0)
        # Gain ratio near 1: the model is right, trust it further; small: shorten the step (Levenberg, Marquardt).
        damping = np.maximum(damping * np.where(gain > 0.75, 0.2, np.where(gain > 0.2, 1.0, 4.0)), 1e-12)
        damping[age == 0] = DAMPING
        if good.all():
            theta, (value, gradient, hessian, metric) = trial, new
        else:
            at = np.flatnonzero(good)
            for old, fresh in zip((theta, value, gradient, hessian, metric), (trial, *new), strict=True):
                old[at] = fresh[at]
        step, promise = _step(problem, theta, gradient, hessian, metric, damping)
        # Where rounding refuses every step the damping grows, and the bar with it.
        done = (promise <= tolerance * np.clip(damping, 1.0, 1e3) * (value + floor) + floor) & (value < np.inf)
        leaving = done | (damping > 1e15) | ~(value < np.inf) | (age >= max_iterations)
        if race and 2 * (np.count_nonzero(out.converged) + np.count_nonzero(done)) >= size:
            best = min(value[done].min(initial=np.inf), out.value[out.converged].min(initial=np.inf))
            leaving |= value - HOPE * promise > best
        age += 1
        trial = np.clip(theta + step, problem.lower, problem.upper)
        step = trial - theta
        predicted = -np.vecdot(step, gradient + 0.5 * (hessian @ step[:, :, None])[:, :, 0])
        if not leaving.any():
            continue
        places = np.flatnonzero(leaving)
        left = lane[places]
        out.theta[left], out.value[left], out.converged[left] = theta[places], value[places], done[places]
        out.iterations[left] = age[places] - 1
        if tick is not None:
            tick(len(left))
        fresh = np.arange(following, min(following + len(places), size))
        following += len(fresh)
        filled = places[: len(fresh)]
        if len(fresh):
            lane[filled], w[filled] = fresh, weights[fresh]
            theta[filled] = trial[filled] = start[fresh]
            if data is not None:
                d[filled] = data[fresh]
            floor[filled] = smallest * w[filled].sum(axis=1)
            value[filled], predicted[filled], damping[filled], age[filled] = np.inf, np.inf, DAMPING, 0
        if len(fresh) < len(places):
            leaving[filled] = False
            stay = np.flatnonzero(~leaving)
            lane, w, floor, theta, trial, value, gradient, hessian, metric, damping, predicted, age = (
                a[stay]
                for a in (lane, w, floor, theta, trial, value, gradient, hessian, metric, damping, predicted, age)
            )
            d = None if d is None else d[stay]
    return out


def _step(problem, theta, gradient, hessian, metric, damping):
    """The damped Newton step, and what the undamped one promises: half the squared Newton decrement.

    Where the objective curves downwards, eigenvalues enter by magnitude, so that the step still goes downhill.
    Parameters that sit on a bound and are pushed against it are held.
    """
    each = np.arange(theta.shape[1])
    scale = 1.0 / np.sqrt(np.maximum(metric[:, each, each], 1e-300))
    slope, both = gradient * scale, scale[:, :, None] * scale[:, None, :]
    scaled, metric = hessian * both, metric * both
    metric[:, each, each] = 1.0 + SOFT  # positive definite, whatever rounding did
    below, above = theta <= problem.lower, theta >= problem.upper
    if below.any() or above.any():
        held = (below & (gradient > 0)) | (above & (gradient < 0))
        slope[held] = 0.0
        pairs = held[:, :, None] | held[:, None, :]
        scaled[pairs] = metric[pairs] = 0.0
        scaled[:, each, each] += held
        metric[:, each, each] += held
    along, promise, bent = _by_elimination(scaled, slope, damping[:, None, None] * metric)
    if len(bent):
        along[bent], promise[bent] = _by_eigenvalues(scaled[bent], slope[bent], metric[bent], damping[bent])
    step = -scale * along
    longest = np.maximum(1.0, np.abs(step).max(axis=-1, keepdims=True))
    return step / longest, promise


def _by_elimination(matrix, slope, damping):
    """The damped step uphill, the undamped promise, and the lanes for which both are void: not positive definite."""
    S, P = slope.shape
    # The systems of all lanes at once, lanes last: undamped for the promise, then damped for the step.
    systems, right = np.empty((P, P, 2, S)), np.empty((P, 2, S))
    systems[:] = matrix.transpose(1, 2, 0)[:, :, None]
    systems[:, :, 1] += damping.transpose(1, 2, 0)
    right[:] = slope.T[:, None]
    solution, pivots = eliminate(systems.reshape(P, P, 2 * S), right.reshape(P, 2 * S))
    solution = solution.reshape(P, 2, S)
    bent = np.flatnonzero(~(pivots[:, :S] > 1e-10).all(0))
    with np.errstate(invalid="ignore", over="ignore"):  # of the void lanes
        promise = 0.5 * (slope.T * solution[:, 0]).sum(0)
    return solution[:, 1].T.copy(), promise, bent


def _by_eigenvalues(matrix, slope, metric, damping):
    """The same with the curvatures, relative to the metric, by their magnitude."""
    inverse = np.linalg.inv(np.linalg.cholesky(metric))
    back = inverse.transpose(0, 2, 1)
    curvature, basis = np.linalg.eigh(inverse @ matrix @ back)
    curvature = np.maximum(np.abs(curvature), 1e-12)
    basis = back @ basis
    along = (slope[:, None] @ basis)[:, 0]
    step = (basis @ (along / (curvature + damping[:, None]))[:, :, None])[:, :, 0]
    return step, 0.5 * (along * along / curvature).sum(-1)


def eliminate(a: Float[np.ndarray, "P P S"], b: Float[np.ndarray, "P S"]) -> tuple[np.ndarray, np.ndarray]:
    """x of a x = b for S symmetric systems at once, and the pivots: all positive where a is definite. Overwrites both.

    Lanes lie along the last axis, so that a factorisation is a few passes over arrays and no loop over lanes.
    """
    P = len(b)
    with np.errstate(all="ignore"):
        for j in range(P - 1):
            ratio = a[j + 1 :, j] / a[j, j]
            a[j + 1 :, j + 1 :] -= ratio[:, None] * a[j, None, j + 1 :]
            b[j + 1 :] -= ratio * b[j]
        pivots = a[np.arange(P), np.arange(P)]
        for j in range(P - 1, -1, -1):
            b[j] /= pivots[j]
            b[:j] -= a[:j, j] * b[j]
    return b, pivots
