"""The Chinchilla law: L(N, D) = E + A / N^alpha + B / D^beta."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from scalelab.laws import allocate
from scalelab.laws.law import Law
from scalelab.laws.parameter import free, positive
from scalelab.laws.powersum import EXPONENTS, PowerSum
from scalelab.laws.regression import Regression


class Chinchilla(Law):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

    N: parameters (count), D: training tokens (count), L: held-out cross-entropy (nats per token, or any other unit,
    which is then E's). E: the irreducible loss; A, B: what a model of one parameter, or one token, would add to it;
    alpha, beta: how fast size and data reduce the loss. The law holds for one pass over the data and for runs whose
    learning-rate schedule came to its end.

    Objective: sum over runs of w Huber_delta(ln L_model - ln L), delta = 1e-3, as in the source.
    """

    name = "chinchilla"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5, linear=True),
        "B": positive(1, 1e5, linear=True),
        "alpha": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
        "beta": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2022 (arXiv 2203.15556), approach 3"
    published = {
        "Hoffmann 2022": {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849},
        "Besiroglu 2024": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    }

    def formula(self, p, x):
        return p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        if on == "value":
            return super().problem(columns, on)
        return PowerSum([columns["params"], columns["tokens"]], columns[self.target])

    def optimum(self, params, flops, cost, **others):
        return allocate.optimum(params, flops, cost)

    def exponents(self, params: Float[np.ndarray, "R 5"]) -> Float[np.ndarray, "R 3"]:
        return allocate.exponents(params)
