"""The compute-optimal loss of an arm as a curve in C, per draw, and its inverse: what arms are compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.allocate import Cost, per_token
from scalelab.laws.law import Law
from scalelab.laws.table import Rows

PER_DECADE = 8  # points of the curve that are solved for; between them it is a cubic
REACH = 4.0  # decades beyond the budgets asked for, and the data, in which crossings and equal losses are sought


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison. `samples` is (0, P) where there are no draws."""

    name: str
    law: Law
    params: Float[np.ndarray, " P"]
    samples: Float[np.ndarray, "R P"]
    cost: Cost
    others: Mapping[str, float]
    rows: Rows | None = None

    @property
    def both(self) -> Float[np.ndarray, "1+R P"]:
        """The estimate, then the draws."""
        return np.concatenate([self.params[None], self.samples])

    def optimum(self, flops: Float[np.ndarray, " m"], cost: Cost | None = None) -> list[np.ndarray]:
        """N*, D*, loss, each (1 + R, m). A law in compute alone has no N* and D*."""
        if self.law.inputs == ("flops",):
            loss = self.law.evaluate(self.both, {"flops": flops})
            return [np.full_like(loss, np.nan)] * 2 + [loss]
        return list(self.law.optimum(self.both, flops, self.cost if cost is None else cost, **self.others))

    def loss(self, N: Float[np.ndarray, " m"], D: Float[np.ndarray, " m"]) -> Float[np.ndarray, "1+R m"]:
        fixed = {role: np.full(len(N), float(v)) for role, v in self.others.items()}
        out = self.law.evaluate(self.both, {self.law.paid: N, "tokens": D, **fixed})
        return np.where(np.isfinite(N) & np.isfinite(D), out, np.nan)

    def tokens(self, flops: np.ndarray, N: np.ndarray) -> np.ndarray:
        """How many tokens a budget buys at size N."""
        return flops / (per_token(self.cost, N) if callable(self.cost) else self.cost * N)

    def size(self, flops: np.ndarray, D: np.ndarray) -> np.ndarray:
        """The N whose D tokens cost the budget: bisection in ln N where the cost is a function of N."""
        if not callable(self.cost):
            return flops / (self.cost * D)
        low, high = np.zeros_like(D), np.log(flops)
        for _ in range(80):
            middle = 0.5 * (low + high)
            dear = per_token(self.cost, np.exp(middle)) * D > flops
            low, high = np.where(dear, low, middle), np.where(dear, middle, high)
        return np.where(np.isfinite(D), np.exp(0.5 * (low + high)), np.nan)


def check(arm: Arm) -> None:
    if arm.law.inputs != ("flops",) and not arm.law.allocates:
        raise BadInput(
            f"arm {arm.name}", arm.law.name, "has no optimal loss at a compute: needs params and tokens, or flops"
        )


def window(*ranges: np.ndarray) -> Float[np.ndarray, " m"]:
    """ln C of a grid over the budgets asked for and the data, `REACH` decades to either side; their ends lie on it."""
    ends = np.log([[r.min(), r.max()] for r in ranges if len(r)])
    low, high = ends.min() - REACH * np.log(10), ends.max() + REACH * np.log(10)
    even = np.linspace(low, high, int(np.ceil((high - low) / np.log(10) * PER_DECADE)) + 1)
    return np.unique(np.concatenate([even, ends.ravel()]).round(9))


def where(level: Float[np.ndarray, " R"], x: Float[np.ndarray, " m"], y: Float[np.ndarray, "R m"]) -> np.ndarray:
    """The x at which each falling curve y(x) has come down to its level, by cubic inverse interpolation.

    inf: not within the grid; -inf: lower all along it; NaN: the curve is not known there (it may lack its ends).
    """
    m = len(x)
    known = np.isfinite(y)
    first, last = known.argmax(1), m - known[:, ::-1].argmax(1)
    usable = (last - first == known.sum(1)) & (last - first >= 4) & np.isfinite(level)
    place = np.arange(m)
    y = np.where(place < first[:, None], np.inf, np.where(place >= last[:, None], -np.inf, y))
    above = (y > level[:, None]).sum(1)
    nodes = np.clip(above - 2, first, np.maximum(last - 4, first))[:, None] + np.arange(4)
    nodes = np.minimum(nodes, m - 1)
    node_y, node_x = np.take_along_axis(y, nodes, 1) - level[:, None], x[nodes]
    found = np.zeros(len(y))
    with np.errstate(all="ignore"):
        for i in range(4):
            others = [j for j in range(4) if j != i]
            found += node_x[:, i] * np.prod([node_y[:, j] / (node_y[:, j] - node_y[:, i]) for j in others], axis=0)
    left, right = x[np.clip(above - 1, 0, m - 1)], x[np.clip(above, 0, m - 1)]
    found = np.where(np.isfinite(found), np.clip(found, left, right), 0.5 * (left + right))
    found = np.where(above <= first, np.where(first == 0, -np.inf, np.nan), found)
    found = np.where(above >= last, np.where(last == m, np.inf, np.nan), found)
    return np.where(usable, found, np.nan)


def crossings(x: Float[np.ndarray, " m"], difference: Float[np.ndarray, " m"]) -> Float[np.ndarray, " k"]:
    """Where a difference known on a grid changes sign."""
    at = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    exact = x[difference == 0]
    found = []
    for i in at:
        j = int(np.clip(i - 1, 0, len(x) - 4))
        near = slice(j, j + 4)
        falling = np.sign(difference[i])
        root = (
            where(np.zeros(1), x[near], falling * difference[near][None])[0]
            if np.isfinite(difference[near]).all()
            else np.nan
        )
        found.append(root if x[i] <= root <= x[i + 1] else _linear(x[i : i + 2], difference[i : i + 2]))
    return np.sort(np.concatenate([found, exact]))


def _linear(x: np.ndarray, y: np.ndarray) -> float:
    return float(x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0]))
