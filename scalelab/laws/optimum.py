"""Best learning rate and batch per (N, D) cell, by a local quadratic, and the laws through these optima.

In each cell ln L is fitted by a quadratic in (ln lr, ln B), cross term included, through the runs near the best one. A
vertex counts only where the Hessian is positive definite and the vertex lies among the runs; anything else is refused,
said, and left out: quadratics far from a minimum have absurd vertices. Losses rise faster above the best rate than
below it, so a wide window moves the vertex down; on the Step Law's grids 1 % does best on cells not seen. The optima
then follow

    ln lr* = ln lr_0 + a ln(N / N_0) + b ln(D / D_0) [+ k ln(N / N_0)^2],    ln B* = ln B_0 + beta ln(D / D_0).

Whether ln lr* bends in ln N (k) is always tested, and warned of: a straight law would then mislead larger models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.hyperparameters import INPUTS, Grid
from scalelab.laws.notices import Notice
from scalelab.laws.result import Result, jsonable, provenance
from scalelab.laws.table import Table, inputs_of

WITHIN = 0.01  # runs up to this share above a cell's least loss take part in its quadratic
FEWEST = 8  # runs that a quadratic of six coefficients needs
REFUSALS = {
    "lr-too-few-runs": "add runs near the best learning rate and batch.",
    "lr-concave": "add runs around the best one, or lower the noise: these show no minimum.",
    "lr-unbracketed": "extend the grid beyond its best run.",
}


def lr_optimum(
    table: Table, *, columns: Mapping[str, str] | None = None, within: float = WITHIN, curvature: bool = False,
    bootstrap: int = 1000, seed: int = 0, drop: bool = False,
) -> LrOptimum:  # fmt: skip
    """Best learning rate and batch of each (N, D) cell, and the power laws that they follow.

    Args:
      table: runs with `params_non_embedding` (count), `tokens`, `lr` (peak), `batch_tokens`, `loss`.
      columns: role -> column, as in `laws.fit`.
      within: runs up to this share above their cell's least loss take part.
      curvature: whether the law for lr* gets the term k ln(N / N_0)^2.
      bootstrap, seed: draws of the intervals: residuals of the runs for a cell's optimum, of the cells for the laws,
        both corrected for the degrees of freedom that the fits have used.
      drop: leave unusable rows out instead of raising.

    Findings: `lr-too-few-runs`, `lr-concave`, `lr-unbracketed` for refused cells, `lr-curvature` where k's 95 %
    interval excludes 0, `too-few-cells` where the optima left do not determine the laws.
    """
    if not 0 < within < 1:
        raise BadInput("within", within, "must be a share of the loss between 0 and 1, as 0.01")
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int | np.integer) or bootstrap < 0:
        raise BadInput("bootstrap", bootstrap, "must be a number of draws, 0 for none")
    grid = Grid.of(table, columns, drop)
    rng = np.random.default_rng(seed)
    notices = list(grid.rows.notices)
    cells, draws = [], np.full((bootstrap, len(grid.cells), 2), np.nan)
    refused: dict[str, list[str]] = {}
    for c, runs in enumerate(grid.cells):
        loss = grid.take("loss", runs)
        near = runs[loss <= loss.min() * (1 + within)]
        near = near[np.lexsort([grid.take(role, near) for role in ("loss", "lr", "batch_tokens")])]
        at = np.stack([np.log(grid.take(role, near)) for role in ("lr", "batch_tokens")], axis=1)
        vertex, value, reason, code, drawn = quadratic(at, np.log(grid.take("loss", near)), bootstrap, rng)
        N, D = grid.where(runs)
        if code:
            refused.setdefault(code, []).append(f"N = {N:.3g}, D = {D:.3g}: {reason}")
        else:
            draws[:, c] = drawn
        lr, batch = np.exp(vertex) if not code else (np.nan, np.nan)
        cells.append({"params_non_embedding": N, "tokens": D, "lr": float(lr), "batch_tokens": float(batch),
                      "loss": float(np.exp(value)) if not code else np.nan, "best": float(loss.min()),
                      "used": not code, "reason": reason, "runs": len(runs), "used_runs": len(near)})  # fmt: skip
    for code, where in refused.items():
        text = f"{len(where)} of {len(cells)} cells refused: {'; '.join(where)}."
        notices.append(Notice(code, "warning", text, REFUSALS[code], {"cells": where}))
    frame = pd.DataFrame(cells)
    used = frame["used"].to_numpy()
    centre = np.exp(np.log(frame.loc[used if used.any() else slice(None), list(INPUTS[:2])]).mean()).tolist()
    names, estimate, samples, found = _laws(frame.loc[used], centre, curvature, bootstrap, rng)
    notices += found
    record = {
        "law": "lr-optimum",
        "objective": f"least squares, ln loss quadratic in (ln lr, ln batch), runs within {within:g} of a cell's best",
        "rows": len(grid.rows),
        "rows_in_table": len(grid.rows.position),
        "cells": len(frame),
        "cells_used": int(used.sum()),
        "N_0": centre[0],
        "D_0": centre[1],
        "bootstrap": "residuals",
        "draws": int(bootstrap),
        "seed": int(seed),
        "columns": dict(columns or {}),
        "data_sha256": grid.rows.digest((*INPUTS, "loss")),
        **provenance(),
    }
    return LrOptimum(names, estimate, samples, notices, record, frame, draws)


def quadratic(
    at: Float[np.ndarray, "n 2"], value: Float[np.ndarray, " n"], draws: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " 2"], float, str, str, Float[np.ndarray, "draws 2"]]:
    """Vertex, value there, why it is refused and the code of that (or ""), and draws of the vertex.

    Draws add to the surface residuals drawn from the runs', corrected for leverage, at a scale as uncertain as the
    n - 6 spare runs leave it; those without a minimum inside are NaN.
    """
    none = (np.full(2, np.nan), np.nan)
    lost = np.full((draws, 2), np.nan)
    if len(at) < FEWEST or any(len(np.unique(v.round(3))) < 3 for v in at.T):
        return *none, f"{len(at)} runs near the best, at least {FEWEST} at three rates and batches needed", \
            "lr-too-few-runs", lost  # fmt: skip
    centre, scale = at.mean(axis=0), at.std(axis=0)
    x, y = ((at - centre) / scale).T
    basis = np.stack([np.ones_like(x), x, y, 0.5 * x * x, x * y, 0.5 * y * y], axis=1)
    solve = np.linalg.pinv(basis)
    coefficients = solve @ value
    point, least, definite = _vertices(coefficients[:, None])
    box = np.stack([x, y], axis=1).min(axis=0), np.stack([x, y], axis=1).max(axis=0)
    if not definite[0]:
        return *none, "the quadratic has no minimum", "lr-concave", lost
    inside = (point > box[0]) & (point < box[1])
    if not inside.all():
        outside = " and ".join(n for n, i in zip(("learning rate", "batch"), inside[0], strict=True) if not i)
        return *none, f"the minimum lies outside the runs in {outside}", "lr-unbracketed", lost
    spare = len(at) - basis.shape[1]
    fitted, leverage = basis @ coefficients, np.einsum("ij,ji->i", basis, solve)
    residual = value - fitted
    noise = residual / np.sqrt(np.maximum(1 - leverage, 1e-3))
    noise = noise - noise.mean()
    noise *= np.sqrt((residual**2).sum() / spare) / max(float(noise.std()), 1e-300)
    stretch = np.sqrt(spare / rng.chisquare(spare, size=(draws, 1)))
    drawn = fitted + stretch * rng.choice(noise, size=(draws, len(at)))
    points, _, sound = _vertices(solve @ drawn.T)
    sound &= ((points > box[0]) & (points < box[1])).all(axis=1)
    points = np.where(sound[:, None], points * scale + centre, np.nan)
    return point[0] * scale + centre, float(least[0]), "", "", points


def _vertices(c: Float[np.ndarray, "6 R"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, 2) stationary points, values there, whether the Hessian is positive definite."""
    determinant = c[3] * c[5] - c[4] ** 2
    definite = (c[3] > 0) & (determinant > 1e-9 * np.abs(c[3] * c[5]))
    safe = np.where(definite, determinant, 1.0)
    x, y = (c[4] * c[2] - c[5] * c[1]) / safe, (c[4] * c[1] - c[3] * c[2]) / safe
    return np.stack([x, y], axis=1), c[0] + 0.5 * (c[1] * x + c[2] * y), definite


