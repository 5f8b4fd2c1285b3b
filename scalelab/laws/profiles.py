"""The profile of the objective: its minimum over all other parameters while one, or two, are held at values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.intervals import curvature, own_coordinate
from scalelab.laws.parameter import HUGE
from scalelab.laws.regression import Problem, Regression, is_own
from scalelab.laws.solver import minimise

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

POINTS = 33  # of a profile
REACH = 4.0  # standard errors that a profile first reaches to either side
CRAWL = 60  # iterations after which a value's optimum is where its lane has come to: a flat valley has no other end
FURTHER = 5  # times that it reaches twice as far where the objective has not risen enough
SIDE = 25  # points of a plane along each parameter


def student_quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: with t = sqrt(nu) tan(phi) its density is cos(phi)^(nu - 1)."""
    phi = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(phi) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return float(np.sqrt(freedom) * np.tan(np.interp(level, mass / mass[-1], phi)))


def joint_quantile(level: float, freedom: int) -> float:
    """Of the squared distance of two parameters: twice the quantile of F with 2 and `freedom` degrees of freedom."""
    return freedom * ((1 - level) ** (-2 / freedom) - 1)


class Pinned(Problem):
    """Another problem in which rows @ theta keep the values that each lane begins with.

    The coordinates `pivots` hold these values instead of theta's own; nothing moves them.
    """

    def __init__(self, base: Regression, rows: Float[np.ndarray, "k P"], pivots: Sequence[int]):
        self.base, self.pivots, self.rows, self.data, self.load = base, list(pivots), base.rows, base.data, base.load
        held = np.eye(rows.shape[1])
        held[self.pivots] = rows
        self.spread = np.linalg.inv(held)
        self.lower, self.upper = base.lower.copy(), base.upper.copy()
        self.lower[self.pivots], self.upper[self.pivots] = -np.inf, np.inf

    def theta(self, pinned: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        return pinned @ self.spread.T

    def evaluate(self, theta, weights, objective, data=None):
        value, gradient, *matrices = self.base.evaluate(self.theta(theta), weights, objective, data)
        gradient = gradient @ self.spread
        gradient[:, self.pivots] = 0.0
        hessian, metric = (self.spread.T @ matrix @ self.spread for matrix in matrices)
        for matrix in (hessian, metric):
            matrix[:, self.pivots] = matrix[:, :, self.pivots] = 0.0
            matrix[:, self.pivots, self.pivots] = 1.0
        return value, gradient, hessian, metric


@dataclasses.dataclass(frozen=True)
class Profile:
    """The objective minimised over all other parameters while one is held at a value.

    `table`: a row per value, with the objective, all parameters there, and `t`, the signed root of the likelihood
    ratio 2 (V - V_min) / scale. The interval (lower, upper) is where |t| stays below Student's quantile; an end is
    infinite where the objective never rises that far: the data do not bound the parameter on that side.

    `scale` turns the objective into a log-likelihood: 2 (V - V_min) / scale is (distance / standard error)^2 where the
    profile is a parabola, as in the robust likelihood-ratio test (Ronchetti 1982); for least squares it is the
    residual variance. The standard error is that of the bootstrap draws, or of influence functions (by clusters where
    the rows have them) without draws: a Huber or least-absolute objective knows no noise of its own.
    """

    name: str
    level: float
    lower: float
    upper: float
    scale: float
    table: pd.DataFrame
    quantile: float  # of |t|, where the interval ends

    def __str__(self) -> str:
        best = self.table[self.name].iloc[int(self.table["objective"].argmin())]
        return f"{self.name} = {best:.5g} [{self.lower:.5g}, {self.upper:.5g}] ({100 * self.level:g} % profile)"


def profile(fit: Fit, name: str, level: float = 0.95) -> Profile:
    """See `Fit.profile`."""
    row, constant, pivot = _held(fit, name)
    if not 0 < level < 1:
        raise BadInput("level", level, "must lie between 0 and 1")
    problem, theta = fit.solved
    spec = fit.law.parameters[name]
    shape = curvature(fit)
    flat = float(row @ shape.inverse @ row)
    u, lowest = float(row @ theta), float(fit.record["value"])
    error = _error(fit, name, float(np.sqrt(max(row @ shape.covariance() @ row, 0.0))))
    step = max(error, 1e-9 * max(1.0, abs(u)))
    needed = student_quantile(level, shape.freedom)
    pinned = Pinned(problem, row[None], [pivot])
    ridge = shape.inverse @ row / max(flat, 1e-300)  # where theta goes as u moves, to first order
    box = np.array(spec.box) - constant

    reach = [REACH, REACH]
    for _ in range(FURTHER + 1):
        half = np.linspace(0, 1, POINTS // 2 + 1)
        at = np.unique(np.clip(u + step * np.concatenate([-reach[0] * half, reach[1] * half]), *box))
        start = theta + (at - u)[:, None] * ridge
        start[:, pivot] = at
        with np.errstate(all="ignore"):  # the first ends of a profile may be wild
            found = _along(pinned, start, at, pivot, fit)
        rise, x = 2 * np.maximum(np.where(np.isfinite(found[1]), found[1], HUGE) - lowest, 0), at - u
        near = (np.abs(x) <= 2 * step) & (rise < HUGE)
        steepness = float((x[near] ** 2 * rise[near]).sum() / max((x[near] ** 4).sum(), 1e-300))
        scale = steepness * step**2
        with np.errstate(over="ignore"):
            t = np.sign(x) * np.sqrt(rise / max(scale, 1e-300))
        short = [t[0] > -needed and at[0] > box[0], t[-1] < needed and at[-1] < box[1]]
        if not any(short):
            break
        reach = [r * 2 if s else r for r, s in zip(reach, short, strict=True)]
    ends = [_crossing(at[at <= u][::-1], -t[at <= u][::-1], needed), _crossing(at[at >= u], t[at >= u], needed)]
    ends[0] = ends[0] if np.isfinite(ends[0]) else -np.inf
    with np.errstate(over="ignore"):
        natural = sorted(float(spec.to_p(e + constant)) for e in ends)  # open ends: 0 or infinity, by the sign
    with np.errstate(all="ignore"):
        params = problem.natural(pinned.theta(found[0]))
    table: Any = pd.DataFrame(params, columns=list(fit.names))
    table[name] = spec.to_p(at + constant)
    table = table[[name, *[n for n in fit.names if n != name]]]
    table.insert(1, "objective", found[1])
    table.insert(2, "t", t)
    return Profile(name, level, natural[0], natural[1], scale, table.sort_values(name, ignore_index=True), needed)


def _held(fit: Fit, name: str) -> tuple[Float[np.ndarray, " P"], float, int]:
    """`own_coordinate` of a parameter that can be held. Raises `BadInput` for others."""
    if name not in fit.names:
        raise BadInput("parameter", name, f"must be one of {', '.join(fit.names)}")
    if name in fit.options.fixed:
        raise BadInput("parameter", name, "is held fixed")
    if not fit.converged:
        raise BadInput("profile", name, "the fit has not converged: there is no optimum to measure from")
    problem, theta = fit.solved
    row, constant, pivot = own_coordinate(fit, name)
    if not is_own(problem, fit.law.parameters[name], fit.names.index(name), row, constant, theta):
        remedy = f"{fit.law.name} is fitted in coordinates in which it cannot be held: no profile"
        raise BadInput("parameter", name, remedy)
    return row, constant, pivot


def _error(fit: Fit, name: str, without: float) -> float:
    """Standard error of the parameter's own coordinate: of the draws, by their quantiles; `without` where too few."""
    drawn = fit.samples[:, fit.names.index(name)]
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 100:
        return without
    low, high = np.quantile(fit.law.parameters[name].to_u(drawn), [0.025, 0.975])
    return float(high - low) / (2 * 1.96)


def _along(pinned: Pinned, start: np.ndarray, at: np.ndarray, pivot: int, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Each value's optimum: from the ridge, then from its neighbours' optima, until no neighbour helps."""
    goal, weights = fit.options.objective, fit.rows.weights
    best = minimise(pinned, start, weights, goal, max_iterations=CRAWL)
    theta, value = best.theta, best.value
    for _ in range(2):
        moved = False
        for shift in (1, -1):
            neighbour = np.roll(theta, shift, axis=0)
            neighbour[:, pivot] = at
            rival = minimise(pinned, neighbour, weights, goal, max_iterations=CRAWL)
            better = rival.value < value * (1 - 1e-9)
            moved |= bool(better.any())
            theta, value = np.where(better[:, None], rival.theta, theta), np.where(better, rival.value, value)
        if not moved:
            break
    return theta, value


def _crossing(at: np.ndarray, t: np.ndarray, needed: float) -> float:
    """Where |t|, from the optimum outward, first reaches `needed`; infinite where it does not."""
    over = np.flatnonzero(t >= needed)
    if not len(over):
        return float("inf")
    k = int(over[0])
    if k == 0:
        return float(at[0])
    share = (needed - t[k - 1]) / max(t[k] - t[k - 1], 1e-300)
    return float(at[k - 1] + share * (at[k] - at[k - 1]))


# ------------------------------------------------------------------------------------------------ two at once


@dataclasses.dataclass(frozen=True)
class Plane:
    """The objective minimised over all other parameters while two are held, on a grid of both.

    `table`: a row per grid point, with both parameters, the objective and `t2`, the likelihood ratio
    2 (V - V_min) / scale, the scale as in `Profile` but for the covariance of the two. The joint region at `level` is
    where t2 stays below `threshold(level)`. `cut`: it reaches the end of the grid.
    """

    names: tuple[str, str]
    level: float
    freedom: int
    scale: float
    cut: bool
    table: pd.DataFrame

    def threshold(self, level: float) -> float:
        """Of t2, at any level."""
        return joint_quantile(level, self.freedom)

    def grid(self) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "n m"]]:
        """Values of the first and of the second parameter, and t2 [second, first]."""
        wide = self.table.pivot(index=self.names[1], columns=self.names[0], values="t2")
        return wide.columns.to_numpy(float), wide.index.to_numpy(float), wide.to_numpy(float)


def plane(fit: Fit, first: str, second: str, level: float = 0.95) -> Plane:
    """See `Fit.plane`."""
    if first == second:
        raise BadInput("parameter", second, "must be another than the first")
    if not 0 < level < 1:
        raise BadInput("level", level, "must lie between 0 and 1")
    rows, constants, pivots = (np.array(part) for part in zip(*(_held(fit, n) for n in (first, second)), strict=True))
    if pivots[0] == pivots[1]:
        raise BadInput("parameter", second, f"is tied to {first}")
    problem, theta = fit.solved
    specs = [fit.law.parameters[n] for n in (first, second)]
    box = np.array([spec.box for spec in specs]) - constants[:, None]
    shape = curvature(fit)
    covariance = _joint_covariance(fit, (first, second), rows @ shape.covariance() @ rows.T)
    step, centre, lowest = np.sqrt(np.diag(covariance)), rows @ theta, float(fit.record["value"])
    ridge = shape.inverse @ rows.T @ np.linalg.pinv(rows @ shape.inverse @ rows.T)
    pinned = Pinned(problem, rows, list(pivots))
    threshold = joint_quantile(level, shape.freedom)

    reach = np.full((2, 2), REACH)  # of each parameter to either side
    for _ in range(FURTHER):
        axes = []
        for k in range(2):
            half = np.linspace(0, 1, SIDE // 2 + 1)
            ends = np.concatenate([-reach[k, 0] * half[:0:-1], reach[k, 1] * half])
            axes.append(np.unique(np.clip(centre[k] + step[k] * ends, *box[k])))
        at = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        x = at - centre
        start = theta + x @ ridge.T
        start[..., pivots] = at
        with np.errstate(all="ignore"):  # the first corners may be wild
            value = _over_grid(pinned, start, pivots, fit)
        rise = 2 * np.maximum(np.where(np.isfinite(value), value, HUGE) - lowest, 0)
        q = np.einsum("ijk,kl,ijl->ij", x, np.linalg.inv(covariance), x)
        near = (q <= 4) & (rise < HUGE)
        scale = float((q[near] * rise[near]).sum() / max((q[near] ** 2).sum(), 1e-300))
        t2 = np.minimum(rise / max(scale, 1e-300), HUGE)
        edges = ((t2[0], axes[0][0] > box[0, 0]), (t2[-1], axes[0][-1] < box[0, 1]),
                 (t2[:, 0], axes[1][0] > box[1, 0]), (t2[:, -1], axes[1][-1] < box[1, 1]))  # fmt: skip
        short = np.array([bool((edge < threshold).any()) and free for edge, free in edges]).reshape(2, 2)
        if not short.any():
            break
        reach = np.where(short, 2 * reach, reach)
    natural = [spec.to_p(at[..., k] + constants[k]).ravel() for k, spec in enumerate(specs)]
    table = pd.DataFrame({first: natural[0], second: natural[1], "objective": value.ravel(), "t2": t2.ravel()})
    return Plane((first, second), level, shape.freedom, scale, bool(short.any()), table)


def _joint_covariance(fit: Fit, names: tuple[str, str], without: np.ndarray) -> Float[np.ndarray, "2 2"]:
    """Of two parameters' own coordinates: of the draws, as `_error`; `without` where too few."""
    places = [fit.names.index(name) for name in names]
    drawn = fit.samples[:, places]
    drawn = drawn[np.isfinite(drawn).all(1)]
    sd = np.array([_error(fit, name, float(np.sqrt(max(without[k, k], 0.0)))) for k, name in enumerate(names)])
    sd = np.maximum(sd, 1e-9)
    correlation = without[0, 1] / max(float(np.sqrt(without[0, 0] * without[1, 1])), 1e-300)
    if len(drawn) >= 100:
        u = np.stack([fit.law.parameters[name].to_u(drawn[:, k]) for k, name in enumerate(names)], axis=1)
        central = (np.abs(u - np.median(u, axis=0)) < 3 * sd).all(1)
        correlation = float(np.corrcoef(u[central].T)[0, 1])
    correlation = float(np.clip(np.nan_to_num(correlation), -0.999, 0.999))
    return np.outer(sd, sd) * np.array([[1, correlation], [correlation, 1]])


def _over_grid(pinned: Pinned, start: Float[np.ndarray, "n m P"], pivots: np.ndarray, fit: Fit) -> np.ndarray:
    """Each point's optimum: from the ridge, then from its neighbours' optima."""
    goal, weights = fit.options.objective, fit.rows.weights
    shape, P = start.shape[:2], start.shape[2]
    held = start[..., pivots]
    best = minimise(pinned, start.reshape(-1, P), weights, goal, max_iterations=CRAWL)
    theta, value = best.theta.reshape(start.shape), best.value.reshape(shape)
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        neighbour = np.roll(theta, shift, axis=axis)
        neighbour[..., pivots] = held
        rival = minimise(pinned, neighbour.reshape(-1, P), weights, goal, max_iterations=CRAWL)
        better = rival.value.reshape(shape) < value * (1 - 1e-9)
        theta = np.where(better[..., None], rival.theta.reshape(start.shape), theta)
        value = np.where(better, rival.value.reshape(shape), value)
    return value
