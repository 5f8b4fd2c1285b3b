"""The Farseer law: floor, coefficient and data exponent are each a stretched exponential of N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.jet import Jet
from scalelab.laws.law import Law
from scalelab.laws.objective import SQUARES
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import FormRegression

EXPONENT = 4.0  # |alpha|, |beta|, |gamma| at most; over two decades of N beyond this a curve is a step
# Where starts are drawn: each curve's value and slope in ln N at the mean size, and the exponent of its bend.
# Values are of the exponent's log, and of coefficient and floor relative to the loss.
BOX = {"exponent": (-2.3, 0.0), "coefficient": (-4.0, -0.5), "floor": (-1.5, 0.0)}
SLOPE = {"exponent": (-0.3, 0.3), "coefficient": (-0.6, 0.2), "floor": (-0.4, 0.1)}
BEND = (-1.0, 1.0)
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

    Nothing forces a fit to fall with N beyond its data. As N grows without end all three curves may tend to constants,
    so there may be no compute-optimal size; `optimal` gives NaN there, and looks at D >= N only.
    """

    name = "farseer"
    parameters = {
        "a1": free(-1, 1),
        "alpha": free(*BEND, lower=-EXPONENT, upper=EXPONENT),
        "b1": free(-3, 3),
        "a2": free(-100, 100),
        "beta": free(*BEND, lower=-EXPONENT, upper=EXPONENT),
        "b2": free(-10, 10),
        "a3": free(-1, 1),
        "gamma": free(*BEND, lower=-EXPONENT, upper=EXPONENT),
        "b3": free(-3, 3),
        "D0": positive(1, 1e12),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) (D/D0)^-exp(a1 N^alpha + b1)"
    source = "Li et al. 2025 (arXiv 2506.10972), eq. 15"
    objective = SQUARES
    published = {
        "Li 2025": {
            "a1": -0.124, "alpha": 0.123, "b1": 0.424, "a2": 88.01, "beta": -0.1, "b2": -6.287,
            "a3": -0.021, "gamma": 0.169, "b3": -0.091, "D0": 1.0,
        }  # fmt: skip
    }

    def formula(self, p, x):
        exponent = np.exp(p.a1 * x.params**p.alpha + p.b1)
        coefficient = p.a2 * x.params**p.beta + p.b2
        return np.exp(p.a3 * x.params**p.gamma + p.b3) + np.exp(coefficient - exponent * np.log(x.tokens / p.D0))

    def problem(self, columns, on):
        return BoxCox(self, columns, on)

    def fit_rows(self, rows, options, bootstrap=0, about=None, near=None):
        curved = [n for n in (*options.fixed, *options.tied, *options.tied.values()) if n[0] in "ab" and n[1:].isdigit()]
        if curved:
            raise BadInput("fixed or tied", curved, "only alpha, beta, gamma and D0 can be held or tied in this law")
        if "D0" not in options.fixed:
            unit = np.exp(np.average(np.log(rows.columns["tokens"]), weights=rows.weights))
            options = options.replace(fixed={**options.fixed, "D0": float(unit)})
        return super().fit_rows(rows, options, bootstrap, about, near)


class BoxCox(FormRegression):
    """Coordinates: (slope t1, exponent q, value t0) of each curve at the mean size, as the form orders them, and ln D0."""

    def __init__(self, law: Farseer, columns: Mapping[str, np.ndarray], on: str):
        super().__init__(law, columns, on)
        logs = np.log(columns["params"])
        self.centre = logs.mean()
        sizes, self.size_of_row = np.unique(logs, return_inverse=True)
        self.sizes = sizes - self.centre
        self.log_tokens = np.log(columns["tokens"])
        level = np.log(np.median(columns[law.target]))
        for name, (first, shift) in {"exponent": (0, 0.0), "coefficient": (3, level), "floor": (6, level)}.items():
            low, high = BOX[name]
            self.specs[first] = free(*SLOPE[name])
            self.specs[first + 2] = free(low + shift, high + shift)

    def _formula(self, coordinates: Sequence[Any]) -> Any:
        with np.errstate(all="ignore"):
            exponent, coefficient, floor = (
                (t0 + t1 * self.sizes * stretch(q * self.sizes))
                for t1, q, t0 in (coordinates[0:3], coordinates[3:6], coordinates[6:9])
            )
            at = (slice(None), self.size_of_row)
            value = np.exp(floor)[at] + np.exp(coefficient[at] - np.exp(exponent)[at] * (self.log_tokens - coordinates[9]))
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
