"""IsoFLOP profiles: per budget a parabola of loss in ln N; its vertices follow N* ~ C^a and D* ~ C^b.

Hoffmann et al. 2022, approach 2. A parabola is a local picture of the surface: wide or off-centre sweeps bias the
vertex where alpha and beta differ, and no resampling sees that; compare with the fitted surface. A vertex outside
its sweep, or of a parabola that opens downward, is no minimum: it is refused, said, and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.allocate import flops_per_token
from scalelab.laws.allocation import NAMES, AllocationFit, power_laws
from scalelab.laws.notices import Notice, name_rows
from scalelab.laws.result import jsonable, provenance
from scalelab.laws.table import Table, prepare
from scalelab.laws.validate import budgets

NEAR = 10.0  # runs up to this factor in N from a budget's best run take part in its parabola


def isoflop(
    table: Table,
    *,
    columns: Mapping[str, str] | None = None,
    budget: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    drop: bool = False,
) -> IsoflopFit:
    """Compute-optimal parameters and tokens from IsoFLOP sweeps.

    Args:
      table: runs with `params`, `tokens`, `loss` and, where known, `flops` (6 N D otherwise).
      columns: role -> column, as in `laws.fit`.
      budget: a column that names each run's budget; by default runs within about 20 % of compute share one.
      bootstrap: draws; each adds to the parabolas residuals drawn from all runs (see `_vertex_draws`).
      seed: of the bootstrap.
      drop: leave unusable rows out instead of raising.

    D* = C / (FLOPs per token at N*), the cost being interpolated in ln N from the table itself.
    """
    rows = prepare(table, ("params", "tokens"), columns=columns, cluster=budget, drop=drop)
    order = rows.order()
    N, D, L = (rows.columns[role][order] for role in ("params", "tokens", "loss"))
    flops = rows.compute[order]
    if not isinstance(bootstrap, int | np.integer) or bootstrap < 0:
        raise BadInput("bootstrap", bootstrap, "must be a number of draws, 0 for none")
    label = budgets(flops) if rows.clusters is None else rows.clusters[order]
    groups = [np.flatnonzero(label == g) for g in np.unique(label)]
    if rows.clusters is None:
        for group in groups:
            if flops[group].max() > 2 * flops[group].min():
                raise BadInput(
                    "flops",
                    [float(flops[group].min()), float(flops[group].max())],
                    "these runs do not fall into budgets; name a column: budget=...",
                )
    C = np.array([np.exp(np.log(flops[group]).mean()) for group in groups])
    by_compute = np.argsort(C)
    groups, C = [groups[i] for i in by_compute], C[by_compute]
    cost = flops_per_token(N, D, flops)

    rng = np.random.default_rng(seed)
    notices = list(rows.notices)
    table_rows, draws = [], np.full((bootstrap, len(groups)), np.nan)
    loss_draws = draws.copy()
    accepted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for g, group in enumerate(groups):
        x, y = np.log(N[group]), L[group]
        near = np.abs(x - x[y.argmin()]) <= np.log(NEAR) + 1e-9
        x, y = x[near], y[near]
        row = {"flops": C[g], "runs": len(group), "used_runs": int(near.sum())}
        vertex, reason, code = parabola(x, y)
        row |= {"params": np.exp(vertex[0]), "loss": vertex[1], "used": not reason, "reason": reason}
        if reason:
            row["params"] = row["loss"] = np.nan
            notices.append(_refusal(code, C[g], reason, np.array(rows.names)[order[group]].tolist(), notices))
        else:
            accepted[g] = (x, y)
        row["coefficients"] = vertex[2] if reason != "fewer than three sizes" else None
        row["lowest_params"], row["highest_params"] = float(np.exp(x.min())), float(np.exp(x.max()))
        table_rows.append(row)
    notices = _merge(notices)
    spare = sum(len(x) - 3 for x, _ in accepted.values())
    for g, (at, value) in _vertex_draws(accepted, spare, bootstrap, rng).items():
        draws[:, g], loss_draws[:, g] = at, value

    vertices = pd.DataFrame(table_rows).drop(columns="coefficients")
    log_c, point_log_n = np.log(C), np.log(vertices["params"].to_numpy())
    point = _power_laws(log_c, point_log_n[None], cost)[0]
    samples = _power_laws(log_c, draws, cost)
    record = {
        "law": "isoflop",
        "objective": f"least squares, loss quadratic in ln N, runs within a factor {NEAR:g} of each budget's best",
        "rows": len(rows),
        "rows_in_table": len(rows.position),
        "budgets": len(groups),
        "budgets_used": sum(not r["reason"] for r in table_rows),
        "bootstrap": f"residuals of runs, {spare} degrees of freedom",
        "draws": int(bootstrap),
        "draws_failed": int((~np.isfinite(samples).all(1)).sum()),
        "seed": int(seed),
        "columns": dict(columns or {}),
        "data_sha256": rows.digest(("params", "tokens")),
        **provenance(),
    }
    if record["budgets_used"] < 2:
        notices.append(
            Notice(
                "too-few-budgets",
                "error",
                f"{record['budgets_used']} of {len(groups)} budgets have a minimum inside their sweep: two or more are "
                "needed for the exponents, so none are given.",
                "add sizes to the refused budgets, or budgets.",
                {"budgets": len(groups), "used": record["budgets_used"]},
            )
        )
    elif bootstrap and not spare:
        notices.append(
            Notice(
                "no-spare-sizes",
                "warning",
                "every budget has just the three sizes that its parabola needs: nothing tells the noise, so there are "
                "no intervals.",
                "train four sizes or more at a budget.",
                {"spare": spare},
            )
        )
    elif (lost := int((~np.isfinite(draws[:, vertices["used"]]).all(1)).sum())) > 0.05 * max(1, bootstrap):
        notices.append(
            Notice(
                "bootstrap-degenerate",
                "warning",
                f"in {lost} of {bootstrap} draws some budget has no minimum inside its sweep; that budget is left out "
                "of the draw, so the intervals are too narrow.",
                "add sizes on both sides of the minimum.",
                {"draws": lost},
            )
        )
    notices += _drift(accepted, log_c, point_log_n, draws)
    curves = {g: r["coefficients"] for g, r in enumerate(table_rows)}
    return IsoflopFit(
        NAMES, point, samples, notices, record, vertices, draws, loss_draws, curves, cost_table(N, D, flops)
    )


def parabola(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[tuple[float, float, Any], str, str]:
    """((vertex, value there, (centre, c2, c1, c0)), why it is refused or "", the refusal's code)."""
    if len(np.unique(x.round(3))) < 3:  # sizes within 0.1 % are one size
        return (np.nan, np.nan, None), "fewer than three sizes", "isoflop-unbracketed"
    centre = x.mean()
    c2, c1, c0 = np.polyfit(x - centre, y, 2)
    curve = (float(centre), float(c2), float(c1), float(c0))
    if c2 <= 0:
        return (np.nan, np.nan, curve), "the parabola opens downward", "isoflop-concave"
    at = centre - c1 / (2 * c2)
    value = c0 - c1**2 / (4 * c2)
    if not x.min() < at < x.max():
        side = "below" if at <= x.min() else "above"
        return (at, value, curve), f"the minimum lies {side} the sizes tried", "isoflop-unbracketed"
    return (float(at), float(value), curve), "", ""


def _vertex_draws(
    points: dict[int, tuple[np.ndarray, np.ndarray]], spare: int, draws: int, rng: np.random.Generator
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """ln N* and loss* of each draw, per budget; NaN where a draw has no minimum inside, or with no spare rows at all.

    The runs' relative residuals, corrected for leverage and pooled over budgets, are drawn with replacement and added
    to the parabolas. Their scale is uncertain too, with `spare` degrees of freedom: each draw stretches it by
    sqrt(spare / chi2), without which intervals from four sizes a budget hold the truth far too seldom. (Resampling
    the runs themselves leaves three or four points of four and covers worse still.)
    """
    if spare < 1 or not draws:
        return {}
    parts, pool, squares = {}, [], 0.0
    for g, (x, y) in points.items():
        basis = np.stack([(x - x.mean()) ** 2, x - x.mean(), np.ones_like(x)], axis=1)
        solve = np.linalg.pinv(basis)
        fitted, leverage = basis @ (solve @ y), np.einsum("ij,ji->i", basis, solve)
        residual = (y - fitted) / y.mean()
        squares += float((residual**2).sum())
        free = leverage < 0.999
        pool.append(residual[free] / np.sqrt(1 - leverage[free]))
        parts[g] = (x, fitted, solve, y.mean())
    noise = np.concatenate(pool)
    noise = noise - noise.mean()
    noise *= np.sqrt(squares / spare) / max(float(noise.std()), 1e-300)
    stretch = np.sqrt(spare / rng.chisquare(spare, size=(draws, 1)))
    out = {}
    for g, (x, fitted, solve, level) in parts.items():
        y = fitted + level * stretch * rng.choice(noise, size=(draws, len(x)))
        c2, c1, c0 = solve @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            at, value = -c1 / (2 * c2), c0 - c1**2 / (4 * c2)
        dx = x - x.mean()
        inside = (c2 > 0) & (at > dx.min()) & (at < dx.max())
        out[g] = (np.where(inside, at + x.mean(), np.nan), np.where(inside, value, np.nan))
    return out


def _drift(
    points: dict[int, tuple[np.ndarray, np.ndarray]], log_c: np.ndarray, log_n: np.ndarray, draws: np.ndarray
) -> list[Notice]:
    """`isoflop-drift`: the sizes' centre moves against the minimum from budget to budget, which bends the exponents.

    Each parabola's bias depends on where its sizes lie about the minimum; a bias that is the same at every budget
    leaves the exponents alone.
    """
    use = np.array([g for g in sorted(points) if np.isfinite(log_n[g])], int)
    if len(use) < 3 or np.ptp(log_c[use]) < 1e-6:
        return []
    x = log_c[use] - log_c[use].mean()
    centre = np.array([points[g][0].mean() for g in use])
    slope = float(x @ (centre - log_n[use]) / (x @ x))
    total = abs(slope) * float(np.ptp(x))
    drawn = (centre - draws[:, use]) @ x / (x @ x)
    drawn = drawn[np.isfinite(drawn)]
    sure = not len(drawn) or np.quantile(drawn, 0.0015) > 0 or np.quantile(drawn, 0.9985) < 0
    if total < np.log(1.5) or not sure:  # a factor 1.5 in N across the sweep: half a usual step between sizes
        return []
    return [
        Notice(
            "isoflop-drift",
            "warning",
            f"the centre of the sizes drifts by a factor {np.exp(total):.2f} in N against the minima from the smallest "
            "to the largest budget: the parabolas' bias changes on the way, and with it the exponents.",
            "centre each budget's sizes on its own minimum, or use the fitted surface.",
            {"slope": slope, "factor": float(np.exp(total))},
        )
    ]


def _power_laws(log_c: np.ndarray, log_n: Float[np.ndarray, "R g"], cost: Any) -> Float[np.ndarray, "R 4"]:
    """Lines through the budgets that have a vertex."""
    seen = np.isfinite(log_n)
    per_token = np.full(log_n.shape, np.nan)
    per_token[seen] = np.log(cost(np.exp(log_n[seen])))
    return power_laws(log_c, log_n, log_c - per_token)


def _refusal(code: str, flops: float, reason: str, names: list[str], before: list[Notice]) -> Notice:
    remedy = {
        "isoflop-unbracketed": "train sizes on both sides of the minimum at these budgets.",
        "isoflop-concave": "add sizes, or lower the noise: these runs show no minimum.",
    }[code]
    return Notice(
        code,
        "warning",
        f"C = {flops:.3g} FLOPs refused: {reason} ({name_rows(names)}).",
        remedy,
        {"flops": [float(flops)], "reason": [reason]},
    )


def _merge(notices: list[Notice]) -> list[Notice]:
    """One notice per code: those of several budgets become one that names them all."""
    merged: dict[str, Notice] = {}
    for n in notices:
        if n.code in merged and n.code.startswith("isoflop"):
            old = merged[n.code]
            numbers = {k: old.numbers[k] + n.numbers[k] for k in old.numbers}
            merged[n.code] = Notice(n.code, n.severity, f"{old.message} {n.message}", n.remedy, numbers)
        else:
            merged[n.code] = n
    return list(merged.values())


def cost_table(N: np.ndarray, D: np.ndarray, flops: np.ndarray) -> dict[str, list[float]]:
    """The measured sizes behind `flops_per_token`, for the file."""
    return {"params": N.tolist(), "tokens": D.tolist(), "flops": flops.tolist()}


class IsoflopFit(AllocationFit):
    """The vertices of IsoFLOP parabolas and the power laws through them.

    `params`: a, b of N* = N_coef C^a and D* = D_coef C^b. `vertices`: a row per budget with flops, params, tokens,
    loss (each with lower and upper), whether it was used, and why not.
    """

    kind = "isoflop"

    def __init__(self, names, estimate, samples, notices, record, vertices, vertex_draws, loss_draws, curves, costs):
        super().__init__(names, estimate, samples, notices, record)
        self._raw, self._vertex_draws, self._loss_draws = vertices, vertex_draws, loss_draws
        self.curves: dict[int, tuple[float, float, float, float] | None] = curves
        self._costs = costs
        self.flops_per_token = flops_per_token(*(np.array(costs[k]) for k in ("params", "tokens", "flops")))

    @property
    def vertices(self) -> pd.DataFrame:
        """One row per budget, smallest first; intervals are 95 % percentiles over draws."""
        frame = self._raw.copy()
        C, known = frame["flops"].to_numpy(), frame["params"].notna().to_numpy()
        frame["tokens"] = np.nan
        frame.loc[known, "tokens"] = C[known] / self.flops_per_token(frame.loc[known, "params"].to_numpy())
        N = np.exp(self._vertex_draws)
        D = np.full(N.shape, np.nan)
        seen = np.isfinite(N)
        D[seen] = np.broadcast_to(C, N.shape)[seen] / self.flops_per_token(N[seen])
        for name, samples in (("params", N), ("tokens", D), ("loss", self._loss_draws)):
            frame[f"{name}_lower"], frame[f"{name}_upper"] = self._band(samples)
        parts = [f"{n}{end}" for n in ("params", "tokens", "loss") for end in ("", "_lower", "_upper")]
        return frame[["flops", *parts, "used", "reason", "runs", "used_runs", "lowest_params", "highest_params"]]

    def _band(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `interval`, but a budget's own vertex keeps its interval where too few others are left for exponents."""
        enough = np.isfinite(samples).sum(0) >= max(1, len(samples) / 2)
        if not enough.any():
            return np.full(samples.shape[1], np.nan), np.full(samples.shape[1], np.nan)
        lower, upper = np.nanquantile(np.where(enough, samples, 0.0), [0.025, 0.975], axis=0)
        return np.where(enough, lower, np.nan), np.where(enough, upper, np.nan)

    def summary(self) -> str:
        r = self.record
        lines = [
            f"IsoFLOP: {r['rows']} rows; {r['budgets_used']} of {r['budgets']} budgets have a minimum inside the sizes",
            "",
        ]
        for _, v in self.vertices.iterrows():
            if v.used:
                lines.append(
                    f"  C = {v.flops:9.3g}  N* = {v.params:9.3g} [{v.params_lower:.3g}, {v.params_upper:.3g}]"
                    f"  D* = {v.tokens:9.3g} [{v.tokens_lower:.3g}, {v.tokens_upper:.3g}]  loss {v.loss:.4f}"
                )
            else:
                lines.append(f"  C = {v.flops:9.3g}  refused: {v.reason}")
        lines += ["", *self.parameter_lines(), "", *self.notice_lines()]
        return "\n".join(lines)

    # ---------------------------------------------------------------------------------------- disk

    def document(self) -> dict[str, Any]:
        parts = {
            "vertices": self._raw.to_dict("list"),
            "vertex_draws": self._vertex_draws,
            "loss_draws": self._loss_draws,
            "curves": list(self.curves.values()),
            "costs": self._costs,
        }
        return super().document() | jsonable(parts)

    @classmethod
    def restore(cls, names, estimate, samples, notices, record, document: dict[str, Any]) -> IsoflopFit:
        vertices = pd.DataFrame(document["vertices"])
        for column in ("params", "loss"):
            vertices[column] = vertices[column].astype(np.float64)
        shape = (-1, len(vertices))
        draws, losses = (np.array(document[k], dtype=np.float64).reshape(shape) for k in ("vertex_draws", "loss_draws"))
        curves = {g: None if c is None else tuple(c) for g, c in enumerate(document["curves"])}
        return cls(names, estimate, samples, notices, record, vertices, draws, losses, curves, document["costs"])
