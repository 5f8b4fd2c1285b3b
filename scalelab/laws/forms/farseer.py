"""The Farseer law: floor, coefficient and data exponent are each a stretched exponential of N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.forms import stages
from scalelab.laws.jet import Jet
from scalelab.laws.law import Law
from scalelab.laws.notices import Notice
from scalelab.laws.objective import SQUARES, Objective
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import Constrained, FormRegression, low_discrepancy
from scalelab.laws.solver import minimise
from scalelab.laws.table import Table, prepare

HELD = ("alpha", "beta", "gamma", "D0")  # linear in the solver's coordinates, so that they can be fixed or tied
EXPONENT = 4.0  # |alpha|, |beta|, |gamma| at most; over two decades of N beyond this a curve is a step
# Where starts are drawn: each curve's value and slope in ln N at the mean size.
# Values are of the exponent's log, and of coefficient and floor relative to the loss.
BOX = {"exponent": (-2.3, 0.0), "coefficient": (-4.0, -0.5), "floor": (-1.5, 0.0)}
SLOPE = {"exponent": (-0.3, 0.3), "coefficient": (-0.6, 0.2), "floor": (-0.4, 0.1)}
FAR = 100.0  # how far beyond the data the surface is looked at
NODES, SHARES = np.polynomial.legendre.leggauss(16)
NODES, SHARES = 0.5 * (NODES + 1), 0.5 * SHARES


def stretch(z: Any) -> Any:
    """(e^z - 1) / z, 1 at z = 0, of an array or a jet: the integral of e^(z t) over t from 0 to 1, by Gauss's rule.

    Exact to rounding for |z| < 20; derivatives too, where differences of e^z would cancel.
    """
    v = z.value if isinstance(z, Jet) else z
    e = SHARES * np.exp(v[..., None] * NODES)
    if not isinstance(z, Jet):
        return e.sum(-1)
    return z.chain(e.sum(-1), e @ NODES, e @ NODES**2)


class Farseer(Law):
    """L(N, D) = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) (D/D0)^-exp(a1 N^alpha + b1)
    (Li et al. 2025, arXiv 2506.10972, eq. 15, where D0 = 1 token).

    N: parameters without embeddings (count), D: training tokens (count), L: held-out loss (bits per character in the
    source; any unit). a3, b3, gamma: the floor exp(a3 N^gamma + b3), what endless data would leave at size N. a2, b2,
    beta: what D0 tokens leave above it. a1, b1, alpha: the exponent of data. alpha, beta, gamma, a1, a2, a3 are pure
    numbers together with the unit of N; b2 and b3 carry the unit of the loss.

    D0, the unit of D, is part of the form: (D/D0) raised to a power that depends on N is no multiple of D raised to
    it, and a stretched exponential for the coefficient at D0 tokens is none at another number. It is held, not fitted:
    at the geometric mean of the tokens, which makes the fit the same in any unit of D, or where `fixed={"D0": 1}` says
    (the authors' choice). It stands among the parameters, so that constants and files are complete.

    Objective: squares of the loss itself, as in the source. Inside, each curve a N^q + b is t0 + t1 ((N/N0)^q - 1)/q,
    with N0 the geometric mean of N: smooth at q = 0, where it is a straight line in ln N, and free of bounds. At q = 0
    exactly a and b would be infinite: there q is given as 1e-7. Hence only exponents and D0 can be held or tied.

    Nothing forces a fit to fall with N beyond its data: where it rises, `warnings` say from which N. As N grows without
    end all three curves may tend to constants, so there may be no compute-optimal size; `optimal` gives NaN there, and
    looks at D >= N only.
    """

    name = "farseer"
    parameters = {
        "a1": free(-1, 1),
        "alpha": free(-1, 1, lower=-EXPONENT, upper=EXPONENT),
        "b1": free(-3, 3),
        "a2": free(-100, 100),
        "beta": free(-1, 1, lower=-EXPONENT, upper=EXPONENT),
        "b2": free(-10, 10),
        "a3": free(-1, 1),
        "gamma": free(-1, 1, lower=-EXPONENT, upper=EXPONENT),
        "b3": free(-3, 3),
        "D0": positive(1, 1e12),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) (D/D0)^-exp(a1 N^alpha + b1)"
    source = "Li et al. 2025 (arXiv 2506.10972), eq. 15"
    objective = SQUARES
    published = {
        "Li 2025": {
            "a1": -0.124,
            "alpha": 0.123,
            "b1": 0.424,
            "a2": 88.01,
            "beta": -0.1,
            "b2": -6.287,
            "a3": -0.021,
            "gamma": 0.169,
            "b3": -0.091,
            "D0": 1.0,
        }
    }

    def formula(self, p, x):
        exponent = np.exp(p.a1 * x.params**p.alpha + p.b1)
        coefficient = p.a2 * x.params**p.beta + p.b2
        return np.exp(p.a3 * x.params**p.gamma + p.b3) + np.exp(coefficient - exponent * np.log(x.tokens / p.D0))

    def problem(self, columns, on):
        return BoxCox(self, columns, on)

    def fit_rows(self, rows, options, bootstrap=0, about=None, near=None):
        if "D0" not in options.fixed:
            unit = np.exp(np.average(np.log(rows.columns["tokens"]), weights=rows.weights))
            options = options.replace(fixed={**options.fixed, "D0": float(unit)})
        return super().fit_rows(rows, options, bootstrap, about, near)

    def _constrained(self, rows, options):
        for name in (*options.fixed, *options.tied, *options.tied.values()):
            if name in self.parameters and name not in HELD:
                raise BadInput("fixed or tied", name, f"only {', '.join(HELD)} can be in this law")
        problem = super()._constrained(rows, options)
        assert isinstance(problem, Constrained)
        assert isinstance(problem.base, BoxCox)
        problem.base.log_unit = float(np.log(options.fixed["D0"]))
        return problem

    def findings(self, fit):
        """`rises-with-size`: up to FAR times the largest run's size, at any of its token counts or up to FAR times
        them, the fitted surface stops falling."""
        N, D = (fit.rows.columns[role] for role in self.inputs)
        sizes = np.geomspace(N.min(), FAR * N.max(), 129)
        tokens = np.geomspace(D.min(), FAR * D.max(), 33)
        grid = {"params": np.repeat(sizes, len(tokens)), "tokens": np.tile(tokens, len(sizes))}
        surface = self.evaluate(fit.estimate[None], grid)[0].reshape(len(sizes), len(tokens))
        with np.errstate(invalid="ignore"):  # a refit to few rows may be infinite out there
            rises = (np.diff(surface, axis=0) >= 0).any(1)
        if rises.any():
            first = float(sizes[rises.argmax()])
            yield Notice(
                "rises-with-size",
                "warning" if first > N.max() else "error",
                f"the fitted loss rises with N from N = {first:.3g} on; the largest run has {N.max():.3g}.",
                "do not extrapolate to that size; add larger runs, or measure D from another D0.",
                {"params": first, "largest": float(N.max())},
            )

    def differential(
        self, table: Table, *, columns: Mapping[str, str] | None = None, D0: float | None = 1.0
    ) -> pd.Series:
        """The authors' own stage-wise estimate, from differences of the loss between neighbouring token counts.

        Needs a grid: several sizes, each at four or more token counts in one constant ratio. See `stages.differential`.
        D0 None: the geometric mean of the tokens. `predict` takes what comes back. `fit` minimises the squares of all
        losses together and reaches less; this is the method to compare with.
        """
        rows = prepare(table, self.inputs, columns=columns)
        N, D = rows.columns["params"], rows.columns["tokens"]
        unit = float(np.exp(np.log(D).mean())) if D0 is None else float(D0)
        theta = stages.differential(N, D / unit, rows.columns["loss"])
        problem = BoxCox(self, rows.columns, "value")
        return pd.Series(problem.natural(np.append(theta, np.log(unit))), index=list(self.parameters))


class BoxCox(FormRegression):
    """Coordinates: slope t1, exponent q and value t0 at the mean size of each curve, in the form's order, and ln D0."""

    def __init__(self, law: Farseer, columns: Mapping[str, np.ndarray], on: str):
        super().__init__(law, columns, on)
        logs = np.log(columns["params"])
        self.centre = logs.mean()
        sizes, self.size_of_row = np.unique(logs, return_inverse=True)
        self.sizes = sizes - self.centre
        self.log_tokens = np.log(columns["tokens"])
        self.level = float(np.log(np.median(columns[law.target])))
        self.log_unit = float(self.log_tokens.mean())  # of D0, for starts

    def _formula(self, coordinates: Sequence[Any]) -> Any:
        with np.errstate(all="ignore"):
            exponent, coefficient, floor = (
                (t0 + t1 * self.sizes * stretch(q * self.sizes))
                for t1, q, t0 in (coordinates[0:3], coordinates[3:6], coordinates[6:9])
            )
            at = (slice(None), self.size_of_row)
            log_d = self.log_tokens - coordinates[9]
            value = np.exp(floor)[at] + np.exp(coefficient[at] - np.exp(exponent)[at] * log_d)
            return np.log(value) if self.on == "log" else value

    def natural(self, theta: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        out = np.array(theta, dtype=float)
        for first in (0, 3, 6):
            t1, q, t0 = (theta[..., first + i] for i in range(3))
            q = np.where(np.abs(q) < 1e-7, 1e-7, q)
            out[..., first], out[..., first + 1] = t1 / q * np.exp(-q * self.centre), q
            out[..., first + 2] = t0 - t1 / q
        out[..., 9] = np.exp(theta[..., 9])
        return out

    def internal(self, params: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        out = np.array(params, dtype=float)
        for first in (0, 3, 6):
            a, q, b = (params[..., first + i] for i in range(3))
            power = a * np.exp(q * self.centre)
            out[..., first], out[..., first + 2] = q * power, b + power
        out[..., 9] = np.log(params[..., 9])
        return np.clip(out, self.lower, self.upper)

    # ---------------------------------------------------------------------------------------- starting points

    def starts(self, weights, objective, count):
        return self.settle(self.draw(low_discrepancy(count, 6)), weights, objective)

    def draw(self, unit: Float[np.ndarray, "S 6"]) -> Float[np.ndarray, "S P"]:
        """Straight curves, from points of the unit cube: value and slope of each within its BOX and SLOPE."""
        out = np.zeros((len(unit), 10))
        for first, curve in ((0, "exponent"), (3, "coefficient"), (6, "floor")):
            i = 2 * first // 3
            for at, (low, high), share in ((first, SLOPE[curve], unit[:, i]), (first + 2, BOX[curve], unit[:, i + 1])):
                out[:, at] = low + share * (high - low)
        # the coefficient was drawn at the mean token count
        out[:, 5] += self.level + np.exp(out[:, 2]) * (self.log_tokens.mean() - self.log_unit)
        out[:, 8] += self.level
        out[:, 9] = self.log_unit
        return out

    def settle(self, theta: np.ndarray, weights: np.ndarray, objective: Objective) -> Float[np.ndarray, "S P"]:
        """The best straight curves (all exponents 0) from each start, best first.

        Bent ones are sought from there: with all nine free at once, every third start ends in a curve that bends at
        one size only.
        """
        held = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "D0": float(np.exp(self.log_unit))}
        straight = Constrained(self, list(self.law.parameters), list(self.law.parameters.values()), held, {})
        found = minimise(straight, theta[:, straight.keep], weights, objective, tolerance=1e-4, max_iterations=30)
        return straight._full(found.theta)[np.argsort(found.value, kind="stable")]
