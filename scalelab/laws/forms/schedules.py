"""Whole loss curves under any learning-rate schedule: the annealing law and the multi-power law.

The table has a row per point of a curve: `schedule` (a label, one per curve), `step`, `lr`, `loss`; see
`curves.curve_features` for how the rate between rows is understood. A schedule that was never run is predicted from
the same columns without a loss. The points of one curve are one cluster of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.laws.curves import AGE, DROP, LR_SUM, RATE, SINCE, curve_features
from scalelab.laws.fit import Fit
from scalelab.laws.jet import Jet, value_of
from scalelab.laws.law import Law
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import FormRegression, Regression
from scalelab.laws.table import Table, frame_of

ELEMENTS = 1 << 17  # parameter vectors x rows x nodes in memory at once
SEARCHED = 48  # rows on which starting points are sought

# value, first derivatives and second derivatives (i <= j) of a sum over nodes
Derivatives = tuple[np.ndarray, Sequence[np.ndarray], Mapping[tuple[int, int], np.ndarray]]


class CurveLaw(Law):
    """A law of a whole loss curve, whose inputs are computed from its schedule."""

    scale = (LR_SUM,)

    @property
    def needs(self) -> tuple[str, ...]:
        return "schedule", "step", "lr"

    def table_of(self, table: Table, columns: Mapping[str, str], fitting: bool = False) -> Table:
        table = frame_of(table)
        if LR_SUM in table:  # prepared by `curve_features`
            return table
        features = curve_features(table, columns, self.target if fitting else None)
        return features if fitting else features.loc[features[LR_SUM] > 0]  # before any learning there is no prediction

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        return CurveRegression(self, columns, on)


class CurveRegression(FormRegression):
    """A curve law's regression, whose starting points are sought on a few rows spread over all curves."""

    def __init__(self, law: Law, columns: Mapping[str, np.ndarray], on: str):
        super().__init__(law, columns, on)
        self.given, self.order = columns, np.lexsort([columns[law.target], columns[LR_SUM]])

    def starts(self, weights, objective, count):
        picked = self.order[np.linspace(0, self.rows - 1, min(self.rows, SEARCHED)).astype(int)]
        few = {role: np.asarray(self.given[role])[picked] for role in (*self.law.inputs, self.law.target)}
        return FormRegression(self.law, few, self.on).starts(weights[picked], objective, count)


class Annealing(CurveLaw):
    """L(s) = L0 + A S1^-alpha - C S2, S1 = sum_i eta_i, S2 = sum_i m_i, m_i = lam m_(i-1) + (eta_(i-1) - eta_i).

    eta_i: learning rate of step i; S1: the area under the schedule up to step s, warm-up included; S2: the annealing
    area, a sum of the rate's changes after the warm-up, each counted with a momentum that forgets within 1 / (1 - lam)
    steps (Tissue et al. 2024, arXiv 2408.11029). L0: the loss of infinitely long training at a constant rate, in the
    loss's unit; A, alpha: how training reduces it; C: how much annealing adds, per unit of rate. A rise after the
    warm-up counts as negative annealing.

    `lam` is held at 0.999, the source's choice, unless `fixed=` says otherwise: `fixed={}` fits it too. The steps of
    the warm-up itself do not follow the law: leave them out. Objective: Huber, delta = 1e-3, on ln L.
    """

    name = "annealing"
    parameters = {
        "L0": positive(1e-2, 10, linear=True),
        "A": positive(1e-3, 10, linear=True),
        "alpha": free(0.1, 1.5, lower=0.0, upper=5.0),
        "C": free(-10, 10, linear=True),
        "lam": free(0.99, 0.9999, lower=0.5, upper=0.999999),
    }
    inputs = (LR_SUM, *DROP, *AGE)
    may_be_zero = (*DROP, *AGE)
    equation = "L(s) = L0 + A S1^-alpha - C S2"
    source = "Tissue et al. 2024 (arXiv 2408.11029)"

    def fit(self, table: Table, *, fixed: Mapping[str, float] | None = None, **options: Any) -> Fit:
        """As `Law.fit`, with `lam` held at 0.999 unless `fixed` is given."""
        return super().fit(table, fixed={"lam": 0.999} if fixed is None else fixed, **options)

    def columns_of(self, columns):
        return {"S1": columns[LR_SUM], "nodes": _stack(columns, DROP, AGE)}

    def formula(self, p, x):
        return p.L0 + p.A * x.S1**-p.alpha - p.C * _over_nodes(_annealed, [p.lam], x.nodes)


