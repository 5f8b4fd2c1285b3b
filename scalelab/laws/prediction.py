"""What a law says at given inputs: the curve, and a new run there, each with its own interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit
    from scalelab.laws.table import Table


class Prediction:
    """The law at given inputs: the curve's interval, and the wider one of a new run."""

    def __init__(self, fit: Fit, table: Table):
        self.fit = fit
        self.predicted_mean = fit.predict(table)
        self._curve = fit.predict_draws(table)

    def summary_frame(self, level: float = 0.95) -> pd.DataFrame:
        """mean, mean_se, mean_ci_lower, mean_ci_upper (of the law), obs_ci_lower, obs_ci_upper (of a new run there).

        A new run scatters as the fitted rows do: each draw of the curve gets a residual drawn from theirs, stretched
        by sqrt(n / (n - P)) for the parameters that these residuals have paid for.
        """
        fit, curve = self.fit, self._curve
        lower, upper = fit.interval(curve, level)
        residual = fit.resid.to_numpy()
        n, P = len(residual), fit.record["free"]
        rng = np.random.default_rng(fit.options.seed)
        noise = rng.choice(residual - np.median(residual), size=(len(curve), 1)) * np.sqrt(n / max(1, n - P))
        runs = curve * np.exp(noise) if fit.options.objective.on == "log" else curve + noise
        possible = fit.law.ranges.get(fit.law.target, (-np.inf, np.inf))
        obs_lower, obs_upper = fit.interval(np.clip(runs, *possible), level)
        usable = np.isfinite(lower)
        with np.errstate(invalid="ignore"):
            se = np.where(usable, _std(curve), np.nan)
        return pd.DataFrame(
            {
                "mean": self.predicted_mean,
                "mean_se": se,
                "mean_ci_lower": lower,
                "mean_ci_upper": upper,
                "obs_ci_lower": obs_lower,
                "obs_ci_upper": obs_upper,
            },
            index=self.predicted_mean.index,
        )


def _std(draws: np.ndarray) -> np.ndarray:
    """Standard deviation over draws, failed ones apart."""
    good = draws[np.isfinite(draws).all(1)]
    return good.std(axis=0, ddof=1) if len(good) > 1 else np.full(draws.shape[1:], np.nan)
