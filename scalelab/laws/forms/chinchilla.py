"""The Chinchilla law: L(N, D) = E + A / N^alpha + B / D^beta."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from scalelab.laws import allocate
from scalelab.laws.law import Law
from scalelab.laws.powersum import PowerSum


class Chinchilla(Law):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

    N: parameters (count), D: training tokens (count), L: held-out cross-entropy (nats per token, or any other unit,
    which is then E's). E: the irreducible loss; A, B: what a model of one parameter, or one token, would add to it;
    alpha, beta: how fast size and data reduce the loss. The law holds for one pass over the data and for runs whose
    learning-rate schedule came to its end.

    Objective: sum over runs of w Huber_delta(ln L_model - ln L), delta = 1e-3, as in the source.
    """

    name = "chinchilla"
    parameters = ("E", "A", "B", "alpha", "beta")
    inputs = ("params", "tokens")
    equation = "L(N, D) = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2022 (arXiv 2203.15556), approach 3"

    def problem(self, columns: Mapping[str, np.ndarray]) -> PowerSum:
        return PowerSum([columns["params"], columns["tokens"]], columns["loss"])

    def evaluate(self, params: Float[np.ndarray, "R 5"], columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "R n"]:
        E, A, B, alpha, beta = (p[:, None] for p in params.T)
        with np.errstate(over="ignore", invalid="ignore"):  # draws may be wild
            return E + A * columns["params"] ** -alpha + B * columns["tokens"] ** -beta

    def optimum(self, params, flops, cost):
        return allocate.optimum(params, flops, cost)

    def exponents(self, params):
        return allocate.exponents(params)
