"""Best rate of each family and size over the recipe's rule: a parabola in ln(rate) through the three rates around the
best, each seed at a height of its own; its vertex with a 95 % interval by Fieller's theorem (a vertex is a ratio of two
coefficients). The noise is one variance for all families and sizes.

    python experiments/2026-11-22-family-lr/analyse.py
"""

import pathlib

import numpy as np
import pandas as pd
from scipy import stats

RULE = 0.5  # over the width, at most 0.02: the rule under test, whatever the recipe says now


def fit(runs: pd.DataFrame, rule: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients of x and x^2, their covariance in units of the noise's variance, sum of squared residuals)."""
    x = np.log(runs["lr"] / rule).to_numpy()
    X = np.column_stack([x, x**2, *(runs["seed"] == seed for seed in sorted(set(runs["seed"])))]).astype(float)
    beta, (residual,) = np.linalg.lstsq(X, runs["loss"].to_numpy())[:2]
    return beta[:2], np.linalg.inv(X.T @ X)[:2, :2], residual


def interval(beta: np.ndarray, V: np.ndarray, t2: float) -> tuple[float, float]:
    """All v with (b + 2 c v)^2 <= t^2 var(b + 2 c v)."""
    (b, c), root = beta, [np.inf]
    if c > 0 and c**2 > t2 * V[1, 1]:
        root = np.roots([4 * (c**2 - t2 * V[1, 1]), 4 * (b * c - t2 * V[0, 1]), b**2 - t2 * V[0, 0]])
    return (-np.inf, np.inf) if len(root) < 2 or np.iscomplex(root).any() else (root.min(), root.max())


def main() -> None:
    table = pd.read_csv(pathlib.Path(__file__).with_name("runs.csv"))
    cells = []
    for (family, width), runs in table.groupby(["family", "width"]):
        rule = min(0.02, RULE / width)
        means = runs.groupby("lr")["loss"].mean()
        middle = int(np.clip(means.argmin(), 1, len(means) - 2))
        near = runs[runs["lr"].isin(means.index[middle - 1 : middle + 2])]
        at_rule = means.iloc[np.abs(np.log(means.index / rule)).argmin()]
        cells.append((family, width, rule, means.min(), at_rule - means.min(), len(near), *fit(near, rule)))
    freedom = sum(cell[5] - 2 - table["seed"].nunique() for cell in cells)
    noise = sum(cell[-1] for cell in cells) / freedom
    t2 = stats.t.ppf(0.975, freedom) ** 2
    rows = []
    for family, width, rule, least, excess, _, beta, V, _ in cells:
        low, high = np.exp(interval(beta, V * noise, t2))
        best = np.exp(-beta[0] / (2 * beta[1]))
        rows.append([family, width, rule, f"{best:.2f}", f"{low:.2f} to {high:.2f}", f"{least:.3f}", f"{excess:.3f}"])
    columns = ["family", "width", "rule", "best / rule", "95 %", "least loss", "the rule's excess"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))
    print(f"noise of a run, between seeds of a rate: {noise**0.5:.4f} nats ({freedom} degrees of freedom)")


if __name__ == "__main__":
    main()
