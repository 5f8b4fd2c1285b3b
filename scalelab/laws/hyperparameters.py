"""The Step Law from a grid of runs, and what a rule for learning rate and batch costs on such a grid.

Optima of learning rate and batch are broad, and the best run of a grid is mostly noise. So a rule is fitted to all
runs that are about as good as the best of their cell, a cell being all runs of one (N, D), and judged by the loss
that it gives away, not by its exponents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from scalelab.errors import BadInput
from scalelab.laws.fit import Fit
from scalelab.laws.forms.rules import StepLawBatch, StepLawLr
from scalelab.laws.notices import Notice, name_rows
from scalelab.laws.shown import Shown
from scalelab.laws.table import Rows, Table, prepare

INPUTS = ("params_non_embedding", "tokens", "lr", "batch_tokens")
Rule = Callable[[float, float], tuple[float, float]]  # N, D -> learning rate, batch (tokens)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs of several (N, D), at several learning rates and batches each.

    `cell` numbers the runs' cells, smallest N and D first.
    """

    rows: Rows
    cell: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, table: Table, columns: Mapping[str, str] | None = None, drop: bool = False) -> Grid:
        rows = prepare(table, INPUTS, columns=columns, cluster=None, drop=drop)
        size = np.stack([np.log(rows.columns[role]) for role in INPUTS[:2]], axis=1).round(6)
        return cls(rows, np.unique(size, axis=0, return_inverse=True)[1].reshape(-1))

    @property
    def cells(self) -> list[Int[np.ndarray, " runs"]]:
        """The runs of each cell."""
        return [np.flatnonzero(self.cell == c) for c in range(self.cell.max() + 1)]

    def take(self, role: str, at: Any) -> np.ndarray:
        return self.rows.columns[role][at]

    def where(self, runs: Int[np.ndarray, " runs"]) -> tuple[float, float]:
        """N and D of a cell's runs."""
        return float(self.take(INPUTS[0], runs[0])), float(self.take("tokens", runs[0]))

    def on_edge(self, runs: Int[np.ndarray, " runs"]) -> list[str]:
        """The columns in which a cell's best run is the lowest or highest tried, of several."""
        best = runs[self.take("loss", runs).argmin()]
        out = []
        for role in ("lr", "batch_tokens"):
            tried, value = self.take(role, runs), self.take(role, best)
            if value in (tried.min(), tried.max()):
                out.append(role)
        return out


def excess_loss(
    rule: Rule, table: Table, columns: Mapping[str, str] | None = None, *, drop: bool = False
) -> pd.DataFrame:
    """What a rule gives away on grids of runs, per cell: its nearest run's loss over the cell's best, minus 1.

    Args:
      rule: (N, D) -> (learning rate, batch in tokens).
      table: runs with `params_non_embedding`, `tokens`, `lr`, `batch_tokens`, `loss`; columns: role -> column.

    The nearest run is the one at the least distance in (log2 lr, log2 batch). Columns: params_non_embedding, tokens,
    lr, batch_tokens (the rule's), nearest_lr, nearest_batch, loss (of that run), best, excess.
    """
    grid = Grid.of(table, columns, drop)
    return pd.DataFrame([_excess(rule, grid, runs) for runs in grid.cells])


