"""Two arms' curves against each other: difference, multiplier and crossing, each with its interval over draws.

Arrays are (1 + R, m): the estimate first, then the draws, which belong together row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.laws.frontier import crossings, where

ENOUGH = 0.5  # share of draws that must be known for an interval
NO_VERDICT = "no verdict"


def band(draws: Float[np.ndarray, "R m"], level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval per column, of numbers that may be infinite; NaN where too few draws are known."""
    m = draws.shape[1]
    lower, upper = np.full(m, np.nan), np.full(m, np.nan)
    for j in range(m):
        known = np.sort(draws[~np.isnan(draws[:, j]), j])
        if len(known) and len(known) >= ENOUGH * len(draws):
            # in units of the order statistics, so that an infinite neighbour takes no part unless it is reached
            method = "linear" if np.isfinite(known).all() else "nearest"
            lower[j], upper[j] = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], method=method)
    return lower, upper


def differences(
    reference: str, arm: str, ours: Float[np.ndarray, "1+R m"], theirs: Float[np.ndarray, "1+R m"], level: float
) -> pd.DataFrame:
    """Rows of loss differences arm (theirs) - reference (ours), with the verdict."""
    gap = theirs - ours
    lower, upper = band(gap[1:], level)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(gap[1:])
        better = np.where(known, (gap[1:] < 0) + 0.5 * (gap[1:] == 0), 0.0).sum(0)
        probability = np.where(np.isfinite(lower), better / np.maximum(known.sum(0), 1), np.nan)
        verdict = np.where(upper < 0, arm, np.where(lower > 0, reference, NO_VERDICT))
    return pd.DataFrame(
        {
            "loss_reference": ours[0],
            "loss": theirs[0],
            "difference": gap[0],
            "lower": lower,
            "upper": upper,
            "probability": probability,
            "verdict": verdict,
        }
    )


def multipliers(
    target: Float[np.ndarray, "1+R m"], log_grid: Float[np.ndarray, " g"], curve: Float[np.ndarray, "1+R g"],
    flops: Float[np.ndarray, " m"], level: float,
) -> pd.DataFrame:  # fmt: skip
    """What share of each budget an arm with this curve of optimal losses needs for the target losses."""
    ratio = np.exp(np.stack([where(target[:, j], log_grid, curve) for j in range(len(flops))], axis=1) - np.log(flops))
    lower, upper = band(ratio[1:], level)
    return pd.DataFrame({"multiplier": ratio[0], "multiplier_lower": lower, "multiplier_upper": upper})


def crossing(
    gap: Float[np.ndarray, "1+R g"], log_grid: Float[np.ndarray, " g"], inside: tuple[float, float] | None, level: float
) -> dict[str, Any]:
    """Where a difference changes sign: flops, lower, upper, probability_inside, arm_above (better beyond: -1 the arm,
    +1 the reference, 0 no crossing).

    Of several crossings the one nearest to the data. The interval is the stretch around it where the band of the
    difference contains zero, 0 or inf where that does not end within the grid.
    """
    centre = np.log(inside).mean() if inside else log_grid.mean()
    out = {"flops": np.nan, "lower": np.nan, "upper": np.nan, "probability_inside": np.nan, "arm_above": 0}
    lower, upper = band(gap[1:], level)
    if inside and len(gap) > 1:
        low, high = np.log(inside).round(9)
        among = (log_grid >= low - 1e-9) & (log_grid <= high + 1e-9)
        draws = gap[1:, among]
        draws = draws[np.isfinite(draws).all(1)]
        if len(draws) >= ENOUGH * (len(gap) - 1):
            out["probability_inside"] = float(((draws > 0).any(1) & (draws < 0).any(1)).mean())
    roots = crossings(log_grid, gap[0])
    if not len(roots):
        return out
    root = roots[np.argmin(np.abs(roots - centre))]
    beyond = int(np.clip(np.searchsorted(log_grid, root, side="right"), 0, len(log_grid) - 1))
    out |= {"flops": float(np.exp(root)), "arm_above": int(np.sign(gap[0, beyond]))}
    if np.isfinite(lower).any():
        out["lower"] = float(np.exp(_edge(log_grid, lower, upper, root, -1)))
        out["upper"] = float(np.exp(_edge(log_grid, lower, upper, root, +1)))
    return out


def _edge(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, root: float, side: int) -> float:
    """From the root to where the band leaves zero: linear between the points of the grid."""
    beyond = x > root if side > 0 else x < root
    at = root
    band_at = (np.interp(root, x, lower), np.interp(root, x, upper))
    for i in np.flatnonzero(beyond)[::side]:
        if np.isnan(lower[i]):
            break
        if lower[i] > 0 or upper[i] < 0:
            before, now = (band_at[0], lower[i]) if lower[i] > 0 else (band_at[1], upper[i])
            share = before / (before - now) if before * now < 0 else 0.0
            return float(at + share * (x[i] - at))
        at, band_at = x[i], (lower[i], upper[i])
    return side * np.inf
