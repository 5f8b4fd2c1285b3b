"""Which runs to train next: candidate designs scored by simulation, beside the plain compute-optimal run."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.allocate import Cost, per_token
from scalelab.laws.fit import Fit
from scalelab.laws.notices import Notice
from scalelab.laws.progress import progress
from scalelab.laws.regression import Regression
from scalelab.laws.shown import Notices, Shown, worst_first
from scalelab.laws.simulate import residual_noise
from scalelab.laws.solver import minimise
from scalelab.laws.table import Rows, Table
from scalelab.paths import save

PLAIN, NOTHING = "compute-optimal", "no new runs"
RATIOS = np.geomspace(1 / 8, 8, 13)  # sizes beside the optimal one that a design may choose from
RESAMPLES = 400  # of the simulations, for their Monte-Carlo error


def plan(
    fit: Fit,
    budget: float,
    target: float,
    cost: Cost = 6.0,
    candidates: Mapping[str, Table] | None = None,
    n: int = 400,
    *,
    level: float = 0.95,
    seed: int = 0,
    **others: float,
) -> Plan:
    """Which next runs make the loss and the size at a target compute surest, for a given budget.

    A candidate is scored by simulation. Each of `n` times one of the fit's draws is taken for the truth, the runs that
    there are and the candidate's are drawn from it with the fit's own noise, the law is fitted to all of them, and
    its loss and N* at the target are held against the truth. The width of the interval that contains `level` of these
    errors is the width to expect once the runs are done. All candidates see the same truths and the same noise.

    Args:
      budget: FLOPs for the new runs together. target: FLOPs of the run that is to be predicted.
      cost: k of C = k N D, or FLOPs per token as a function of N.
      candidates: name -> table with `params` (those that compute is paid for: a sparse model's active ones) and
        `tokens`, any number of runs; they should cost about the budget.
        None: `default_designs`: one large run, ladders and IsoFLOP sets of cheaper ones, and the sets that reduce the
        linearised variance at the target most. The compute-optimal run is always among them.
      others: values of the law's further inputs, for the new runs and the target.

    The recommended design is the narrowest in loss if that beats the compute-optimal run by two Monte-Carlo errors, and
    the compute-optimal run otherwise. Raises `BadInput` for what cannot be planned.
    """
    for name, value in (("budget", budget), ("target", target)):
        if not (np.isfinite(value) and value > 0):
            raise BadInput(name, value, "must be positive FLOPs")
    if not fit.law.allocates:
        raise BadInput("fit", fit.law.name, "has no allocation of parameters and tokens to plan")
    if n < 50:
        raise BadInput("n", n, "an interval's width needs 50 simulations or more")
    truths = fit.samples[np.isfinite(fit.samples).all(1)]
    if not fit.ok or len(truths) < 50:
        raise BadInput("fit", f"{len(truths)} draws", "needs a fit that is ok, with 50 bootstrap draws or more")
    designs: dict[str, pd.DataFrame] = {NOTHING: _runs(np.empty(0), np.empty(0), cost)}
    designs[PLAIN] = optimal_run(fit, budget, cost, **others)
    if candidates is None:
        designs |= default_designs(fit, budget, target, cost, **others)
    else:
        designs |= {name: _given(name, table, cost) for name, table in candidates.items()}
    rng = np.random.default_rng(seed)
    truths = truths[rng.permutation(len(truths))[np.arange(n) % len(truths)]]
    most = max(map(len, designs.values()))
    noise = residual_noise(fit, (n, len(fit.rows) + most), rng)
    at = _at_target(fit, truths, target, cost, others)
    errors = {}
    with progress(len(designs), "plan: designs simulated") as advance:
        for name, design in designs.items():
            errors[name] = _simulate(fit, design, truths, noise, target, cost, others) - at
            advance(1)
    return Plan(fit, designs, *_score(designs, errors, level, rng), budget=budget, target=target, level=level, n=n)


# ------------------------------------------------------------------------------------------------ designs


def _runs(N: np.ndarray, C: np.ndarray, cost: Cost) -> pd.DataFrame:
    """Runs of sizes N that spend C each."""
    N, C = np.broadcast_arrays(np.asarray(N, float), np.asarray(C, float))
    D = C / (per_token(cost, N) if callable(cost) else cost * N)
    return pd.DataFrame({"params": N, "tokens": D, "flops": C})


def _given(name: str, table: Table, cost: Cost) -> pd.DataFrame:
    frame = pd.DataFrame(table)
    for column in ("params", "tokens"):
        if column not in frame:
            raise BadInput(f"candidates[{name}]", list(frame.columns), f"needs a column {column}")
        if not (np.isfinite(frame[column]) & (frame[column] > 0)).all():
            raise BadInput(f"candidates[{name}]", frame[column].tolist()[:5], f"{column} must be above 0")
    N, D = frame["params"].to_numpy(float), frame["tokens"].to_numpy(float)
    return pd.DataFrame({"params": N, "tokens": D, "flops": D * (per_token(cost, N) if callable(cost) else cost * N)})


def _best_size(fit: Fit, flops: np.ndarray, cost: Cost, others: Mapping[str, float]) -> np.ndarray:
    N = fit.law.optimum(fit.estimate[None], np.asarray(flops, float), cost, **others)[0][0]
    if not np.isfinite(N).all():
        raise BadInput("budget", np.asarray(flops)[~np.isfinite(N)].tolist(), "the law has no interior optimum there")
    return N


def optimal_run(fit: Fit, budget: float, cost: Cost = 6.0, **others: float) -> pd.DataFrame:
    """The plain choice: one compute-optimal run of the whole budget."""
    C = np.array([budget])
    return _runs(_best_size(fit, C, cost, others), C, cost)


def default_designs(
    fit: Fit, budget: float, target: float, cost: Cost = 6.0, **others: float
) -> dict[str, pd.DataFrame]:
    """Designs of one budget: ladders (budgets halving from run to run, each at its optimum), IsoFLOP sets (sizes from
    a third to three times the optimum of an equal share), and V-optimal sets of 1 and 4 equal shares."""
    out = {}
    for k in (2, 4):
        C = budget * 0.5 ** np.arange(k) / (2 - 0.5 ** (k - 1))
        out[f"ladder of {k}"] = _runs(_best_size(fit, C, cost, others), C, cost)
    for k in (3, 6):
        centre = _best_size(fit, np.array([budget / k]), cost, others)
        out[f"isoflop of {k}"] = _runs(centre * np.geomspace(1 / 3, 3, k), np.full(k, budget / k), cost)
    for k in (1, 4):
        out[f"V-optimal of {k}"] = v_optimal(fit, budget, target, k, cost, **others)
    return out


def v_optimal(fit: Fit, budget: float, target: float, k: int, cost: Cost = 6.0, **others: float) -> pd.DataFrame:
    """k runs of budget/k each, one after the other at the size that reduces the linearised variance of the loss at the
    target most: g' (J'J)^-1 g, with J the law's derivatives at all runs and g the target's.

    Sizes are a factor of 8 either way of the optimal one, but D/N stays within a factor of 2 of the fitted runs': the
    variance knows nothing of corners in which the law itself was never seen to hold.
    """
    share = np.array([budget / k])
    grid = _runs(_best_size(fit, share, cost, others) * RATIOS, np.full(len(RATIOS), budget / k), cost)
    seen, ratio = fit.rows.columns["tokens"] / fit.rows.columns[fit.law.paid], grid["tokens"] / grid["params"]
    within = (ratio >= seen.min() / 2) & (ratio <= seen.max() * 2)
    within.iloc[len(RATIOS) // 2] = True
    grid = pd.DataFrame(grid[within].reset_index(drop=True))
    problem = fit.law._regression(_extended(fit, grid, others), fit.options)
    theta = problem.internal(fit.estimate[None])[0]
    jacobian = problem.jacobian(theta)
    old, new = jacobian[: len(fit.rows)], jacobian[len(fit.rows) :]
    step = 1e-4 * np.eye(len(theta))
    sides = [_at_target(fit, problem.natural(theta + s * step), target, cost, others)[:, 0] for s in (1, -1)]
    g = (sides[0] - sides[1]) / 2e-4
    information = old.T @ (fit.rows.weights[:, None] * old)
    chosen = []
    for _ in range(k):
        score = [g @ np.linalg.pinv(information + np.outer(j, j), hermitian=True) @ g for j in new]
        chosen.append(int(np.argmin(score)))
        information = information + np.outer(new[chosen[-1]], new[chosen[-1]])
    return pd.DataFrame(grid.iloc[chosen].reset_index(drop=True))


# ------------------------------------------------------------------------------------------------ simulation


def _extended(fit: Fit, design: pd.DataFrame, others: Mapping[str, float]) -> Rows:
    """The fit's rows and the design's after them; the new runs' target is the law's."""
    rows, k = fit.rows, len(design)
    new = {fit.law.paid: design["params"].to_numpy(float), "tokens": design["tokens"].to_numpy(float)}
    new |= {role: np.full(k, float(value)) for role, value in others.items()}
    missing = [role for role in rows.keys if role not in (*new, fit.law.target)]
    if missing:
        raise BadInput("plan", missing, f"{fit.law.name} needs a value for each: plan(..., {missing[0]}=...)")
    new[fit.law.target] = fit.law.evaluate(fit.estimate[None], new)[0] if k else np.empty(0)
    columns = {role: np.concatenate([rows.columns[role], new[role]]) for role in rows.keys}
    n = len(rows) + k
    weights = np.concatenate([rows.weights, np.ones(k)])
    return Rows(columns, pd.RangeIndex(n), [str(i) for i in range(n)], weights, None, np.arange(n), keys=rows.keys)


def _at_target(
    fit: Fit, params: np.ndarray, target: float, cost: Cost, others: Mapping[str, float]
) -> Float[np.ndarray, "n 2"]:
    """The optimal loss at the target and ln N* there."""
    N, _, loss = fit.law.optimum(params, np.array([target]), cost, **others)
    with np.errstate(invalid="ignore"):
        return np.stack([loss[:, 0], np.log(N[:, 0])], axis=1)


def _simulate(
    fit: Fit, design: pd.DataFrame, truths: np.ndarray, noise: np.ndarray, target: float, cost: Cost, others: Any
) -> Float[np.ndarray, "n 2"]:
    """Loss and ln N* at the target from fits to the old and the new runs, drawn from each truth."""
    rows = _extended(fit, design, others)
    problem: Regression = fit.law._regression(rows, fit.options)
    value = fit.law.evaluate(truths, rows.columns)
    data = (np.log(value) if fit.options.objective.on == "log" else value) + noise[:, : len(rows)]
    goal = fit.options.objective
    centre = np.broadcast_to(problem.internal(fit.estimate[None]), (len(truths), len(problem.lower)))
    found = [
        minimise(problem, start, rows.weights, goal, data=data) for start in (problem.internal(truths.copy()), centre)
    ]
    first = found[0].value <= found[1].value
    theta = np.where(first[:, None], found[0].theta, found[1].theta)
    converged = np.where(first, found[0].converged, found[1].converged)
    out = _at_target(fit, problem.natural(theta), target, cost, others)
    return np.where(converged[:, None], out, np.nan)


def _score(
    designs: Mapping[str, pd.DataFrame], errors: Mapping[str, np.ndarray], level: float, rng: np.random.Generator
) -> tuple[pd.DataFrame, str]:
    known = np.all([np.isfinite(e).all(1) for e in errors.values()], axis=0)
    if known.mean() < 0.5:
        raise BadInput("target", f"{known.mean():.0%}", "of the simulated fits have an optimum there; need half")
    tails = [(1 - level) / 2, (1 + level) / 2]
    picks = rng.integers(known.sum(), size=(RESAMPLES, known.sum()))

    def widths(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of loss and ln N*: the width, and that of every resample of the simulations."""
        e = e[known]
        resampled = np.stack([e[:, i][picks] for i in range(2)], axis=-1)
        return np.subtract(*np.quantile(e, tails[::-1], axis=0)), np.subtract(
            *np.quantile(resampled, tails[::-1], axis=1)
        )

    plain, plain_again = widths(errors[PLAIN])
    rows = {}
    for name, error in errors.items():
        width, again = widths(error)
        rows[name] = {
            "runs": len(designs[name]),
            "flops": designs[name]["flops"].sum(),
            "loss_width": width[0],
            "loss_width_mc": again[:, 0].std(),
            "size_factor": np.exp(width[1]),
            "size_factor_mc": np.exp(again[:, 1]).std(),
            "relative": width[0] / plain[0],
            "relative_mc": (again[:, 0] / plain_again[:, 0]).std(),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("design").astype({"runs": int})
    table = table.sort_values("loss_width", kind="stable")
    allowed = table.drop(index=NOTHING)
    first = allowed.index[0]
    clearly = allowed.loc[first, "relative"] < 1 - 2 * allowed.loc[first, "relative_mc"]
    return table, str(first) if clearly else PLAIN


@dataclasses.dataclass(frozen=True)
class Plan(Shown):
    """Designs and what to expect of them.

    `table` has a row per design, narrowest first: runs, flops, loss_width (expected width of the interval of the loss
    at the target), size_factor (of that of N*: its upper over its lower end), relative (loss_width over the
    compute-optimal run's), each with its Monte-Carlo error `_mc`. `designs` are the runs. `recommended` names one.
    """

    fit: Fit
    designs: dict[str, pd.DataFrame]
    table: pd.DataFrame
    recommended: str
    budget: float
    target: float
    level: float
    n: int

    @property
    def warnings(self) -> Notices:
        """The fit's own, and `far-extrapolation` where the target lies beyond the budget's reach."""
        reach = max(self.budget, float(self.fit.rows.compute.max()))
        decades = float(np.log10(self.target / reach))
        if decades <= 1:
            return self.fit.warnings
        message = f"the target lies {decades:.2f} decades above the largest run that there will be."
        remedy = "the widths cover the noise, not a wrong form: aim nearer, or spend more."
        far = Notice("far-extrapolation", "warning", message, remedy, {"decades": {"C": decades}})
        return worst_first([*self.fit.warnings, far])

    def runs(self, design: str | None = None) -> list[dict[str, float]]:
        """The runs of a design (the recommended one): params, tokens, flops of each."""
        name = self.recommended if design is None else design
        if name not in self.designs:
            raise BadInput("design", name, f"must be one of {', '.join(self.designs)}")
        return [{str(k): float(v) for k, v in row.items()} for row in self.designs[name].to_dict("records")]

    def to_config(
        self, path: str | os.PathLike[str], design: str | None = None, family: str | None = None
    ) -> pathlib.Path:
        """Write a config file of the design's runs for `scalelab plan --config` and `scalelab sweep --config`.

        Models of a family of the recipe, as the config `isoflop` has them: `family`, or the one that the fitted runs
        name, or Transformers. The recipe counts parameters without embeddings; where the fitted table has them, N is
        translated by the ratio in the runs nearest in size.
        """
        runs = self.runs(design)
        if not runs:
            raise BadInput("design", design, "has no runs")
        rows = self.fit.rows.columns
        known = rows.get("params_non_embedding")
        for run in runs:
            run["params_non_embedding"] = run["params"]
            if known is not None and np.isfinite(known).all() and (known > 0).all():
                paid = rows[self.fit.law.paid]
                order = np.argsort(paid)
                x, y = np.log(paid)[order], np.log(known / paid)[order]
                run["params_non_embedding"] *= float(np.exp(np.interp(np.log(run["params"]), x, y)))
        lines = "\n".join(f"    {run!r}," for run in runs)
        name = self.recommended if design is None else design
        if family is None:
            named = set(rows["family"]) if "family" in rows else set()
            family = str(named.pop()) if len(named) == 1 else "transformer"
        text = CONFIG.format(
            law=self.fit.law.name, name=name, target=self.target, budget=self.budget, runs=lines, family=family
        )
        return save(path, text)

    def plot(self, ax: Any = None) -> Any:
        """Expected widths of the designs; takes and returns a matplotlib `ax`."""
        from scalelab import study_plots

        return study_plots.plan(self, ax)

    def summary(self) -> str:
        """The designs with their widths, and which one is recommended."""
        lines = [
            f"next runs for {self.budget:.3g} FLOPs, to know {self.fit.law.name} at {self.target:.3g} FLOPs: "
            f"expected width of the {100 * self.level:g} % interval, {self.n} simulations (± Monte-Carlo error)",
            f"{'design':>18} {'runs':>5} {'FLOPs':>10} {'loss':>18} {'N*, as a factor':>20} {'of compute-optimal':>19}",
        ]
        for name, row in self.table.iterrows():
            lines.append(
                f"{name:>18} {row.runs:5.0f} {row.flops:10.3g} {row.loss_width:9.4f} ±{row.loss_width_mc:7.4f} "
                f"{row.size_factor:12.3f} ±{row.size_factor_mc:6.3f} {row.relative:12.2f} ±{row.relative_mc:5.2f}"
            )
        lines += ["", f"recommended: {self.recommended}"]
        lines += [f"  N = {r['params']:.4g}, D = {r['tokens']:.4g}, C = {r['flops']:.4g}" for r in self.runs()]
        return "\n".join([*lines, "", str(self.warnings)])


CONFIG = '''"""Next runs by laws.plan: {name} of {budget:.4g} FLOPs, for the {law} law at {target:.4g} FLOPs.

Argument: as in the config `transformer`.
"""

from scalelab import recipe
from scalelab.config import load_file

FAMILY = {family!r}
RUNS = [
{runs}
]


def get_config(arg=""):
    return load_file("transformer").get_config(arg)


def sweep(arg=""):
    others = recipe.defaults([FAMILY])
    for run in RUNS:
        shape = recipe.sized(FAMILY, run["params_non_embedding"])
        yield {{**others, **shape, "train.steps": steps_for(run["tokens"])}}


def steps_for(tokens):
    return lambda config: max(1, round(tokens / (config.data.batch_size * config.data.seq_len)))
'''
