"""Coverage on the user's own design: simulate from the fit, fit again, count how often the intervals hold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.progress import progress
from scalelab.laws.shown import Shown
from scalelab.laws.target import target_of

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

DRAWS = 200  # of each simulation's bootstrap


@dataclasses.dataclass(frozen=True)
class Calibration(Shown):
    """How often `level` intervals held the truth in `simulations` of the fit's own design.

    `table`: a row per parameter and for the loss at the target, with coverage, its binomial standard error, the median
    width, and the mean estimate beside the truth. `withheld`: simulations whose fit was not `ok`, so that it gave no
    interval; they count neither as held nor as missed.
    """

    level: float
    simulations: int
    withheld: int
    table: pd.DataFrame
    target: str

    @property
    def ok(self) -> bool:
        """Whether every coverage is within two binomial errors of the level, or above."""
        return bool((self.table["coverage"] + 2 * self.table["error"] >= self.level).all())

    def plot(self, ax: Any = None) -> Any:
        """Coverage of each quantity beside the nominal level; takes and returns a matplotlib `ax`."""
        from scalelab import study_plots

        return study_plots.coverage(self, ax)

    def summary(self) -> str:
        lines = [
            f"coverage of nominal {100 * self.level:g} % intervals in {self.simulations} simulations of this design"
            + (f" ({self.withheld} without intervals)" if self.withheld else "")
        ]
        for name, row in self.table.iterrows():
            lines.append(f"{name:>8} {row.coverage:7.1%} +- {row.error:.1%}   median width {row.width:.4g}")
        lines.append(f"the last at {self.target}")
        return "\n".join(lines)


def simulated(fit: Fit, rng: np.random.Generator) -> Float[np.ndarray, " n"]:
    """Targets at the fit's own inputs: the law plus residuals drawn with replacement, stretched by sqrt(n / (n - P))
    for the parameters that they have paid for. Rows of one cluster share a draw of the clusters' mean residuals."""
    residual = fit.resid.to_numpy()
    n = len(residual)
    residual = (residual - residual.mean()) * np.sqrt(n / max(1, n - fit.record["free"]))
    cluster = fit.rows.clusters
    if cluster is None:
        noise = rng.choice(residual, size=n)
    else:
        mean = np.bincount(cluster, residual) / np.bincount(cluster)
        noise = rng.choice(mean, size=len(mean))[cluster] + rng.choice(residual - mean[cluster], size=n)
    fitted = fit.fittedvalues.to_numpy()
    return fitted * np.exp(noise) if fit.options.objective.on == "log" else fitted + noise


def calibrate(fit: Fit, n: int = 200, level: float = 0.95, C: float | None = None, seed: int = 0) -> Calibration:
    """See `Fit.calibrate`."""
    if not isinstance(n, int | np.integer) or n < 1:
        raise BadInput("n", n, "must be a number of simulations")
    if not 0 < level < 1:
        raise BadInput("level", level, "must lie between 0 and 1")
    law, rows, target = fit.law, fit.rows, target_of(fit, C)
    names = [name for name in fit.names if name not in fit.options.fixed]
    which = [fit.names.index(name) for name in names]
    aim = law.target
    # predicted at the point that the fit itself proposes: each simulation judges the same question
    point = dict(target.inputs)
    if target.flops is not None:
        best = target.quantities(fit.estimate[None])
        if np.isfinite(best["params"][0]):
            N = float(best["params"][0])
            point |= {law.paid: N, "tokens": N * float(best["D/N"][0])}
    complete = set(law.inputs) <= set(point)
    columns = {role: np.array([point[role]]) for role in law.inputs} if complete else {}
    truth = np.append(fit.estimate[which], law.evaluate(fit.estimate[None], columns)[0] if complete else np.nan)

    rng = np.random.default_rng(seed)
    held, width, estimates = [], [], []
    with progress(n, f"{law.name}: calibration") as advance:
        for _ in range(n):
            again = dataclasses.replace(rows, columns=rows.columns | {aim: simulated(fit, rng)}, notices=())
            options = fit.options.replace(seed=int(rng.integers(1 << 31)))
            refit = law.fit_rows(again, options, DRAWS, {"columns": fit.record["columns"]}, near=fit.estimate)
            advance(1)
            if not refit.ok:
                continue
            curve = law.evaluate(refit.samples, columns) if complete else np.full((DRAWS, 1), np.nan)
            drawn = np.concatenate([refit.samples[:, which], curve], axis=1)
            lower, upper = refit.interval(drawn, level)
            held.append((lower <= truth) & (truth <= upper))
            width.append(upper - lower)
            value = law.evaluate(refit.estimate[None], columns)[0] if complete else [np.nan]
            estimates.append(np.append(refit.estimate[which], value))
    index = [*names, aim]
    if not held:
        table = pd.DataFrame(np.nan, index=index, columns=["coverage", "error", "width", "truth", "mean"])
        return Calibration(level, n, n, table, str(target))
    coverage = np.mean(held, axis=0)
    # of a share p in m trials, with one success and one failure added so that it is never exactly 0
    trials = len(held)
    smooth = (coverage * trials + 1) / (trials + 2)
    table = pd.DataFrame(
        {
            "coverage": coverage,
            "error": np.sqrt(smooth * (1 - smooth) / trials),
            "width": np.median(width, axis=0),
            "truth": truth,
            "mean": np.mean(estimates, axis=0),
        },
        index=index,
    )
    return Calibration(level, n, n - trials, table if complete else table.drop(index=aim), str(target))
