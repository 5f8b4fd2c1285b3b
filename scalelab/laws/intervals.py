"""Intervals without resampling: leave-one-out, influence functions, the profile of the objective.

For estimates that minimise sum w rho(r) with residual r of slope J, the influence of row i is B^-1 J_i w_i psi_i with
psi = rho' and B = m J' W J (Huber 1981), with m the mean of psi' (`objective.mean_bend`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.objective import mean_bend
from scalelab.laws.parameter import HUGE
from scalelab.laws.regression import Constrained, Regression
from scalelab.laws.solver import minimise

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

POINTS = 33  # of a profile
REACH = 4.0  # standard errors that a profile first reaches to either side
CRAWL = 60  # iterations after which a value's optimum is where its lane has come to: a flat valley has no other end
FURTHER = 5  # times that it reaches twice as far where the objective has not risen enough


# ------------------------------------------------------------------------------------------------ quantiles


def student_quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: with t = sqrt(nu) tan(phi) its density is cos(phi)^(nu - 1)."""
    phi = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(phi) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return float(np.sqrt(freedom) * np.tan(np.interp(level, mass / mass[-1], phi)))


# ------------------------------------------------------------------------------------------------ refits


def refits(
    fit: Fit, weights: Float[np.ndarray, "S n"], cold: bool = True
) -> tuple[Float[np.ndarray, "S P"], Float[np.ndarray, " S"]]:
    """Parameters and objective of each row of weights, from the fit's optimum and, with `cold`, from a start of its
    own where the law has one. NaN where a refit did not converge or fewer rows than parameters are left."""
    problem, optimum = fit.solved
    goal = fit.options.objective
    best = minimise(problem, np.broadcast_to(optimum, (len(weights), len(optimum))), weights, goal)
    theta, value, converged = best.theta, best.value, best.converged
    own = problem.cold_starts(weights) if cold else None
    if own is not None:
        rival = minimise(problem, own, weights, goal)
        better = rival.converged & ((rival.value < value) | ~converged)
        theta, value = np.where(better[:, None], rival.theta, theta), np.where(better, rival.value, value)
        converged = converged | rival.converged
    good = converged & ((weights > 0).sum(1) >= fit.record["free"])
    return np.where(good[:, None], problem.natural(theta), np.nan), np.where(good, value, np.nan)


def groups(fit: Fit, cluster: str) -> tuple[np.ndarray, list[Any]]:
    """The number of each row's group, and the groups' labels: by the fit's cluster column, "budget", or a role."""
    from scalelab.laws.validate import budgets  # validate's refits stand on this module's neighbours

    rows = fit.rows
    if cluster == rows.cluster and rows.clusters is not None:
        return rows.clusters, list(range(int(rows.clusters.max()) + 1))
    if cluster == "budget" and rows.has_compute:
        label = budgets(rows.compute)
        return label, [float(np.exp(np.log(rows.compute[label == g]).mean())) for g in range(label.max() + 1)]
    if cluster not in rows.columns:
        known = [*rows.columns, *(["budget"] if rows.has_compute else []), *([rows.cluster] if rows.cluster else [])]
        raise BadInput("cluster", cluster, f"must be one of {', '.join(known)}")
    values, label = np.unique(rows.columns[cluster], return_inverse=True)
    return label.reshape(-1), values.tolist()


def leave_one_out(fit: Fit, cluster: str | None = None) -> pd.DataFrame:
    """See `Fit.leave_one_out`."""
    n = len(fit.rows)
    if cluster is None:
        label, index = np.arange(n), fit.rows.index.rename("left out")
    else:
        label, names = groups(fit, cluster)
        index = pd.Index(names, name=f"{cluster} left out")
    weights = fit.rows.weights * (label[None] != np.arange(len(index))[:, None])
    # without one row of many the optimum stays where it was; without a cluster it may jump to another valley
    params, _ = refits(fit, weights, cold=cluster is not None)
    return pd.DataFrame(params, index=index, columns=list(fit.names))


