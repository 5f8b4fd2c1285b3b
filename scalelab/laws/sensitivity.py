"""How far the answer depends on choices that papers seldom show: rows dropped, objective, its width, kind of N.

Choices that differ in weights only (rows dropped) are lanes of one call of the solver: 20 fits to 240 rows take about
as long as ten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.intervals import curvature, summed
from scalelab.laws.objective import HUBER, LOG_SQUARES, NAMED, SQUARES, Objective, with_scale
from scalelab.laws.prior import noise
from scalelab.laws.solver import minimise
from scalelab.laws.target import target_of

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit
    from scalelab.laws.table import Rows

DROPS = (0, 3, 5, 10)
TRIMS = (0.0, 0.0125, 0.02, 0.04, 0.08)  # shares of rows: 0, 3, 5, 10, 20 of 245
STARTS = 4


def objectives(fit: Fit) -> list[Objective]:
    """The fit's own, and those of the field that suit the target."""
    own = fit.options.objective
    on_logs = bool((fit.observed > 0).all())
    logs = [HUBER, dataclasses.replace(HUBER, delta=1e-2), LOG_SQUARES, NAMED["student"]]
    out = [own]
    for goal in [*(logs if on_logs else []), SQUARES]:
        goal = _scaled(fit, goal)
        if goal not in out:
            out.append(goal)
    return out


def _scaled(fit: Fit, goal: Objective) -> Objective:
    """With its width from the fit's residuals, where it has none."""
    if goal.delta is not None or goal.kind == "squares":
        return goal
    return with_scale(goal, _residual(fit, goal))


def _residual(fit: Fit, goal: Objective) -> np.ndarray:
    fitted, data = fit.fittedvalues.to_numpy(), fit.observed
    return np.log(fitted) - np.log(data) if goal.on == "log" else fitted - data


def refit_weighted(fit: Fit, rows: Rows, goal: Objective, weights: Float[np.ndarray, "S n"]) -> np.ndarray:
    """Parameters at the best optimum of each row of weights, from the fit's own and a few spread starts; NaN where
    none was reached or too few different inputs are left."""
    law = fit.law
    try:
        options = fit.options.replace(objective=goal)
        if options.priors:
            options = options.replace(noise=noise(goal, _residual(fit, goal), fit.rows.weights, fit.record["free"]))
        problem = law._regression(rows, options)
        spread = problem.starts(weights[0], goal, STARTS)
    except BadInput:  # the target, or the law all over its search box, has no logarithm
        return np.full((len(weights), len(fit.names)), np.nan)
    starts = np.concatenate([problem.internal(fit.estimate[None]), spread])
    k, S = len(starts), len(weights)
    lanes, repeated = np.tile(starts, (S, 1)), np.repeat(weights, k, axis=0)
    lead = minimise(problem, lanes, repeated, goal.widened(10), tolerance=1e-4, max_iterations=30)
    found = minimise(problem, lead.theta, repeated, goal, max_iterations=60)
    value = np.where(found.converged, found.value, np.inf).reshape(S, k)
    best = value.argmin(1)
    theta = found.theta.reshape(S, k, -1)[np.arange(S), best]
    inputs = np.stack([rows.columns[role] for role in law.inputs])
    enough = [len(np.unique(inputs[:, w > 0], axis=1).T) >= fit.record["free"] for w in weights]
    good = np.isfinite(value[np.arange(S), best]) & np.array(enough)
    return np.where(good[:, None], problem.natural(theta), np.nan)


def without_highest(fit: Fit, drops: Sequence[int]) -> Float[np.ndarray, "drops n"]:
    """The rows' weights with the k highest losses at 0, for each k."""
    rank = np.empty(len(fit.rows), int)
    rank[np.lexsort([fit.rows.order(), -fit.observed])] = np.arange(len(fit.rows))
    return fit.rows.weights * (rank[None] >= np.array(drops)[:, None])


def sensitivity(fit: Fit, C: float | None = None, drop: Sequence[int] = DROPS) -> pd.DataFrame:
    """See `Fit.sensitivity`."""
    drops = [int(k) for k in drop]
    if not drops or min(drops) < 0:
        raise BadInput("drop", list(drop), "must be numbers of rows, 0 or more")
    drops = [k for k in drops if len(fit.rows) - k >= fit.record["free"]]
    if not drops:
        raise BadInput("drop", list(drop), f"leaves fewer rows than the {fit.record['free']} parameters")
    weights = without_highest(fit, drops)
    target = target_of(fit, C)
    conventions = {"params": fit.rows}
    other = fit.rows.columns.get("params_non_embedding")
    if "params" in fit.law.inputs and other is not None and bool((np.isfinite(other) & (other > 0)).all()):
        columns = fit.rows.columns | {"params": other}
        conventions["params_non_embedding"] = dataclasses.replace(fit.rows, columns=columns, notices=())
    parts = []
    for kind, rows in conventions.items():
        for goal in objectives(fit):
            params = refit_weighted(fit, rows, goal, weights)
            frame = pd.DataFrame({"dropped": drops, "rows": len(rows) - np.array(drops)})
            frame["objective"] = f"{goal.kind} on {goal.on}"
            frame["delta"] = np.nan if goal.delta is None else goal.delta
            if "params" in fit.law.inputs:
                frame["N"] = kind
            frame[list(fit.names)] = params
            exponents = fit.law.exponents(params)
            if exponents is not None:
                frame[["a", "b"]] = exponents[:, :2]
            for name, values in target.quantities(params).items():
                frame[f"{name} at {target}"] = values
            parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def trim_drift(fit: Fit, C: float | None = None) -> pd.DataFrame:
    """See `Fit.trim_drift`.

    z is the drift from the full fit in standard errors of that drift, by influence functions: row by row, the
    difference of what a row does to the one fit and to the other. Dropping the highest losses of a true law moves
    nothing but by chance, though the loss itself chose the rows: they are those of the smallest runs.
    """
    n = len(fit.rows)
    drops = sorted({round(n * share) for share in TRIMS})
    drops = [k for k in drops if n - k >= 2 * fit.record["free"]]
    weights = without_highest(fit, drops)
    params = refit_weighted(fit, fit.rows, fit.options.objective, weights)
    problem, theta = fit.solved
    full = curvature(fit)
    frame = pd.DataFrame(params, columns=list(fit.names))
    frame.insert(0, "dropped", drops)
    z = np.zeros((len(drops), len(theta)))
    for i, (w, p) in enumerate(zip(weights, params, strict=True)):
        if drops[i] == 0 or not np.isfinite(p).all():
            continue
        at = problem.internal(p[None])[0]
        parts = summed(curvature(fit, at, w).influence - full.influence, full.cluster)
        z[i] = (at - theta) / np.sqrt(np.maximum((parts**2).sum(0), 1e-300))
    frame["z"] = np.abs(z).max(1)
    target = target_of(fit, C)
    for name, values in target.quantities(params).items():
        frame[f"{name} at {target}"] = values
    return frame
