"""Surfaces L(N, D) around Chinchilla's: how the shortage of size and that of data combine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scalelab.laws.law import Law
from scalelab.laws.parameter import free, positive
from scalelab.laws.powersum import BLOCKS, EXPONENTS, GRID, PowerSum
from scalelab.laws.regression import FormRegression

COUPLINGS = (1.0, 0.4, 2.0)  # q to start from

ALPHA = free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1])


class Coupled(Law):
    """L(N, D) = E + [(A / N^alpha)^(1/q) + (B / D^beta)^(1/q)]^q.

    N: parameters (count), D: training tokens (count), L: held-out loss. E: the irreducible loss; A / N^alpha and
    B / D^beta: what endless data, and an endless model, leave above it; alpha, beta: how fast; q > 0: how the two
    combine. q = 1 is Chinchilla's law; q -> 0 the larger of the two alone; E = 0 and q = beta Kaplan's law. q far from
    1 needs runs on both sides of the optimum to be told.

    Objective: sum of w Huber_delta(ln L_model - ln L), delta = 1e-3, as for the Chinchilla law.
    """

    name = "coupled"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5),
        "B": positive(1, 1e5),
        "alpha": ALPHA,
        "beta": ALPHA,
        "q": positive(0.2, 5),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = E + [(A / N^alpha)^(1/q) + (B / D^beta)^(1/q)]^q"
    source = "the family that holds Kaplan et al. 2020 (arXiv 2001.08361) and Hoffmann et al. 2022 (arXiv 2203.15556)"

    def formula(self, p, x):
        size, data = np.log(p.A) - p.alpha * np.log(x.params), np.log(p.B) - p.beta * np.log(x.tokens)
        return p.E + np.exp(p.q * np.logaddexp(size / p.q, data / p.q))

    def problem(self, columns, on):
        return NearChinchilla(self, columns, on)


class ChinchillaGamma(Law):
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, the form fitted by xLSTM's authors (arXiv 2510.02228).

    N: parameters (count), D: training tokens (count), L: held-out loss, E: the irreducible loss. gamma = 1 is
    Chinchilla's law. It is `coupled` with q = gamma and every other constant raised accordingly: exponents alpha gamma
    and beta gamma, coefficients A^gamma and B^gamma.

    Objective: sum of w Huber_delta(ln L_model - ln L), delta = 1e-3, as in the source.
    """

    name = "chinchilla-gamma"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5),
        "B": positive(1, 1e5),
        "alpha": ALPHA,
        "beta": ALPHA,
        "gamma": positive(0.2, 5),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = E + (A / N^alpha + B / D^beta)^gamma"
    source = "Beck et al. 2025 (arXiv 2510.02228)"

    def formula(self, p, x):
        size, data = np.log(p.A) - p.alpha * np.log(x.params), np.log(p.B) - p.beta * np.log(x.tokens)
        return p.E + np.exp(p.gamma * np.logaddexp(size, data))

    def problem(self, columns, on):
        return NearChinchilla(self, columns, on, inner=True)


class Multiplicative(Law):
    """L(N, D) = E + A / (N^alpha D^beta).

    N: parameters (count), D: training tokens (count), L: held-out loss, E: the irreducible loss, A: in the unit of L
    times those of N^alpha D^beta. Size and data replace each other without end: there is no compute-optimal allocation,
    the larger exponent takes all. The other end of the coupled family (q -> infinity), and a baseline: where it fits as
    well as Chinchilla's law, the runs do not bracket an optimum.
    """

    name = "multiplicative"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5, linear=True),
        "alpha": free(0.01, 1),
        "beta": free(0.01, 1),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = E + A / (N^alpha D^beta)"
    source = "the product form, as a baseline"

    def formula(self, p, x):
        return p.E + p.A * x.params**-p.alpha * x.tokens**-p.beta


class NearChinchilla(FormRegression):
    """Starts: the best sums of powers, recast at a few q so that the loss is the same where both terms are equal.

    `inner`: A, B, alpha and beta are those inside the bracket.
    """

    def __init__(self, law: Law, columns: Mapping[str, np.ndarray], on: str, inner: bool = False):
        super().__init__(law, columns, on)
        self.inner = inner

    def starts(self, weights, objective, count):
        target = np.exp(self.data) if self.on == "log" else np.maximum(self.data, 1e-3 * np.median(self.data))
        plain = PowerSum([self.columns.params, self.columns.tokens], target)
        each = -(-count // len(COUPLINGS))
        best = plain.natural(plain.grid_starts(weights[None], GRID, BLOCKS)[0, :each])
        recast = []
        for q in COUPLINGS:
            params = np.append(best, np.full((len(best), 1), q), axis=1)
            params[:, 1:3] *= 2.0 ** (1 - q)
            if self.inner:
                params[:, 1:3] **= 1 / q
                params[:, 3:5] /= q
            recast.append(params)
        return self.internal(np.concatenate(recast)[:count])