# ------------------------------------------------------------------------------------------------ influence function


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Of a fit, in the solver's coordinates: bread B^-1 and each row's influence, whose squares add to the variance.

    Where psi is linear, influences are those of leaving the row out, I_i / (1 - h_i) with leverage h_i: the fit bends
    toward the rows that it hangs on, and without the correction intervals of 36 runs hold the truth in 91 % instead of
    95 % (HC3; MacKinnon & White 1985). Where psi is constant no row bends the fit, but P rows lie on it and have no
    influence: the others count n / (n - P) times.
    """

    inverse: Float[np.ndarray, "P P"]
    influence: Float[np.ndarray, "n P"]
    cluster: np.ndarray | None
    freedom: int  # rows, or clusters where there are any, less parameters
    priors: Float[np.ndarray, "k P"]  # how far a standard deviation of each prior moves the fit

    def covariance(self, cluster: np.ndarray | None = None) -> Float[np.ndarray, "P P"]:
        """The sandwich, influences summed within clusters."""
        parts = summed(self.influence, self.cluster if cluster is None else cluster)
        with np.errstate(over="ignore", invalid="ignore"):  # of parameters that no row determines
            return parts.T @ parts + self.priors.T @ self.priors


def summed(influence: Float[np.ndarray, "n P"], cluster: np.ndarray | None) -> Float[np.ndarray, "g P"]:
    """Influences added up within clusters."""
    if cluster is None:
        return influence
    out = np.zeros((int(cluster.max()) + 1, influence.shape[1]))
    np.add.at(out, cluster, influence)
    return out


def curvature(fit: Fit, theta: Float[np.ndarray, " P"] | None = None, weights: np.ndarray | None = None) -> Curvature:
    """At the fit's optimum, or at that of other weights (rows trimmed away)."""
    problem, optimum = fit.solved
    theta = optimum if theta is None else theta
    weights = fit.rows.weights if weights is None else weights
    goal, used = fit.options.objective, weights > 0
    jacobian = problem.jacobian(theta)
    residual = problem.model(theta[None])[0] - problem.data
    P, n = len(theta), int(used.sum())
    m = mean_bend(goal, residual[used], P)
    prior, drift = problem.prior(theta)
    bread = m * (jacobian * weights[:, None]).T @ jacobian + prior
    scale = 1 / np.sqrt(np.maximum(np.diag(bread), 1e-300))
    inverse = scale[:, None] * np.linalg.pinv(bread * scale[:, None] * scale, rcond=1e-13) * scale
    leverage = m * weights * np.einsum("ip,pq,iq->i", jacobian, inverse, jacobian)
    _, slope, bend, _ = goal.rho(residual)
    linear = np.clip(np.broadcast_to(bend, residual.shape), 0, 1)
    push = weights * slope / np.maximum(1 - leverage * linear, 0.1)
    spare = n - P * (1 - float(linear[used].mean()))
    influence = -(jacobian * push[:, None]) @ inverse * np.sqrt(n / max(1.0, spare))
    groups = n if fit.rows.clusters is None else len(np.unique(fit.rows.clusters[used]))
    return Curvature(inverse, influence, fit.rows.clusters, max(1, groups - P), drift @ inverse)


def own_coordinate(fit: Fit, name: str) -> tuple[Float[np.ndarray, " P"], float, int]:
    """(row, constant, pivot): the parameter's own coordinate u (`Parameter.to_u`) is row @ theta + constant."""
    problem, i = fit.solved[0].bare, fit.names.index(name)
    if not isinstance(problem, Constrained):
        return *problem.own(i), i
    source = fit.options.tied.get(name, name)
    return *problem.own(i), problem.keep.index(fit.names.index(source))


def standard_errors(fit: Fit) -> pd.Series:
    """Of each parameter on its natural scale, from influence functions; 0 for fixed ones. Needs no refits."""
    problem, theta = fit.solved
    step = 1e-6 * np.maximum(np.abs(theta), 1e-2)
    up, down = (problem.natural(theta + sign * np.diag(step)) for sign in (1, -1))
    slope = (up - down).T / (2 * step)  # d parameter / d theta
    variance = np.einsum("ip,pq,iq->i", slope, curvature(fit).covariance(), slope)
    return pd.Series(np.sqrt(np.maximum(variance, 0.0)), index=list(fit.names), name="se")


# ------------------------------------------------------------------------------------------------ profile


class Pinned(Regression):
    """Another problem in which row @ theta keeps the value that each lane begins with.

    The coordinate `pivot` holds that value instead of theta's own; nothing moves it.
    """

    def __init__(self, base: Regression, row: Float[np.ndarray, " P"], pivot: int):
        self.base, self.pivot, self.rows, self.data, self.load = base, pivot, base.rows, base.data, base.load
        self.spread = np.eye(len(row))
        self.spread[pivot] = -row / row[pivot]
        self.spread[pivot, pivot] = 1 / row[pivot]
        self.lower, self.upper = base.lower.copy(), base.upper.copy()
        self.lower[pivot], self.upper[pivot] = -np.inf, np.inf

    def theta(self, pinned: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        return pinned @ self.spread.T

    def model(self, theta):
        return self.base.model(self.theta(theta))

    def evaluate(self, theta, weights, objective, data=None):
        value, gradient, *matrices = self.base.evaluate(self.theta(theta), weights, objective, data)
        gradient = gradient @ self.spread
        gradient[:, self.pivot] = 0.0
        hessian, metric = (self.spread.T @ matrix @ self.spread for matrix in matrices)
        for matrix in (hessian, metric):
            matrix[:, self.pivot] = matrix[:, :, self.pivot] = 0.0
            matrix[:, self.pivot, self.pivot] = 1.0
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
    if name not in fit.names:
        raise BadInput("parameter", name, f"must be one of {', '.join(fit.names)}")
    if name in fit.options.fixed:
        raise BadInput("parameter", name, "is held fixed")
    if not 0 < level < 1:
        raise BadInput("level", level, "must lie between 0 and 1")
    if not fit.converged:
        raise BadInput("profile", name, "the fit has not converged: there is no optimum to measure from")
    problem, theta = fit.solved
    spec = fit.law.parameters[name]
    row, constant, pivot = own_coordinate(fit, name)
    moved = theta + np.linspace(0.01, 0.02, len(theta))
    own = spec.to_u(problem.natural(moved[None])[0, fit.names.index(name)])
    if not np.isclose(own, row @ moved + constant, rtol=1e-6, atol=1e-9):
        raise BadInput(
            "parameter", name, f"{fit.law.name} is fitted in coordinates in which it cannot be held: no profile"
        )
    shape = curvature(fit)
    flat = float(row @ shape.inverse @ row)
    u, lowest = float(row @ theta), float(fit.record["value"])
    error = _error(fit, name, float(np.sqrt(max(row @ shape.covariance() @ row, 0.0))))
    step = max(error, 1e-9 * max(1.0, abs(u)))
    needed = student_quantile(level, shape.freedom)
    pinned = Pinned(problem, row, pivot)
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