def _laws(
    cells: pd.DataFrame, centre: list[float], curvature: bool, draws: int, rng: np.random.Generator
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, list[Notice]]:
    """Names, estimates, draws and findings of the laws through the cells' optima."""
    n, d = (np.log(cells[role].to_numpy() / c) for role, c in zip(INPUTS[:2], centre, strict=True))
    one = np.ones_like(n)
    straight, bent = np.stack([one, n, d], axis=1), np.stack([one, n, d, n * n], axis=1)
    names = ("lr_0", "a", "b", *(("k",) if curvature else ()), "batch_0", "beta")
    rate, batch = np.log(cells["lr"].to_numpy()), np.log(cells["batch_tokens"].to_numpy())
    main = _line(bent if curvature else straight, rate, draws, rng)
    other = _line(np.stack([one, d], axis=1), batch, draws, rng)
    if main is None or other is None:
        need = 4 if curvature else 3
        text = f"{len(cells)} optima at {len(np.unique(n.round(6)))} N and {len(np.unique(d.round(6)))} D"
        notice = Notice(
            "too-few-cells",
            "error",
            f"{text} do not determine the laws, so none are given.",
            f"give {need} cells or more that differ in N and in D apart.",
            {"cells": len(cells)},
        )
        return names, np.full(len(names), np.nan), np.full((draws, len(names)), np.nan), [notice]
    estimate, samples = (np.concatenate([m, o], axis=-1) for m, o in zip(main, other, strict=True))
    for which in (0, len(names) - 2):
        estimate[which], samples[:, which] = np.exp(estimate[which]), np.exp(samples[:, which])
    notices = []
    test = main if curvature else _line(bent, rate, draws, rng)
    if test is not None and np.isfinite(test[1]).any():
        k, (low, high) = float(test[0][3]), np.nanquantile(test[1][:, 3], [0.025, 0.975])
        if low > 0 or high < 0:
            notices.append(
                Notice(
                    "lr-curvature",
                    "warning",
                    f"ln lr* bends {'up' if k > 0 else 'down'} in ln N: k = {k:.3g} [{low:.3g}, {high:.3g}].",
                    "do not extrapolate a straight law to larger models" + ("." if curvature else "; curvature=True."),
                    {"k": k, "lower": float(low), "upper": float(high)},
                )
            )
    if draws and len(cells) <= straight.shape[1] + curvature:
        notices.append(
            Notice(
                "no-spare-cells",
                "warning",
                "there are just as many optima as the law has coefficients: nothing tells their scatter, so there are "
                "no intervals.",
                "sweep more (N, D) cells.",
                {"cells": len(cells)},
            )
        )
    return names, estimate, samples, notices


