"""Law: a form and how it is fitted. Fit: the result.

A form (one file in `forms/`) says what its parameters and inputs are, poses the regression for the solver and
evaluates itself; everything else, from bad input to intervals, is here once for all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws import checks, validate
from scalelab.laws.allocate import Cost
from scalelab.laws.powersum import GRID, PowerSum
from scalelab.laws.resample import resample
from scalelab.laws.result import Result, jsonable, provenance
from scalelab.laws.solver import minimise
from scalelab.laws.table import Rows, Table, inputs_of, prepare

if TYPE_CHECKING:
    from scalelab.laws.validate import Holdout

BLOCKS, STARTS = 4, 8  # the grid of exponents is cut into BLOCKS x BLOCKS; the best STARTS blocks give a start each
COARSE_GRID = np.geomspace(0.1, 1.0, 8)  # each bootstrap resample's own second start
AGREE = 1e-6  # relative excess of the objective up to which a start has found the optimum


class Law:
    """A scaling law. Stateless: `fit` returns the result.

    A form defines `name`, `parameters`, `inputs` (roles of the columns it takes), `equation`, `source`, `problem` and
    `evaluate`; where it has a compute-optimal allocation also `optimum` and `exponents`.
    """

    name: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    equation: str
    source: str

    def problem(self, columns: Mapping[str, np.ndarray]) -> PowerSum:
        """The regression of these columns (by role, loss included) for the solver."""
        raise NotImplementedError

    def evaluate(self, params: Float[np.ndarray, "R P"], columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "R n"]:
        """The loss at n inputs for each of R parameter vectors."""
        raise NotImplementedError

    def optimum(self, params: Float[np.ndarray, "R P"], flops: Float[np.ndarray, " m"], cost: Cost):
        """N*, D*, loss, each (R, m); see `allocate.optimum`."""
        raise BadInput("law", self.name, "has no compute-optimal allocation of parameters and tokens")

    def exponents(self, params: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R 3"]:
        """a, b, gamma; see `allocate.exponents`."""
        raise BadInput("law", self.name, "has no compute-optimal allocation of parameters and tokens")

    def fit(
        self,
        table: Table,
        *,
        columns: Mapping[str, str] | None = None,
        bootstrap: int | Int[np.ndarray, "draws rows"] = 1000,
        cluster: str | None = None,
        seed: int = 0,
        weights: str | Sequence[float] | np.ndarray | None = None,
        delta: float = 1e-3,
        drop: bool = False,
    ) -> Fit:
        """Fit the law to a table of runs: a pandas DataFrame or a mapping of columns.

        Args:
          columns: role -> column, for tables that do not use RunRecord's names (params, tokens, loss, ...).
          bootstrap: number of draws (0: a point fit without intervals), or an array (draws, rows) of row indices.
          cluster: column whose values are resampled whole; by default each row is a run of its own.
          seed: of the bootstrap. Same seed, same rows: same draws.
          weights: a column, or one positive number per row, that multiplies the row's loss.
          delta: width of the Huber loss on ln L; far above the residuals it is least squares.
          drop: leave rows with NaN, infinite or non-positive values out instead of raising.

        Raises `BadInput` for what cannot be fitted at all; anything that merely makes the result doubtful is in
        `Fit.warnings`.
        """
        if not (np.isfinite(delta) and delta > 0):
            raise BadInput("delta", delta, "must be above 0")
        rows = prepare(table, self.inputs, columns=columns, weights=weights, cluster=cluster, drop=drop)
        checks.enough_rows(rows, self)
        problem = self.problem(rows.columns)

        starts = problem.starts(rows.weights[None], GRID, BLOCKS)[0, :STARTS]
        # A first pass with a wider Huber zone brings far starts near; it need not finish. Starts that crawl along a
        # valley are let go, and counted as not agreeing; the best one is carried to its end.
        lead = minimise(problem, starts, rows.weights, 10 * delta, tolerance=1e-4, max_iterations=30)
        found = minimise(problem, lead.theta, rows.weights, delta, max_iterations=60)
        best = int(found.value.argmin())
        if not found.converged[best]:
            last = minimise(problem, found.theta[best], rows.weights, delta)
            found.theta[best], found.value[best] = last.theta[0], last.value[0]
            found.converged[best], found.iterations[best] = (
                last.converged[0],
                found.iterations[best] + last.iterations[0],
            )
        floor = AGREE * found.value[best] + 1e-24 * rows.weights.sum()
        agreeing = found.converged & (found.value <= found.value[best] + floor)

        counts, redrawn = resample(rows, bootstrap, seed, len(self.parameters))
        samples, boundary = self._refit(problem, found.theta[best], counts * rows.weights, delta)
        theta = found.theta[best]
        record = {
            "law": self.name,
            "equation": self.equation,
            "source": self.source,
            "objective": f"sum of weights x Huber(ln L_model - ln L), delta = {delta:g}",
            "delta": float(delta),
            "value": float(found.value[best]),
            "converged": bool(found.converged[best]),
            "iterations": int(found.iterations[best]),
            "starts": len(starts),
            "agreement": float(agreeing.mean()),
            "rows": len(rows),
            "rows_in_table": len(rows.position),
            "weights": "all 1" if weights is None else (weights if isinstance(weights, str) else "given"),
            "bootstrap": "pairs" if cluster is None else f"clusters of {cluster}",
            "draws": len(counts),
            "draws_failed": int((~np.isfinite(samples).all(1)).sum()),
            "draws_at_boundary": int(boundary.sum()),
            "draws_redrawn": redrawn,
            "seed": int(seed),
            "cluster": cluster,
            "columns": dict(columns or {}),
            "data_sha256": rows.digest(self.inputs),
            **provenance(),
        }
        fit = Fit(self, rows, problem.natural(theta[None])[0], samples, list(rows.notices), record)
        for notice in checks.of_fit(fit, problem, theta):
            fit.add(notice)
        return fit

    def _refit(self, problem: PowerSum, optimum: np.ndarray, weights: np.ndarray, delta: float):
        """Each resample's own optimum, the better of two starts: the point fit, and its own best coarse grid point."""
        if not len(weights):
            return np.empty((0, len(self.parameters))), np.zeros(0, bool)
        warm = minimise(problem, np.broadcast_to(optimum, (len(weights), len(optimum))), weights, delta)
        own = problem.starts(weights, COARSE_GRID, 1)[:, 0]
        cold = minimise(problem, own, weights, delta)
        better = cold.converged & ((cold.value < warm.value) | ~warm.converged)
        theta = np.where(better[:, None], cold.theta, warm.theta)
        boundary = ((theta <= problem.lower) | (theta >= problem.upper)).any(1)
        samples = problem.natural(theta)
        identified = (weights > 0).sum(1) >= len(self.parameters)
        samples[~((warm.converged | cold.converged) & identified)] = np.nan
        return samples, boundary


