"""Parallel streams: loss against parameters and the number of streams that share them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from scalelab.laws.law import Law
from scalelab.laws.parameter import positive
from scalelab.laws.regression import StartsBy


class ParScale(Law):
    """L(N, P) = E + (A / (N (k ln P + 1)))^alpha (Chen et al. 2025, arXiv 2505.10475).

    N: non-embedding parameters (count), P: parallel streams (count, 1 for an ordinary model), L: cross-entropy (nats
    per token) at one fixed number of training tokens. E: the irreducible loss of that number of tokens; A: the
    parameters at which the reducible loss is 1; alpha: how fast parameters reduce it; k: P streams act like
    (k ln P + 1) times the parameters. The data fix A^alpha; A itself moves with alpha, so compare predictions.

    Objective: Huber, delta = 1e-3, on log losses, as in the source.
    """

    name = "parscale"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1e4, 1e12),
        "alpha": positive(0.03, 1.0, upper=3.0),
        "k": positive(0.02, 3.0),
    }
    inputs = ("params_non_embedding", "streams")
    equation = "L(N, P) = E + (A / (N (k ln P + 1)))^alpha"
    source = "Chen et al. 2025 (arXiv 2505.10475)"
    published = {
        "Chen 2025, Stack-V2 Python": {"E": 0.6912, "A": 1.1307e7, "alpha": 0.18936, "k": 0.39346},
        "Chen 2025, Pile": {"E": 1.2886, "A": 1.9752e8, "alpha": 0.19628, "k": 0.33444},
    }

    def columns_of(self, columns):
        return {
            "log_params": np.log(columns["params_non_embedding"]),
            "log_streams": np.log(columns["streams"]),
        }

    def formula(self, p, x):
        return p.E + np.exp(p.alpha * (np.log(p.A) - x.log_params - np.log1p(p.k * x.log_streams)))

    def problem(self, columns, on):
        return StartsBy(self, columns, on, _ByCoefficient(), _from_coefficient)


class _ByCoefficient(ParScale):
    """The same law with K = A^alpha in place of A, in which it is linear: where starts are sought."""

    parameters = {**ParScale.parameters, "A": positive(1, 1e5, linear=True)}

    def formula(self, p, x):
        return p.E + p.A * np.exp(-p.alpha * (x.log_params + np.log1p(p.k * x.log_streams)))


def _from_coefficient(params: Float[np.ndarray, "S 4"]) -> Float[np.ndarray, "S 4"]:
    E, K, alpha, k = params.T
    return np.stack([E, K ** (1 / alpha), alpha, k], axis=1)
