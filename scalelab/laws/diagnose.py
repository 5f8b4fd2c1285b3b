"""Numbers about a fit: how well determined, how it was found, what its residuals look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scalelab.laws import residuals
from scalelab.laws.noise import seed_noise
from scalelab.laws.objective import robust_scale

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit


def information(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (ascending) and vectors of the reweighted J'J, scaled to a unit diagonal, in solver coordinates."""
    problem, theta = fit.solved
    jacobian = problem.jacobian(theta)
    residual = problem.model(theta[None])[0] - problem.data
    weight = fit.rows.weights * fit.options.objective.rho(residual)[3]
    found = jacobian.T @ (weight[:, None] * jacobian)
    scale = np.sqrt(np.maximum(np.diag(found), 1e-300))
    return np.linalg.eigh(found / np.outer(scale, scale))


def diagnostics(fit: Fit) -> pd.Series:
    """A Series: `eigenvalue k` of the scaled information matrix (ascending; near 0: a combination of parameters that
    the data do not determine), agreement of starts, iterations, the residuals' scales, share beyond the objective's
    delta, runs tests (z) along C, N, D and D/N, trends (t of slope and curvature), correlation within model sizes and
    budgets, seed noise.
    """
    r = fit.resid.to_numpy()
    n, P = len(r), fit.record["free"]
    scale = robust_scale(r)
    weights = fit.rows.weights
    out: dict[str, float] = {
        "rows": n,
        "parameters": P,
        "effective rows": float(weights.sum() ** 2 / (weights**2).sum()),
        "objective": fit.record["value"],
        "iterations": fit.record["iterations"],
        "starts that agree": fit.record["agreement"],
        "residual sd": float(np.sqrt((r**2).sum() / max(1, n - P))),
        "residual scale (robust)": scale,
        "largest residual in scales": float(np.abs(r - np.median(r)).max() / max(scale, 1e-300)),
    }
    if fit.options.objective.delta is not None:
        out["share beyond delta"] = float((np.abs(r) > fit.options.objective.delta).mean())
    out |= {f"eigenvalue {k + 1}": float(v) for k, v in enumerate(information(fit)[0])}
    for name, x in residuals.orders(fit).items():
        out[f"runs test along {name}"] = residuals.runs_test((r - np.median(r))[np.argsort(x, kind="stable")])
    for name, (slope, bend, _) in residuals.trends(fit).items():
        out[f"slope in ln {name}"], out[f"curvature in ln {name}"] = slope, bend
    for name, (correlation, _, _) in residuals.dependence(fit).items():
        out[f"correlation within {name}"] = correlation
    out["seed noise"] = seed_noise(fit.rows, fit.law.inputs, fit.law.target).relative
    return pd.Series(out, name="value", dtype=float)