def _excess(rule: Rule, grid: Grid, runs: np.ndarray) -> dict[str, float]:
    N, D = grid.where(runs)
    lr, batch = (float(v) for v in rule(N, D))
    if not (np.isfinite([lr, batch]).all() and min(lr, batch) > 0):
        raise BadInput(
            "rule", (lr, batch), f"must give a learning rate and a batch above 0 at N = {N:.3g}, D = {D:.3g}"
        )
    rates, batches, loss = (grid.take(role, runs) for role in ("lr", "batch_tokens", "loss"))
    nearest = int((np.log2(rates / lr) ** 2 + np.log2(batches / batch) ** 2).argmin())
    return {
        "params_non_embedding": N, "tokens": D, "lr": lr, "batch_tokens": batch,
        "nearest_lr": rates[nearest], "nearest_batch": batches[nearest],
        "loss": loss[nearest], "best": loss.min(), "excess": loss[nearest] / loss.min() - 1,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepLaw(Shown):
    """lr = c N^a D^b and batch = c D^b, each a `Fit`, and the runs that they were fitted to.

    `cells` has a row per (N, D): runs, kept, best loss, and the columns in which the best run is on its grid's edge.
    """

    lr: Fit
    batch: Fit
    selected: pd.DataFrame
    cells: pd.DataFrame
    grid: Grid = dataclasses.field(repr=False)
    within: float = 0.0025

    def rule(self, params_non_embedding: float, tokens: float) -> tuple[float, float]:
        """Learning rate and batch (tokens) at N non-embedding parameters and D tokens."""
        (c, a, b), (batch_c, batch_b) = self.lr.estimate, self.batch.estimate
        N, D = float(params_non_embedding), float(tokens)
        return c * N**a * D**b, batch_c * D**batch_b

    def summary(self, level: float = 0.95) -> str:
        """The cells, both laws with their intervals, and what the rule gives away on the cells, as text."""
        lines = [
            f"Step Law: {len(self.grid.rows)} runs in {len(self.cells)} cells of (N, D), {len(self.selected)} of them "
            f"within {self.within:.2%} of their cell's best"
        ]
        for fit in (self.lr, self.batch):
            lines += ["", fit.law.equation, *fit.parameter_lines(level)]
        lines.append("")
        for where, excess in (("the same cells", self.excess()), ("each cell, fitted to the others", self.holdout())):
            mean, most = excess["excess"].mean(), excess["excess"].max()
            lines.append(f"loss given away on {where}: {mean:.3%} on average, {most:.3%} at most")
        return "\n".join([*lines, "", *self.lr.notice_lines()])

    def predict(self, table: Table, level: float = 0.95) -> pd.DataFrame:
        """lr and batch_tokens at a table's `params_non_embedding` and `tokens`, each with its lower and upper end."""
        out = {}
        for name, fit in (("lr", self.lr), ("batch_tokens", self.batch)):
            out[name] = fit.predict(table)
            lower, upper = fit.interval(fit.predict_draws(table), level)
            out[f"{name}_lower"], out[f"{name}_upper"] = lower, upper
        return pd.DataFrame(out)

    def excess(self) -> pd.DataFrame:
        """`excess_loss` on the cells that the law was fitted to."""
        return pd.DataFrame([_excess(self.rule, self.grid, runs) for runs in self.grid.cells])

    def holdout(self) -> pd.DataFrame:
        """`excess_loss` of each cell under the law fitted to all other cells."""
        out = []
        for c, runs in enumerate(self.grid.cells):
            others = _fitted(self.selected.loc[self.selected["cell"] != c], bootstrap=0, cluster=None, seed=0)
            out.append(_excess(dataclasses.replace(self, lr=others[0], batch=others[1]).rule, self.grid, runs))
        return pd.DataFrame(out)


def step_law(
    table: Table, *, columns: Mapping[str, str] | None = None, within: float = 0.0025, bootstrap: int = 1000,
    cluster: str | None = None, seed: int = 0, drop: bool = False,
) -> StepLaw:  # fmt: skip
    """The Step Law fitted by its authors' procedure (Li et al. 2025, arXiv 2503.04715).

    Keep the runs whose loss is within a share `within` of the least of their (N, D) cell, pool them, and fit ln lr on
    ln N and ln D, and ln batch on ln D, by least squares.

    Args:
      table: runs with `params_non_embedding` (count), `tokens`, `lr` (peak), `batch_tokens`, `loss` (smoothed, final).
      columns: role -> column, as in `laws.fit`.
      bootstrap, seed: draws of the intervals. The authors resample runs; cluster="cell" resamples whole cells, which is
        wider, and fairer where few cells say how the optima move.
      drop: leave unusable rows out instead of raising.

    A cell whose best run has the lowest or highest rate or batch tried adds `untuned-lr` to the fits' findings.
    Raises `BadInput` with fewer than three cells, or a share that is not between 0 and 1.
    """
    if not 0 < within < 1:
        raise BadInput("within", within, "must be a share of the loss between 0 and 1, as 0.0025")
    if cluster not in (None, "cell"):
        raise BadInput("cluster", cluster, "must be None (runs) or 'cell'")
    grid = Grid.of(table, columns, drop)
    if len(grid.cells) < 3:
        raise BadInput("table", f"{len(grid.cells)} cells of (N, D)", "the law in N and D needs at least 3 of them")
    kept, cells, edges = [], [], []
    for runs in grid.cells:
        loss = grid.take("loss", runs)
        good, edge = runs[loss <= loss.min() * (1 + within)], grid.on_edge(runs)
        kept.append(good)
        N, D = grid.where(runs)
        cells.append({"params_non_embedding": N, "tokens": D, "runs": len(runs), "kept": len(good),
                      "best": loss.min(), "on_edge": ", ".join(edge)})  # fmt: skip
        edges += [f"N = {N:.3g}, D = {D:.3g} ({column})" for column in edge]
    at = np.concatenate(kept)
    chosen = {role: grid.take(role, at) for role in (*INPUTS, "loss")}
    # runs of one cell that share a rate (or a batch) are runs of their own, no copies
    selected = pd.DataFrame({**chosen, "cell": grid.cell[at], "seed": at}, index=grid.rows.index[at])
    fits = _fitted(selected, bootstrap, cluster, seed)
    for fit in fits:
        for notice in grid.rows.notices:
            fit.add(notice)
        if edges:
            fit.add(
                Notice(
                    "untuned-lr",
                    "warning",
                    f"the best run is on the edge of its grid in {len(edges)} cases: {name_rows(edges)}.",
                    "extend these grids: an optimum that they cut off pulls the law toward the grid.",
                    {"cells": edges},
                )
            )
    return StepLaw(*fits, selected, pd.DataFrame(cells), grid, within)


def _fitted(selected: pd.DataFrame, bootstrap: int, cluster: str | None, seed: int) -> tuple[Fit, Fit]:
    lr, batch = (
        law.fit(selected, bootstrap=bootstrap, cluster=cluster, seed=seed) for law in (StepLawLr(), StepLawBatch())
    )
    return lr, batch
