"""Over-training: the loss at any ratio of tokens to parameters, and the downstream error at a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.laws import allocate
from scalelab.laws.law import Law
from scalelab.laws.objective import SQUARES
from scalelab.laws.parameter import free, positive


class OverTraining(Law):
    """L(C, M) = E + (a M^eta + b M^-eta) C^-eta with C = 6 N D and M = D / N (Gadre et al. 2024, arXiv 2403.08540).

    N: parameters (count), D: training tokens (count), C: training FLOPs, M: tokens per parameter, L: held-out
    cross-entropy (nats per token). E: irreducible loss; a, b: what too few parameters and too few tokens cost; eta: how
    fast compute reduces the loss at any fixed M. It is Chinchilla's law with alpha = beta = 2 eta, A = a / 6^eta and
    B = b / 6^eta: four parameters, which the source fits to five small runs to predict far larger and longer ones.

    Objective: unweighted least squares on the loss, as in the source. Four parameters fit five runs whatever the
    truth: judge by runs that the fit has not seen.
    """

    name = "overtraining"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "a": positive(1, 1e5, linear=True),
        "b": positive(1, 1e5, linear=True),
        "eta": free(0.03, 0.6, lower=1e-3, upper=2.0),
    }
    inputs = ("params", "tokens")
    objective = SQUARES
    equation = "L(C, M) = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D, M = D / N"
    source = "Gadre et al. 2024 (arXiv 2403.08540)"
    published = {  # the source's fits to five runs, evaluated on C4's validation set
        "Gadre 2024, C4": {"E": 1.508, "a": 141.3, "b": 189.5, "eta": 0.1212},
        "Gadre 2024, RedPajama": {"E": 1.837, "a": 212.2, "b": 366.7, "eta": 0.1364},
        "Gadre 2024, RefinedWeb": {"E": 1.735, "a": 157.1, "b": 246.2, "eta": 0.1272},
    }

    def columns_of(self, columns):
        N, D = columns["params"], columns["tokens"]
        return {"log_compute": np.log(6.0) + np.log(N) + np.log(D), "log_ratio": np.log(D) - np.log(N)}

    def formula(self, p, x):
        return (
            p.E
            + p.a * np.exp(p.eta * (x.log_ratio - x.log_compute))
            + p.b * np.exp(-p.eta * (x.log_ratio + x.log_compute))
        )

    def optimum(self, params, flops, cost, **others):
        return allocate.optimum(_chinchilla(params), flops, cost)

    def exponents(self, params: Float[np.ndarray, "R 4"]) -> Float[np.ndarray, "R 3"]:
        return allocate.exponents(_chinchilla(params))

    @staticmethod
    def best_ratio(p: Any) -> Any:
        """The tokens per parameter that give the lowest loss at any C = 6 N D: M* = (b / a)^(1 / (2 eta)).

        p has a, b and eta: `fit.derive(law.best_ratio)` gives it with its interval.
        """
        return (p.b / p.a) ** (1 / (2 * p.eta))


def _chinchilla(params: Float[np.ndarray, "R 4"]) -> Float[np.ndarray, "R 5"]:
    """E, a, b, eta -> E, A, B, alpha, beta."""
    E, a, b, eta = params.T
    return np.stack([E, a * 6.0**-eta, b * 6.0**-eta, 2 * eta, 2 * eta], axis=1)


class LossToError(Law):
    """Err(L) = epsilon - k exp(-gamma L): mean top-1 error of downstream tasks at a loss (Gadre et al. 2024).

    L: held-out cross-entropy (nats per token), Err: error averaged over tasks, in [0, 1]. epsilon: the error at high
    loss, where a model guesses; k, gamma: how far and how fast error falls with loss. Single tasks are noisy; the
    average is what the law predicts.

    Objective: unweighted least squares on the error, as in the source.
    """

    name = "loss-to-error"
    parameters = {
        "epsilon": positive(0.1, 1.0, linear=True),
        "k": positive(0.1, 100, linear=True),
        "gamma": positive(0.05, 5),
    }
    inputs = ("loss",)
    target = "error"
    objective = SQUARES
    equation = "Err(L) = epsilon - k exp(-gamma L)"
    source = "Gadre et al. 2024 (arXiv 2403.08540)"
    published = {  # five runs and the 1.4 B run at M = 20 of each corpus; the loss is C4's
        "Gadre 2024, C4, 17 tasks": {"epsilon": 0.8497, "k": 2.0789, "gamma": 0.7561},
        "Gadre 2024, C4, 46 tasks": {"epsilon": 0.7589, "k": 1.2885, "gamma": 0.9722},
        "Gadre 2024, RedPajama, 17 tasks": {"epsilon": 0.8570, "k": 2.2065, "gamma": 0.7146},
        "Gadre 2024, RedPajama, 46 tasks": {"epsilon": 0.7608, "k": 1.3229, "gamma": 0.8907},
        "Gadre 2024, RefinedWeb, 17 tasks": {"epsilon": 0.8653, "k": 2.2148, "gamma": 0.7070},
        "Gadre 2024, RefinedWeb, 46 tasks": {"epsilon": 0.7677, "k": 1.1281, "gamma": 0.8215},
    }

    def formula(self, p, x):
        return p.epsilon - p.k * np.exp(-p.gamma * x.loss)

    def size(self, columns):
        return 1 / columns["loss"], "1/L"
