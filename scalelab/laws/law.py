"""Law: a form, its parameters and its columns, and how it is fitted to a table.

A form (one file in `forms/`) says what its parameters and inputs are and computes its target from them; everything
else, from bad input to intervals, is here once for all forms.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws import allocate, checks
from scalelab.laws import objective as objectives
from scalelab.laws.allocate import Cost
from scalelab.laws.fit import Fit, Options
from scalelab.laws.notices import Notice
from scalelab.laws.objective import HUBER, Objective
from scalelab.laws.parameter import Parameter
from scalelab.laws.prior import Informed, checked, noise
from scalelab.laws.regression import Constrained, FormRegression, Regression
from scalelab.laws.resample import Resamples
from scalelab.laws.result import provenance
from scalelab.laws.search import AGREE, polish, refit
from scalelab.laws.table import Rows, Table, inputs_of, prepare

STARTS = 8


class Law(ABC):
    """A scaling law. Stateless: `fit` returns the result.

    A form defines `name`, `parameters`, `inputs` (roles of the columns it takes), `target` (role of what it
    predicts), `equation`, `source`, `objective` (its source's) and `formula`. Where there is a faster or better
    conditioned way than derivatives of the formula it also defines `problem`; where it allocates compute in its own
    way, `optimum` and `exponents`.
    """

    name: str
    parameters: Mapping[str, Parameter]
    inputs: tuple[str, ...]
    target: str = "loss"
    measured: tuple[str, ...] = ()  # roles that a fit needs beside inputs and target, and a prediction does not
    equation: str
    source: str
    objective: Objective = HUBER
    may_be_zero: tuple[str, ...] = ()  # roles whose values may be 0 or negative (a sparsity, a logarithm, ...)
    ranges: Mapping[str, tuple[float, float]] = types.MappingProxyType({})  # role -> lowest and highest sensible value
    group: str | None = None  # role of a label (family, corpus, task) that the formula takes as integers
    published: Mapping[str, Mapping[str, float]] = types.MappingProxyType({})  # who -> its constants, to compare with
    # what the class was called with, by name or by place, for the fit's file
    arguments: Mapping[str, Any] | Sequence[str] = ()
    scale: tuple[str, ...] = ()  # roles whose product orders rows by size, for hold-out; default: compute, or inputs[0]
    fewest_tokens: float = 1.0  # per parameter: below, an optimum is taken for the spurious one of a flexible surface
    paid: str = "params"  # role of the parameters that compute is paid for: `optimal` chooses these and tokens

    @abstractmethod
    def formula(self, p: Any, x: Any) -> Any:
        """The target from parameters p.name and columns x.role, in NumPy operations that broadcast.

        It is called with arrays, p of shape (draws, 1) and x of shape (rows,), and with `Jet`s for p.
        """

    def table_of(self, table: Table, columns: Mapping[str, str], fitting: bool = False) -> Table:
        """The table with the law's inputs as columns, a row for each value wanted; `columns` is role -> column.

        For laws whose input is no column (a whole learning-rate schedule, say) but can be computed from the table.
        """
        return table

    def columns_of(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the formula sees as x: the input columns, or what a form computes from them once."""
        return {role: columns[role] for role in self.inputs}

    def size(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str] | None:
        """What orders rows by how far out they lie (above 0), and its name, where no product of columns does."""
        return None

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        """The regression of these columns (by role, target included), residuals on "log" or "value"."""
        return FormRegression(self, columns, on)

    def evaluate(self, params: Float[np.ndarray, "R P"], columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "R n"]:
        """The target at n inputs for each of R parameter vectors."""
        x = types.SimpleNamespace(**self.columns_of(columns))
        p = types.SimpleNamespace(**{name: params[:, i, None] for i, name in enumerate(self.parameters)})
        with np.errstate(all="ignore"):  # draws may be wild
            value = self.formula(p, x)
        rows = len(next(iter(columns.values())))
        return np.broadcast_to(value, (len(params), rows)) * 1.0

    def evaluate_each(
        self, params: Float[np.ndarray, "n P"], columns: Mapping[str, np.ndarray]
    ) -> Float[np.ndarray, " n"]:
        """The target at n inputs, each with its own parameter vector."""
        x = types.SimpleNamespace(**self.columns_of(columns))
        p = types.SimpleNamespace(**{name: params[None, :, i] for i, name in enumerate(self.parameters)})
        with np.errstate(all="ignore"):
            value = self.formula(p, x)
        return np.broadcast_to(value, (1, len(params)))[0] * 1.0

    def predict(self, constants: str | Mapping[str, float], table: Table) -> pd.Series:
        """The target at a table's inputs under given constants: a name in `published`, or parameter -> value.

        Published constants hold for their source's data, tokenizer and way of counting; they are no fit to yours.
        """
        if isinstance(constants, str):
            if constants not in self.published:
                raise BadInput("constants", constants, f"must be one of {', '.join(self.published) or 'none'}")
            constants = self.published[constants]
        missing = [name for name in self.parameters if name not in constants]
        if missing:
            raise BadInput("constants", list(constants), f"lack {', '.join(missing)}")
        table = self.table_of(table, {})
        columns, index = inputs_of(table, self.inputs, {}, self.may_be_zero, ranges=self.ranges)
        params = np.array([[float(constants[name]) for name in self.parameters]])
        return pd.Series(self.evaluate(params, columns)[0], index=index, name=self.target)

    def findings(self, fit: Fit) -> Iterable[Notice]:
        """What only this form can have wrong with it; needs no refit."""
        return ()

    # ---------------------------------------------------------------------------------------- allocation

    @property
    def needs(self) -> tuple[str, ...]:
        """Roles of the columns that a table must have, beside the target."""
        return (*self.inputs, *self.measured)

    @property
    def allocates(self) -> bool:
        """Whether there is a compute-optimal choice of parameters and tokens."""
        return {self.paid, "tokens"} <= set(self.inputs)

    def optimum(
        self, params: Float[np.ndarray, "R P"], flops: Float[np.ndarray, " m"], cost: Cost, **others: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N*, D*, loss, each (R, m); NaN where there is no interior minimum. See `allocate.search`.

        `others` are the law's further inputs (experts, streams, ...), held at one value.
        """
        if not self.allocates:
            raise BadInput("law", self.name, "has no compute-optimal allocation of parameters and tokens")
        missing = [role for role in self.inputs if role not in (self.paid, "tokens", *others)]
        if missing:
            raise BadInput("optimal", missing, f"{self.name} needs a value for each: optimal(C, {missing[0]}=...)")
        return allocate.search(self, params, flops, cost, others)

    def exponents(self, params: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R 3"] | None:
        """a, b, gamma of N* ~ C^a, D* ~ C^b, L* - E ~ C^-gamma, where they are constants; None otherwise."""
        return None

    # ---------------------------------------------------------------------------------------- fit

    def fit(
        self,
        table: Table,
        *,
        columns: Mapping[str, str] | None = None,
        bootstrap: int | Int[np.ndarray, "draws rows"] = 1000,
        cluster: str | None = "auto",
        method: str = "pairs",
        stratify: str | None = None,
        seed: int = 0,
        weights: str | Sequence[float] | np.ndarray | None = None,
        objective: str | Objective | None = None,
        delta: float | str | None = None,
        fixed: Mapping[str, float] | None = None,
        tied: Mapping[str, str] | None = None,
        priors: Mapping[str, tuple[float, float]] | None = None,
        starts: int | None = None,
        drop: bool = False,
    ) -> Fit:
        """Fit the law to a table of runs: a pandas DataFrame or what has `to_pandas`, a mapping of columns, or the
        path of a .csv, .jsonl or .parquet file.

        Args:
          columns: role -> column, for tables that do not use RunRecord's names (params, tokens, loss, ...).
          bootstrap: number of draws (0: a point fit without intervals), or an array (draws, rows) of row indices.
          cluster: column whose values are resampled whole. "auto": `run`, or `id`, where rows share one. None: rows.
          method: of the bootstrap: pairs, wild or parametric; see `resample.Resamples`.
          stratify: column within whose values rows (or clusters) are resampled.
          seed: of the bootstrap. Same seed, same rows: same draws.
          weights: a column, or one positive number per row, that multiplies the row's loss.
          objective: by name or a `laws.Objective`; by default the one of the law's source.
          delta: width of a Huber (or scale of a Student) objective; "auto" takes it from the residuals.
          fixed: parameters held at a value. tied: parameter -> the parameter that it equals.
          priors: parameter -> (mean, standard deviation) of what is known of it from elsewhere: {"E": (1.69, 0.05)}.
            Weighed against the rows by the noise of their residuals (`prior.Informed`); each bootstrap draw draws it.
          starts: how many starting points to polish.
          drop: leave rows with NaN, infinite or non-positive values out instead of raising.

        Raises `BadInput` for what cannot be fitted at all; anything that merely makes the result doubtful is in
        `Fit.warnings`.
        """
        options = Options(
            objective=objectives.parse(objective, self.objective, delta), fixed=dict(fixed or {}),
            tied=dict(tied or {}), priors=checked(priors), method=method, seed=int(seed), starts=starts or STARTS,
        )  # fmt: skip
        rows = prepare(
            self.table_of(table, columns or {}, fitting=True), (*self.inputs, *self.measured), target=self.target,
            columns=columns, weights=weights, cluster=cluster, stratify=stratify, drop=drop,
            may_be_zero=self.may_be_zero, group=self.group, ranges=self.ranges,
        )  # fmt: skip
        about = {
            "weights": "all 1" if weights is None else (weights if isinstance(weights, str) else "given"),
            "columns": dict(columns or {}),
        }
        return self.fit_rows(rows, options, bootstrap, about)

    def fit_rows(
        self, rows: Rows, options: Options, bootstrap: int | np.ndarray | Resamples = 0,
        about: Mapping[str, Any] | None = None, near: Float[np.ndarray, " P"] | None = None,
    ) -> Fit:  # fmt: skip
        """Fit rows that are prepared already. `near`: parameters to start from too, as those of a kindred fit.
        `bootstrap` may be resamples drawn elsewhere (for several laws at once)."""
        free = len(self.parameters) - len(options.fixed) - len(options.tied)
        checks.enough_rows(rows, self, free)
        priors, options = options.priors, options.replace(priors={}, noise=0.0)
        problem = self._regression(rows, options)
        resamples = bootstrap
        if not isinstance(resamples, Resamples):
            resamples = Resamples(rows, resamples, options.seed, free, options.method, rows.strata)
        goal = options.objective
        starts = problem.starts(rows.weights, goal, options.starts)
        if near is not None:
            starts = np.concatenate([problem.internal(near[None]), starts])
        if goal.delta is None and goal.kind != "squares":
            first = polish(problem, starts, rows.weights, objectives.first_pass(goal, problem.data), self.name)
            goal = objectives.with_scale(goal, problem.model(first.theta[[0]])[0] - problem.data)
            starts = np.concatenate([first.theta[:1], starts])
            options = options.replace(objective=goal)
        found = polish(problem, starts, rows.weights, goal, self.name)
        alone = None
        if priors:  # what is known is weighed against the noise of the rows about what they alone say
            alone, lowest = found.theta[:1], found.value[0]
            residual = problem.model(alone)[0] - problem.data
            options = options.replace(priors=priors, noise=noise(goal, residual, rows.weights, free))
            problem = self._regression(rows, options)
            found = polish(problem, np.concatenate([alone, starts]), rows.weights, goal, self.name)
            strain = 2 * max(0.0, found.value[0] - lowest) / options.noise if options.noise else 0.0
            about = {
                "without_priors": problem.natural(alone)[0].tolist(), "prior_strain": float(strain), **(about or {}),
            }  # fmt: skip
        theta = found.theta[0]
        agreeing = found.converged & (
            found.value
            <= found.value[0] * (1 + AGREE) + 1e-24 * rows.weights.sum() * max(1.0, np.abs(problem.data).max()) ** 2
        )
        theta_drawn, boundary = refit(problem, found, rows.weights, goal, resamples, free, self.name, alone)
        samples = problem.natural(theta_drawn)
        record = {
            "law": self.name,
            "equation": self.equation,
            "source": self.source,
            "objective": str(goal),
            "delta": goal.delta,
            "options": options.document(),
            "value": float(found.value[0]),
            "converged": bool(found.converged[0]),
            "iterations": int(found.iterations[0]),
            "starts": len(starts),
            "agreement": float(agreeing.mean()),
            "agreeing": int(agreeing.sum()),
            "free": free,
            "rows": len(rows),
            "rows_in_table": len(rows.position),
            "weights": "all 1",
            "columns": {},
            "cluster": rows.cluster,
            "bootstrap": resamples.name + (f" of clusters ({rows.cluster})" if rows.clusters is not None else ""),
            "draws": resamples.draws,
            "draws_failed": int((~np.isfinite(samples).all(1)).sum()),
            "draws_at_boundary": int(boundary.sum()),
            "draws_redrawn": resamples.redrawn,
            "seed": options.seed,
            "data_sha256": rows.digest((*self.inputs, *self.measured, self.target)),
            **provenance(),
            **(about or {}),
        }
        estimate = problem.natural(theta[None])[0]
        return Fit(self, rows, options, estimate, samples, list(rows.notices), record, (problem, theta))

    def _regression(self, rows: Rows, options: Options) -> Regression:
        problem = self._constrained(rows, options)
        return Informed(problem, self, options.priors, options.noise) if options.priors else problem

    def _constrained(self, rows: Rows, options: Options) -> Regression:
        problem = self.problem(rows.columns, options.objective.on)
        if options.fixed or options.tied:
            specs = list(self.parameters.values())
            problem = Constrained(problem, list(self.parameters), specs, options.fixed, options.tied)
        return problem


class Defined(Law):
    """A law made by `define`."""

    def __init__(self, name: str, formula: Callable[[Any, Any], Any], **attributes: Any):
        self.name, self._formula = name, formula
        for key, value in attributes.items():
            setattr(self, key, value)

    def formula(self, p: Any, x: Any) -> Any:
        return self._formula(p, x)


def define(
    name: str,
    formula: Callable[[Any, Any], Any],
    *,
    inputs: Sequence[str],
    target: str = "loss",
    objective: str | Objective = HUBER,
    equation: str = "",
    source: str = "defined by the user",
    may_be_zero: Sequence[str] = (),
    **parameters: Parameter,
) -> Law:
    """A law of your own, with everything that the built-in ones have.

        mine = laws.define("mine", lambda p, x: p.E + p.A * x.params**-p.alpha, inputs=("params",),
                           E=laws.positive(0.5, 5), A=laws.positive(1, 1e4), alpha=laws.free(0.05, 1))
        mine.fit(table)

    `formula(p, x)` computes the target from parameters `p.name` and columns `x.role` in NumPy operations (+, *, **,
    np.exp, np.log, np.maximum, np.where, np.sum, ...), which also carry its derivatives. Each parameter says its sign
    and where to look for it: `positive`, `negative` or `free`; `linear=True` where the law is linear in it.
    """
    if not parameters:
        raise BadInput("parameters", "none", "name at least one: alpha=laws.free(0.05, 1)")
    wrong = [k for k, v in parameters.items() if not isinstance(v, Parameter)]
    if wrong:
        raise BadInput(f"parameter {wrong[0]}", parameters[wrong[0]], "must be laws.positive, negative or free")
    if not inputs:
        raise BadInput("inputs", inputs, "name the columns that the formula takes")
    return Defined(
        name, formula, parameters=parameters, inputs=tuple(inputs), target=target,
        objective=objectives.parse(objective, HUBER, None), equation=equation or name, source=source,
        may_be_zero=tuple(may_be_zero),
    )  # fmt: skip