def _line(
    basis: Float[np.ndarray, "n p"], y: Float[np.ndarray, " n"], draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Least squares, and draws with leverage-corrected residuals of uncertain scale; None where not determined."""
    n, p = basis.shape
    if n < p or np.linalg.matrix_rank(basis, tol=1e-6 * np.sqrt(max(n, 1))) < p:
        return None
    solve = np.linalg.pinv(basis)
    estimate = solve @ y
    if n == p:
        return estimate, np.full((draws, p), np.nan)
    residual, leverage = y - basis @ estimate, np.einsum("ij,ji->i", basis, solve)
    noise = residual / np.sqrt(np.maximum(1 - leverage, 1e-3))
    noise = noise - noise.mean()
    noise *= np.sqrt((residual**2).sum() / (n - p)) / max(float(noise.std()), 1e-300)
    stretch = np.sqrt((n - p) / rng.chisquare(n - p, size=(draws, 1)))
    return estimate, (basis @ estimate + stretch * rng.choice(noise, size=(draws, n))) @ solve.T


class LrOptimum(Result):
    """The optima of the cells, and the laws of lr* and B* through them.

    `params`: lr_0, a, b (and k), batch_0, beta, as in the module's text; N_0 and D_0 are in `record`. `cells`: a row
    per (N, D) with lr, batch_tokens (each with lower and upper), the loss there, whether it was used, and why not.
    """

    kind = "lr-optimum"

    def __init__(self, names, estimate, samples, notices, record, cells, cell_draws):
        super().__init__(names, estimate, samples, notices, record)
        self._raw, self._cell_draws = cells, cell_draws

    @property
    def cells(self) -> pd.DataFrame:
        """One row per (N, D); intervals are 95 % percentiles over draws, NaN where half of them have no minimum."""
        frame = self._raw.copy()
        for i, name in enumerate(("lr", "batch_tokens")):
            samples = np.exp(self._cell_draws[:, :, i])
            enough = np.isfinite(samples).sum(0) >= max(1, len(samples) / 2)
            lower, upper = np.full(len(frame), np.nan), np.full(len(frame), np.nan)
            if enough.any():
                lower[enough], upper[enough] = np.nanquantile(samples[:, enough], [0.025, 0.975], axis=0)
            frame[f"{name}_lower"], frame[f"{name}_upper"] = lower, upper
        parts = [f"{n}{end}" for n in ("lr", "batch_tokens") for end in ("", "_lower", "_upper")]
        return frame[[*INPUTS[:2], *parts, "loss", "best", "used", "reason", "runs", "used_runs"]]

    def rule(self, params_non_embedding: float, tokens: float) -> tuple[float, float]:
        """Learning rate and batch (tokens) at N and D, as `excess_loss` takes it."""
        lr, batch = self._at(self.estimate[None], np.array([params_non_embedding]), np.array([tokens]))
        return float(lr[0, 0]), float(batch[0, 0])

    def predict(self, table: Table, level: float = 0.95) -> pd.DataFrame:
        """lr and batch_tokens at a table's `params_non_embedding` and `tokens`, each with its lower and upper end."""
        columns, index = inputs_of(table, INPUTS[:2], self.record["columns"])
        N, D = (columns[role] for role in INPUTS[:2])
        out: dict[str, np.ndarray] = {}
        point, drawn = self._at(self.estimate[None], N, D), self._at(self.samples, N, D)
        for name, value, samples in zip(("lr", "batch_tokens"), point, drawn, strict=True):
            out[name] = value[0]
            out[f"{name}_lower"], out[f"{name}_upper"] = self.interval(samples, level)
        return pd.DataFrame(out, index=index)

    def _at(self, params: Float[np.ndarray, "R P"], N: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = {name: params[:, i, None] for i, name in enumerate(self.names)}
        n, d = np.log(N / self.record["N_0"]), np.log(D / self.record["D_0"])
        lr = p["lr_0"] * np.exp(p["a"] * n + p["b"] * d + p.get("k", 0.0) * n * n)
        return lr, p["batch_0"] * np.exp(p["beta"] * d)

    def summary(self) -> str:
        r = self.record
        lines = [
            f"best learning rate and batch: {r['rows']} rows; {r['cells_used']} of {r['cells']} cells have a minimum "
            f"inside; N_0 = {r['N_0']:.4g}, D_0 = {r['D_0']:.4g}",
            "",
        ]
        for _, c in self.cells.iterrows():
            where = f"  N = {c.params_non_embedding:9.3g}  D = {c.tokens:9.3g}"
            if c.used:
                lines.append(
                    f"{where}  lr* = {c.lr:9.3g} [{c.lr_lower:.3g}, {c.lr_upper:.3g}]"
                    f"  B* = {c.batch_tokens:9.3g} [{c.batch_tokens_lower:.3g}, {c.batch_tokens_upper:.3g}]"
                )
            else:
                lines.append(f"{where}  refused: {c.reason}")
        return "\n".join([*lines, "", *self.parameter_lines(), "", *self.notice_lines()])

    # ---------------------------------------------------------------------------------------- disk

    def document(self) -> dict[str, Any]:
        parts = {"cells": self._raw.to_dict("list"), "cell_draws": self._cell_draws}
        return super().document() | jsonable(parts)

    @classmethod
    def restore(cls, names, estimate, samples, notices, record, document: dict[str, Any]) -> LrOptimum:
        cells = pd.DataFrame(document["cells"])
        for column in ("lr", "batch_tokens", "loss"):
            cells[column] = cells[column].astype(np.float64)
        draws = np.array(document["cell_draws"], dtype=np.float64).reshape(-1, len(cells), 2)
        return cls(names, estimate, samples, notices, record, cells, draws)
