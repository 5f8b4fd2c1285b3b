"""Fit: what comes back from fitting a law. Studies that need refits run when they are first asked for."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws import calibrate, card, checks, diagnose, intervals, profiles, sensitivity, validate
from scalelab.laws.allocate import Cost
from scalelab.laws.figures import Plot
from scalelab.laws.notices import Notice
from scalelab.laws.objective import Objective
from scalelab.laws.prediction import Prediction
from scalelab.laws.result import Result, jsonable
from scalelab.laws.shown import Notices
from scalelab.laws.table import Rows, Table, inputs_of

if TYPE_CHECKING:
    from scalelab.laws.calibrate import Calibration
    from scalelab.laws.law import Law
    from scalelab.laws.posterior import Posterior
    from scalelab.laws.profiles import Plane, Profile
    from scalelab.laws.regression import Regression
    from scalelab.laws.validate import Expanding, Holdout


@dataclasses.dataclass(frozen=True)
class Options:
    """How a law is fitted; with the rows, all that a refit needs."""

    objective: Objective
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    priors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # parameter -> mean, sd
    noise: float = 0.0  # of the rows, in units of the objective: what a prior is weighed against; see `prior.noise`
    method: str = "pairs"
    seed: int = 0
    starts: int = 8

    def replace(self, **changes: Any) -> Options:
        return dataclasses.replace(self, **changes)

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def restore(cls, document: Mapping[str, Any]) -> Options:
        priors = {name: tuple(prior) for name, prior in document.get("priors", {}).items()}
        return cls(**{**document, "objective": Objective(**document["objective"]), "priors": priors})


class Fit(Result):
    """A fitted law. Everything comes back as pandas or NumPy; intervals are percentiles of bootstrap draws."""

    kind = "fit"

    def __init__(
        self,
        law: Law,
        rows: Rows,
        options: Options,
        estimate: Float[np.ndarray, " P"],
        samples: Float[np.ndarray, "R P"],
        notices: list[Notice],
        record: dict[str, Any],
        solved: tuple[Regression, Float[np.ndarray, " free"]] | None = None,
    ):
        super().__init__(tuple(law.parameters), estimate, samples, notices, record)
        self.law, self.rows, self.options = law, rows, options
        self._solved = solved
        self._holdouts: dict[float | None, Holdout] = {}
        self._examined = self._studied = False

    @property
    def solved(self) -> tuple[Regression, Float[np.ndarray, " free"]]:
        """The regression problem and its optimum in the solver's coordinates."""
        if self._solved is None:
            problem = self.law._regression(self.rows, self.options)
            self._solved = (problem, problem.internal(self.estimate[None])[0])
        return self._solved

    # ---------------------------------------------------------------------------------------- findings

    @property
    def notices(self) -> list[Notice]:
        """Findings that need no refit; `warnings` adds the rest."""
        if not self._examined:
            self._examined = True
            for notice in checks.of_solution(self):
                self.add(notice)
        return self._notices

    @property
    def warnings(self) -> Notices:
        """All findings about the data and the fit, worst first. The first access runs the refits that some need."""
        if not self._studied:
            self._studied = True
            for notice in checks.of_studies(self):
                self.add(notice)
        return super().warnings

    # ---------------------------------------------------------------------------------------- numbers

    @property
    def nobs(self) -> int:
        """Rows fitted."""
        return len(self.rows)

    @property
    def converged(self) -> bool:
        return bool(self.record["converged"])

    @property
    def observed(self) -> np.ndarray:
        """The target at the fitted rows."""
        return self.rows.columns[self.law.target]

    @functools.cached_property
    def fittedvalues(self) -> pd.Series:
        """The law at the fitted rows, with the table's own index."""
        values = self.law.evaluate(self.estimate[None], self.rows.columns)[0]
        return pd.Series(values, index=self.rows.index, name=self.law.target)

    @property
    def resid(self) -> pd.Series:
        """Data minus law, of logarithms where the objective takes them: positive where a run is worse than the law."""
        fitted = self.fittedvalues.to_numpy()
        data = self.observed
        values = np.log(data) - np.log(fitted) if self.options.objective.on == "log" else data - fitted
        return pd.Series(values, index=self.rows.index, name="resid")

    def predict(self, table: Table) -> pd.Series:
        """The target at the table's inputs. A far extrapolation adds to `warnings`."""
        columns, index = self._inputs(table)
        checks.extrapolation(self, columns)
        values = self.law.evaluate(self.estimate[None], columns)[0]
        checks.floor(self, values, "at the inputs asked for")
        return pd.Series(values, index=index, name=self.law.target)

    def predict_draws(self, table: Table) -> Float[np.ndarray, "draws n"]:
        """The target at the table's inputs under every bootstrap draw."""
        return self.law.evaluate(self.samples, self._inputs(table)[0])

    def _inputs(self, table: Table) -> tuple[dict[str, np.ndarray], pd.Index]:
        law, columns = self.law, self.record["columns"]
        table = law.table_of(table, columns)
        return inputs_of(table, law.inputs, columns, law.may_be_zero, law.group, self.rows.labels, law.ranges)

    def get_prediction(self, table: Table) -> Prediction:
        """The law's curve and new runs at the table's inputs, each with its own interval."""
        return Prediction(self, table)

    def optimal(
        self, C: float | Sequence[float] | np.ndarray, flops_per_param_token: Cost = 6.0, **others: float
    ) -> pd.Series | pd.DataFrame:
        """The compute-optimal parameters, tokens and loss for a training budget of C FLOPs, with 95 % intervals.

        `flops_per_param_token` is k in C = k N D, or a function from N to FLOPs per token (as
        `laws.flops_per_token(table)` gives from measured runs). `others` are further inputs of the law (experts=8,
        streams=4, ...). A Series for one budget, a DataFrame for many, with `flops, params, params_lower,
        params_upper, tokens, ..., loss, ...` (the last by the name of the law's target). NaN, and a warning, where the
        loss has no interior optimum.
        """
        budgets = np.atleast_1d(np.asarray(C, dtype=np.float64))
        if budgets.ndim != 1 or not (np.isfinite(budgets) & (budgets > 0)).all():
            raise BadInput("C", C, "must be positive FLOPs, one number or a list of them")
        frame = self.optima(budgets, flops_per_param_token, **others)
        at = {role: np.asarray(frame[role]) for role in ("params", "tokens")}
        checks.no_optimum(self, budgets, at["params"])
        found = np.isfinite(at["params"])
        if found.any():
            checks.extrapolation(self, {role: values[found] for role, values in at.items()}, budgets[found])
            checks.floor(self, np.asarray(frame[self.law.target]), "at the budgets asked for")
        return frame if np.ndim(C) else frame.iloc[0].rename(float(budgets[0]))

    def optima(
        self, flops: Float[np.ndarray, " m"], flops_per_param_token: Cost = 6.0, **others: float
    ) -> pd.DataFrame:
        """As `optimal`, for figures: adds no warnings, however far the budgets lie."""
        point = self.law.optimum(self.estimate[None], flops, flops_per_param_token, **others)
        drawn = self.law.optimum(self.samples, flops, flops_per_param_token, **others)
        out = {"flops": flops}
        for name, value, samples in zip(("params", "tokens", self.law.target), point, drawn, strict=True):
            out[name] = value[0]
            out[f"{name}_lower"], out[f"{name}_upper"] = self.interval(samples)
        return pd.DataFrame(out)

    def allocation(self, level: float = 0.95) -> pd.DataFrame:
        """a, b, gamma of N* ~ C^a, D* ~ C^b, L* - E ~ C^-gamma under C = k N D, with intervals."""
        point = self.law.exponents(self.estimate[None])
        if point is None:
            raise BadInput("law", self.law.name, "has no constant allocation exponents; ask optimal(C) at several C")
        drawn = self.law.exponents(self.samples)
        assert drawn is not None
        lower, upper = self.interval(drawn, level)
        return pd.DataFrame({"estimate": point[0], "lower": lower, "upper": upper}, index=["a", "b", "gamma"])

    def derive(self, quantity: Callable[[Any], Any], level: float = 0.95) -> pd.Series | pd.DataFrame:
        """Any function of the parameters, with its interval: estimate, lower, upper.

        `quantity(p)` takes p.name of shape (draws, 1) for each parameter and gives one number per draw, (draws, 1), or
        several, (draws, m): `fit.derive(lambda p: p.beta / (p.alpha + p.beta))`. A Series, or a DataFrame with a row
        per number.
        """

        def values(params: np.ndarray) -> np.ndarray:
            p = types.SimpleNamespace(**{name: params[:, i, None] for i, name in enumerate(self.names)})
            with np.errstate(all="ignore"):  # draws may be wild
                return np.asarray(quantity(p), float)

        lower, upper = self.interval(values(self.samples), level)
        frame = pd.DataFrame({"estimate": values(self.estimate[None])[0], "lower": lower, "upper": upper})
        return frame if len(frame) > 1 else frame.iloc[0].rename("derived")

    # ---------------------------------------------------------------------------------------- refits

    def refit(
        self, rows: Rows | None = None, *, objective: Objective | None = None, bootstrap: int | np.ndarray = 0
    ) -> Fit:
        """The same law fitted the same way, to other rows or with another objective."""
        options = self.options if objective is None else self.options.replace(objective=objective)
        about = {"columns": self.record["columns"]}
        return self.law.fit_rows(self.rows if rows is None else rows, options, bootstrap, about, near=self.estimate)

    def holdout(self, cut: float | None = None) -> Holdout:
        """Refit without the runs of at least `cut` FLOPs and predict them; by default the largest budget's runs.

        For a law without compute, `cut` is in the units of its scale (`Law.scale`, or its first input).
        """
        if cut not in self._holdouts:
            self._holdouts[cut] = validate.holdout(self, cut)
        return self._holdouts[cut]

    def expanding(self, cuts: Sequence[float] | None = None) -> Expanding:
        """Hold-outs at several cuts (by default where budgets begin), each predicting every larger run, and the error
        against the distance in decades."""
        return validate.expanding(self, cuts)

    def leave_group_out(self, group: str) -> pd.DataFrame:
        """Each group predicted by a fit to the others: mean absolute relative error of the law and of the baselines.

        `group`: a role with few values (family, tokenizer, seed, ...), the fit's cluster column, or "budget".
        """
        return validate.leave_group_out(self, group)

    def leave_one_out(self, cluster: str | None = None) -> pd.DataFrame:
        """The parameters without each row; with `cluster` (as `group` in `leave_group_out`), without each group."""
        return intervals.leave_one_out(self, cluster)

    def profile(self, name: str, level: float = 0.95) -> Profile:
        """The objective minimised over the other parameters along values of one, and its interval; see `Profile`.

        Raises `BadInput` where the fit has not converged, or the law's solver cannot hold that parameter.
        """
        return profiles.profile(self, name, level)

    def plane(self, first: str, second: str, level: float = 0.95) -> Plane:
        """The objective minimised over all but two parameters, on a grid of these, and their joint region; see `Plane`.

        Raises `BadInput` as `profile` does.
        """
        return profiles.plane(self, first, second, level)

    @functools.cached_property
    def standard_errors(self) -> pd.Series:
        """Of the parameters, by influence functions (sandwich, by clusters where the rows have them): no refits."""
        return intervals.standard_errors(self)

    def conf_int(self, level: float = 0.95, method: str = "percentile", *, alpha: float | None = None) -> pd.DataFrame:
        """Intervals of the parameters, columns `lower` and `upper`; NaN where the fit is not `ok`.

        method: "percentile" of the bootstrap draws (NaN without draws), or "profile" of the objective.
        alpha: statsmodels' name for 1 - level.
        """
        level = level if alpha is None else 1 - alpha
        if method == "percentile":
            return super().conf_int(level)
        if method != "profile":
            raise BadInput("method", method, "must be percentile or profile")
        ends = {name: (value, value) for name, value in self.options.fixed.items()}
        for name in self.names:
            if name not in ends:
                found = self.profile(name, level) if self.ok else None
                ends[name] = (found.lower, found.upper) if found else (np.nan, np.nan)
        return pd.DataFrame([ends[n] for n in self.names], columns=["lower", "upper"], index=list(self.names))

    def sensitivity(self, C: float | None = None, drop: Sequence[int] = sensitivity.DROPS) -> pd.DataFrame:
        """How parameters, N*, D/N* and loss at C depend on what one may choose: the k highest losses dropped (`drop`)
        x objective and delta x kind of N (where the table has `params_non_embedding`).

        C: budget to look at (C = 6 N D), by default ten times the largest run's; a law that allocates nothing shows its
        target at the largest run.
        """
        return sensitivity.sensitivity(self, C, drop)

    def trim_drift(self, C: float | None = None) -> pd.DataFrame:
        """The fit as more of the highest losses are dropped, and `z`, how far it drifts in standard errors."""
        return sensitivity.trim_drift(self, C)

    def calibrate(self, n: int = 200, level: float = 0.95, C: float | None = None, seed: int = 0) -> Calibration:
        """Simulate n tables from the fit on its own inputs, fit each the same way, and count how often the intervals
        hold the parameters and the loss at the compute-optimal point of C (default: ten times the largest run)."""
        return calibrate.calibrate(self, n, level, C, seed)

    def beside_isoflop(self) -> pd.DataFrame:
        """N* of IsoFLOP parabolas beside the law's, per budget, with intervals and whether they overlap.

        Raises `BadInput` where the runs are no IsoFLOP sweep (four sizes or more at each budget).
        """
        from scalelab.laws import studies

        frame = studies.beside_isoflop(self)
        if frame is None:
            raise BadInput("table", f"{self.nobs} rows", "are no IsoFLOP sweep in N and D: 4 sizes or more per budget")
        return frame

    def published(self) -> pd.DataFrame:
        """The constants of the form's sources beside this fit's, with their error on these rows. Adds a note that they
        hold for their own data and counting."""
        if not self.law.published:
            raise BadInput("law", self.law.name, "has no published constants")
        frame = pd.DataFrame({"this fit": self.params} | {k: pd.Series(v) for k, v in self.law.published.items()})
        values = self.law.evaluate(frame.T[list(self.names)].to_numpy(float), self.rows.columns)
        frame.loc["mean error here"] = np.abs(values / self.observed - 1).mean(1)
        checks.stale(self, list(self.law.published))
        return frame

    @property
    def diagnostics(self) -> pd.Series:
        """Numbers about the solution, the residuals and the data; see `diagnose.diagnostics`."""
        return diagnose.diagnostics(self)

    def card(self) -> card.Card:
        """Everything that a reader needs to fit this again: a dict, and Markdown as text."""
        return card.of(self)

    def posterior(self, draws: int = 1000, **options: Any) -> Posterior:
        """The Bayesian posterior, to stand beside the bootstrap; see `laws.posterior`. Needs the extra `bayes`."""
        from scalelab.laws.posterior import posterior

        return posterior(self, draws, **options)

    # ---------------------------------------------------------------------------------------- text

    def summary(self, level: float = 0.95) -> str:
        """Law, data, objective, parameters with intervals, allocation, hold-out and warnings, as text."""
        r = self.record
        lines = [
            f"{self.law.name}: {self.law.equation}",
            f"{r['rows']} of {r['rows_in_table']} rows; {r['objective']} = {r['value']:.10g}",
            f"{'converged' if r['converged'] else 'NOT CONVERGED'} in {r['iterations']} iterations; "
            f"{r['agreement']:.0%} of {r['starts']} starts agree; "
            f"{r['draws']} bootstrap draws ({r['bootstrap']}, seed {r['seed']}, {r['draws_failed']} failed)",
            *[f"held fixed: {name} = {value:g}" for name, value in self.options.fixed.items()],
            *[f"tied: {name} = {other}" for name, other in self.options.tied.items()],
            *[f"prior: {name} = {mean:g} +- {sd:g} (normal)" for name, (mean, sd) in self.options.priors.items()],
            "",
            *self.parameter_lines(level),
            "",
        ]
        if self.law.exponents(self.estimate[None]) is not None:
            for name, row in self.allocation(level).iterrows():
                symbol = {"a": "N* ~ C^a", "b": "D* ~ C^b", "gamma": "L* - E ~ C^-gamma"}[str(name)]
                interval = "" if np.isnan(row.lower) else f" {row.lower:12.5g} {row.upper:12.5g}"
                lines.append(f"{name:>8} {row.estimate:12.5g}{interval}   {symbol}")
            lines.append("")
        lines += [self.holdout().summary(), "", *self.notice_lines()]
        return "\n".join(lines)

    @property
    def plot(self) -> Plot:
        """Figures: each method takes and returns a matplotlib `ax`."""
        return Plot(self)

    def document(self) -> dict[str, Any]:
        self.warnings  # noqa: B018  a file says everything that there is to say
        law = {"law": self.law.name, "arguments": jsonable(self.law.arguments)}
        return super().document() | law | {"rows": jsonable(self.rows.document())}
