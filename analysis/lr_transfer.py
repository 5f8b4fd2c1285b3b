"""The best learning rate at each width, from a grid of runs (`configs/lr_transfer.py`): a table and a picture.

    python analysis/lr_transfer.py experiments/2026-11-22-lr-transfer/runs.csv --out lr_transfer.png

Per family, parametrisation and width, ln loss is a parabola in log2 of the learning rate, the same for all seeds but
for its height, by least squares through the best learning rate and up to two on either side of it. The optimum is its
vertex, with a 95 % interval from the residuals (t with their degrees of freedom, delta method): what seeds and a wrong
form scatter around the parabola. Best rates at an end of the grid are named and have no optimum.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from scalelab import plots


def optimum(lr: np.ndarray, loss: np.ndarray, seed: np.ndarray | None = None) -> tuple[float, float, float] | None:
    """(log2 of the best learning rate, lower and upper end), or None where no minimum is bracketed."""
    x, y = np.log2(lr), np.log(loss)
    seed = np.zeros(len(x)) if seed is None else seed
    rates = np.unique(x)
    best = int(np.argmin([np.mean(y[x == rate]) for rate in rates]))
    near = rates[max(0, best - 2) : best + 3]
    if best in (0, len(rates) - 1) or len(near) < 4:
        return None
    kept = np.isin(x, near)
    x, y, own = x[kept], y[kept], seed[kept, None] == np.unique(seed[kept])
    centre = x.mean()
    A = np.column_stack([(x - centre) ** 2, x - centre, own])
    (a, b, *_), *_ = np.linalg.lstsq(A, y, rcond=None)
    if a <= 0:
        return None
    residual = y - A @ np.linalg.lstsq(A, y, rcond=None)[0]
    free = len(x) - A.shape[1]
    covariance = np.linalg.inv(A.T @ A)[:2, :2] * (residual @ residual) / free
    slope = np.array([b / (2 * a**2), -1 / (2 * a)])  # of the vertex -b / 2a in (a, b)
    half = float(stats.t.ppf(0.975, free) * np.sqrt(slope @ covariance @ slope))
    vertex = float(centre - b / (2 * a))
    return vertex, vertex - half, vertex + half


def optima(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each (family, parametrization, width): lr, lr_lower, lr_upper (NaN where refused), best_lr, best_loss.

    The least width is trained once, under standard, and is the base of the others."""
    rows: list[dict[str, Any]] = []
    cell: Any
    for family, runs in table.groupby("family", sort=False):
        base = runs["width"].min()
        for kind in dict.fromkeys(runs["parametrization"]):
            mine: Any = runs[(runs["parametrization"] == kind) | (runs["width"] == base)]
            for width, cell in mine.groupby("width"):
                found = optimum(*(cell[name].to_numpy() for name in ("lr", "loss", "seed"))) or (np.nan,) * 3
                mean = cell.groupby("lr")["loss"].mean()
                rows.append({
                    "family": family, "parametrization": kind, "width": width,
                    **dict(zip(("lr", "lr_lower", "lr_upper"), 2.0 ** np.array(found), strict=True)),
                    "best_lr": mean.idxmin(), "best_loss": mean.min(), "seeds": cell["seed"].nunique(),
                })  # fmt: skip
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, family: str, kind: str, ax: Axes | None = None) -> Axes:
    """Held-out loss against learning rate, every run and a line through the means per width; dotted: the vertices."""
    ax = plots.new_axes(ax)
    runs: Any = table[table["family"] == family]
    runs = runs[(runs["parametrization"] == kind) | (runs["width"] == runs["width"].min())]
    found = optima(table)
    for i, (width, cell) in enumerate(runs.groupby("width")):
        mean = cell.groupby("lr")["loss"].mean()
        colour = plots.COLOURS[i]
        ax.plot(mean.index, mean, color=colour, linewidth=1.3, label=f"D = {width}")
        ax.plot(cell["lr"], cell["loss"], "o", color=colour, markersize=3)
        row = found.query("family == @family and parametrization == @kind and width == @width").iloc[0]
        if np.isfinite(row["lr"]):
            ax.axvline(row["lr"], color=colour, linewidth=1, linestyle=":")
    ax.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=f"{family}, {kind}")
    ax.set_xscale("log", base=2)
    ax.legend(fontsize="small", frameon=False)
    return ax


def main() -> None:
    parser = argparse.ArgumentParser(description="Best learning rate by width")
    parser.add_argument("runs", help="a CSV with family, parametrization, width, lr, seed, loss")
    parser.add_argument("--out", help="a picture")
    args = parser.parse_args()
    table = pd.read_csv(args.runs)
    print(optima(table).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if args.out:
        families, kinds = list(dict.fromkeys(table["family"])), list(dict.fromkeys(table["parametrization"]))
        figure = Figure(figsize=(3.1 * len(families), 2.9 * len(kinds)), layout="constrained")
        axes = figure.subplots(len(kinds), len(families), squeeze=False, sharey="col")
        for column, family in enumerate(families):
            for row, kind in enumerate(kinds):
                draw(table, family, kind, axes[row, column])
        figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