class MultiPower(CurveLaw):
    """L(t) = L0 + A S1(t)^-alpha - B sum_k (eta_(k-1) - eta_k) [1 - (1 + C eta_k^-gamma S_k(t))^-beta].

    eta_k: learning rate of step k; S1(t) = sum of the rates up to step t, warm-up included; S_k(t) = sum of the rates
    from step k to t; the sum runs over all steps k <= t at which the rate changes, the warm-up's rise included (Luo et
    al. 2025, arXiv 2503.12811). L0: irreducible loss, in the loss's unit; A, alpha: training at a constant rate; B: the
    most that a unit of decay can reduce the loss; C, beta, gamma: how fast it does, in units of the rates given.

    The steps of the warm-up itself do not follow the law: leave them out. Objective: Huber, delta = 1e-3, on ln L.
    """

    name = "multi-power"
    parameters = {
        "L0": positive(1e-2, 10, linear=True),
        "A": positive(1e-3, 10, linear=True),
        "alpha": free(0.1, 1.5, lower=0.0, upper=5.0),
        "B": positive(1, 1e5, linear=True),
        "C": positive(0.01, 100),
        "beta": positive(0.1, 3),
        "gamma": free(0.0, 1.2, lower=-2.0, upper=3.0),
    }
    inputs = (LR_SUM, *DROP, *RATE, *SINCE)
    may_be_zero = (*DROP, *RATE, *SINCE)
    equation = "L(t) = L0 + A S1^-alpha - B sum_k (eta_(k-1) - eta_k) [1 - (1 + C eta_k^-gamma S_k)^-beta]"
    source = "Luo et al. 2025 (arXiv 2503.12811)"
    published = {
        "Luo 2025, 25M": {
            "L0": 3.04045406, "A": 0.52468604, "alpha": 0.50786857, "B": 363.78751622, "C": 2.06560812,
            "beta": 0.58279013, "gamma": 0.64142257,
        },
        "Luo 2025, 100M": {
            "L0": 2.6514477, "A": 0.60115152, "alpha": 0.45295811, "B": 437.9464276, "C": 2.13245612,
            "beta": 0.59785199, "gamma": 0.65523644,
        },
    }  # fmt: skip

    def columns_of(self, columns):
        drop, rate, since = _stack(columns, DROP, RATE, SINCE)
        peak = max(float(rate.max()), 1e-300)
        floor = 1e-9 * peak  # a rate of 0 has no power: where it ends a curve nothing is summed since, and 0 results
        return {
            "S1": columns[LR_SUM],
            "nodes": np.stack([drop, np.log(np.maximum(rate, floor)), np.log(np.maximum(since, 1e-200))]),
        }

    def formula(self, p, x):
        return p.L0 + p.A * x.S1**-p.alpha - p.B * _over_nodes(_saturating, [np.log(p.C), p.gamma, p.beta], x.nodes)


def _stack(columns: Mapping[str, np.ndarray], *roles: Sequence[str]) -> Float[np.ndarray, "q n NODES"]:
    """The nodes of all rows, without those that no row uses."""
    nodes = np.stack([np.stack([columns[r] for r in group], axis=1) for group in roles])
    used = max(1, int((nodes[0] != 0).any(0).sum()))  # they come first
    return np.ascontiguousarray(nodes[:, :, :used])


def _over_nodes(
    term: Callable[..., Derivatives], parameters: Sequence[Any], nodes: Float[np.ndarray, "q n m"]
) -> Jet | np.ndarray:
    """A sum over each row's nodes as a function of parameters (draws, 1), arrays or jets.

    `term` has the derivatives in the parameters themselves; a second-order Taylor polynomial in jets, exact because
    jets are, carries them on to whatever the parameters depend on. Rows go in chunks: memory stays bounded.
    """
    values = np.broadcast_arrays(*(np.asarray(value_of(q), float) for q in parameters))
    draws, (_, n, m) = len(values[0]), nodes.shape
    jets = any(isinstance(q, Jet) for q in parameters)
    size = max(1, ELEMENTS // max(1, draws * m))
    chunks = [
        term(*(v[:, :, None] for v in values), *nodes[:, i : i + size], derivatives=jets) for i in range(0, n, size)
    ]
    value = np.concatenate([c[0] for c in chunks], axis=1)
    if not jets:
        return value
    steps = [q - value_of(q) for q in parameters]  # zero, with the parameter's derivatives
    total: Any = value
    for i, step in enumerate(steps):
        total = total + step * np.concatenate([c[1][i] for c in chunks], axis=1)
    for i, j in chunks[0][2]:
        half = 0.5 if i == j else 1.0
        total = total + (steps[i] * steps[j]) * (half * np.concatenate([c[2][i, j] for c in chunks], axis=1))
    return total


def _annealed(lam, drop, age, derivatives: bool) -> Derivatives:
    """S2 = sum over changes of drop (1 - lam^age) / (1 - lam): what their momenta have added up to by now."""
    left = 1 - lam
    power = lam**age
    share = (1 - power) / left
    value = (drop * share).sum(-1)
    if not derivatives:
        return value, (), {}
    first = (share - age * power / lam) / left
    second = (2 * first - age * (age - 1) * power / lam**2) / left
    return value, ((drop * first).sum(-1),), {(0, 0): (drop * second).sum(-1)}


def _saturating(log_c, gamma, beta, drop, log_rate, log_since, derivatives: bool) -> Derivatives:
    """sum over changes of drop (1 - h), h = (1 + exp q)^-beta, q = ln C - gamma ln eta_k + ln S_k."""
    q = log_c + log_since - gamma * log_rate
    soft = np.logaddexp(0.0, q)
    h = np.exp(-beta * soft)
    value = (drop * (1 - h)).sum(-1)
    if not derivatives:
        return value, (), {}
    sigma = np.exp(q - soft)
    drop_h = drop * h
    in_q = drop_h * sigma  # d value / d q is beta in_q
    in_qq = in_q * (1 - sigma - beta * sigma)
    in_qb = in_q * (1 - beta * soft)
    bent = in_qq * log_rate
    first = (beta[..., 0] * in_q.sum(-1), -beta[..., 0] * (in_q * log_rate).sum(-1), (drop_h * soft).sum(-1))
    second = {
        (0, 0): beta[..., 0] * in_qq.sum(-1),
        (0, 1): -beta[..., 0] * bent.sum(-1),
        (1, 1): beta[..., 0] * (bent * log_rate).sum(-1),
        (0, 2): in_qb.sum(-1),
        (1, 2): -(in_qb * log_rate).sum(-1),
        (2, 2): -(drop_h * soft * soft).sum(-1),
    }
    return value, first, second