class Fit(Result):
    """A fitted law. Everything comes back as pandas or NumPy; intervals are percentiles of bootstrap draws."""

    kind = "fit"

    def __init__(self, law: Law, rows: Rows, estimate, samples, notices, record):
        super().__init__(law.parameters, estimate, samples, notices, record)
        self.law, self.rows = law, rows
        self._holdouts: dict[float | None, Holdout] = {}

    @property
    def nobs(self) -> int:
        """Rows fitted."""
        return len(self.rows)

    @property
    def converged(self) -> bool:
        return bool(self.record["converged"])

    @property
    def fittedvalues(self) -> pd.Series:
        """The law at the fitted rows, with the table's own index."""
        values = self.law.evaluate(self.estimate[None], self.rows.columns)[0]
        return pd.Series(values, index=self.rows.index, name="loss")

    @property
    def resid(self) -> pd.Series:
        """ln(loss) - ln(law): positive where a run is worse than the law says."""
        return pd.Series(np.log(self.rows.columns["loss"]), index=self.rows.index, name="resid") - np.log(
            self.fittedvalues
        )

    def predict(self, table: Table) -> pd.Series:
        """The loss at the table's inputs. A far extrapolation adds to `warnings`."""
        columns, index = inputs_of(table, self.law.inputs, self.record["columns"])
        checks.extrapolation(self, columns)
        return pd.Series(self.law.evaluate(self.estimate[None], columns)[0], index=index, name="loss")

    def predict_draws(self, table: Table) -> Float[np.ndarray, "draws n"]:
        """The loss at the table's inputs under every bootstrap draw."""
        columns, _ = inputs_of(table, self.law.inputs, self.record["columns"])
        return self.law.evaluate(self.samples, columns)

    def optimal(
        self, C: float | Sequence[float] | np.ndarray, flops_per_param_token: Cost = 6.0
    ) -> pd.Series | pd.DataFrame:
        """The compute-optimal parameters, tokens and loss for a training budget of C FLOPs, with 95 % intervals.

        `flops_per_param_token` is k in C = k N D, or a function from N to FLOPs per token (as
        `laws.flops_per_token(table)` gives from measured runs). A Series for one budget, a DataFrame for many, with
        `flops, params, params_lower, params_upper, tokens, ..., loss, ...`. NaN, and a warning, where the loss has
        no interior optimum.
        """
        budgets = np.atleast_1d(np.asarray(C, dtype=np.float64))
        if budgets.ndim != 1 or not (np.isfinite(budgets) & (budgets > 0)).all():
            raise BadInput("C", C, "must be positive FLOPs, one number or a list of them")
        frame = self.optima(budgets, flops_per_param_token)
        at = {role: np.asarray(frame[role]) for role in ("params", "tokens")}
        checks.no_optimum(self, budgets, at["params"])
        found = np.isfinite(at["params"])
        if found.any():
            checks.extrapolation(self, {role: values[found] for role, values in at.items()}, budgets[found])
        return frame if np.ndim(C) else frame.iloc[0].rename(float(budgets[0]))

    def optima(self, flops: Float[np.ndarray, " m"], flops_per_param_token: Cost = 6.0) -> pd.DataFrame:
        """As `optimal`, for figures: adds no warnings, however far the budgets lie."""
        point = self.law.optimum(self.estimate[None], flops, flops_per_param_token)
        drawn = self.law.optimum(self.samples, flops, flops_per_param_token)
        out = {"flops": flops}
        for name, value, samples in zip(("params", "tokens", "loss"), point, drawn, strict=True):
            out[name] = value[0]
            out[f"{name}_lower"], out[f"{name}_upper"] = self.interval(samples)
        return pd.DataFrame(out)

    def allocation(self, level: float = 0.95) -> pd.DataFrame:
        """a, b, gamma of N* ~ C^a, D* ~ C^b, L* - E ~ C^-gamma under C = k N D, with intervals."""
        lower, upper = self.interval(self.law.exponents(self.samples), level)
        point = self.law.exponents(self.estimate[None])[0]
        return pd.DataFrame({"estimate": point, "lower": lower, "upper": upper}, index=["a", "b", "gamma"])

    def holdout(self, cut: float | None = None) -> Holdout:
        """Refit without the runs of at least `cut` FLOPs and predict them; by default the largest budget's runs."""
        if cut not in self._holdouts:
            self._holdouts[cut] = validate.holdout(self, cut)
        return self._holdouts[cut]

    def summary(self, level: float = 0.95) -> str:
        """Law, data, objective, parameters with intervals, allocation, hold-out and warnings, as text."""
        r = self.record
        lines = [
            f"{self.law.name}: {self.law.equation}",
            f"{r['rows']} of {r['rows_in_table']} rows; {r['objective']} = {r['value']:.10g}",
            f"{'converged' if r['converged'] else 'NOT CONVERGED'} in {r['iterations']} iterations; "
            f"{r['agreement']:.0%} of {r['starts']} starts agree; "
            f"{r['draws']} bootstrap draws ({r['bootstrap']}, seed {r['seed']}, {r['draws_failed']} failed)",
            "",
            *self.parameter_lines(level),
            "",
        ]
        for name, row in self.allocation(level).iterrows():
            symbol = {"a": "N* ~ C^a", "b": "D* ~ C^b", "gamma": "L* - E ~ C^-gamma"}[str(name)]
            interval = "" if np.isnan(row.lower) else f" {row.lower:12.5g} {row.upper:12.5g}"
            lines.append(f"{name:>8} {row.estimate:12.5g}{interval}   {symbol}")
        lines += ["", self.holdout().summary(), "", *self.notice_lines()]
        return "\n".join(lines)

    @property
    def plot(self) -> Plot:
        """Figures: each method takes and returns a matplotlib `ax`."""
        return Plot(self)

    def document(self) -> dict[str, Any]:
        rows = self.rows
        stored = {
            "columns": dict(rows.columns),
            "index": list(rows.index),
            "names": rows.names,
            "weights": rows.weights,
            "clusters": rows.clusters,
            "position": rows.position,
        }
        return super().document() | {"law": self.law.name, "rows": jsonable(stored)}


class Plot:
    """`fit.plot.surface(ax)` and so on; matplotlib is imported on the first call."""

    def __init__(self, fit: Fit):
        self._fit = fit

    def _draw(self, function: str, *args: Any) -> Any:
        from scalelab import plots

        draw: Callable[..., Any] = getattr(plots, function)
        return draw(*args)

    def surface(self, ax: Any = None) -> Any:
        """Loss over N and D with the compute-optimal frontier."""
        return self._draw("surface", self._fit, None, ax)

    def residuals(self, ax: Any = None) -> Any:
        """Measured against fitted loss."""
        return self._draw("measured", self._fit, ax)

    def frontier(self, flops: Sequence[float], ax: Any = None) -> Any:
        """N* and D* against C (FLOPs, lowest and highest), with bands."""
        return self._draw("allocation", {self._fit.law.name: self._fit}, flops, ax)

    def holdout(self, ax: Any = None) -> Any:
        """The held-out runs, predicted and measured."""
        return self._draw("holdout", self._fit, ax)
