"""Kaplan's laws: loss against parameters and data, and against parameters and steps, without a floor.

L(N) = (N_c/N)^alpha_N and L(D) = (D_c/D)^alpha_D alone are `PowerLaw("params")` and `PowerLaw("tokens")`, with
A = N_c^alpha_N and D_c^alpha_D.
"""

from __future__ import annotations

import numpy as np

from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import FormRegression, low_discrepancy

STARTS = (0.02, 0.8)  # exponents to start from


class Kaplan(Law):
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5).

    N: parameters without embeddings (count), D: tokens of the training set, trained on until the loss stops falling
    (count), L: cross-entropy (nats per token in the source). N_c, D_c: where the loss of endless data, or of an
    endless model, would be 1 in the unit of L; alpha_N, alpha_D: their powers. With E = 0 and q = alpha_D it belongs to
    the `coupled` family. There is no irreducible loss: the law cannot hold for ever.

    Objective: squares of log residuals.
    """

    name = "kaplan"
    parameters = {
        "N_c": positive(1e8, 1e18),
        "D_c": positive(1e8, 1e18),
        "alpha_N": free(*STARTS, lower=1e-3, upper=4),
        "alpha_D": free(*STARTS, lower=1e-3, upper=4),
    }
    inputs = ("params", "tokens")
    equation = "L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D"
    source = "Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.5"
    objective = LOG_SQUARES
    published = {"Kaplan 2020": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}}

    def formula(self, p, x):
        size = p.alpha_N / p.alpha_D * (np.log(p.N_c) - np.log(x.params))
        return np.exp(p.alpha_D * np.logaddexp(size, np.log(p.D_c) - np.log(x.tokens)))

    def problem(self, columns, on):
        return FromExponents(self, columns, on)


class KaplanSteps(Law):
    """L(N, S) = (N_c/N)^alpha_N + (S_c/S)^alpha_S (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.6).

    N: parameters without embeddings (count), S: the least number of steps, i.e. steps at a batch far above the critical
    one, S_min = steps / (1 + B_crit/B); N_c, S_c: where either term would be 1 in the unit of L.

    Objective: squares of log residuals.
    """

    name = "kaplan-steps"
    parameters = {
        "N_c": positive(1e8, 1e18),
        "S_c": positive(1, 1e8),
        "alpha_N": free(*STARTS, lower=1e-3, upper=4),
        "alpha_S": free(*STARTS, lower=1e-3, upper=4),
    }
    inputs = ("params", "steps")
    equation = "L(N, S) = (N_c/N)^alpha_N + (S_c/S)^alpha_S"
    source = "Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.6"
    objective = LOG_SQUARES

    def formula(self, p, x):
        return np.exp(p.alpha_N * (np.log(p.N_c) - np.log(x.params))) + np.exp(
            p.alpha_S * (np.log(p.S_c) - np.log(x.steps))
        )

    def problem(self, columns, on):
        return FromExponents(self, columns, on)


class FromExponents(FormRegression):
    """Starts: exponents from their range, and constants for which either term alone is half the loss at the data's
    centre. So starts, and the answer, do not depend on units."""

    def starts(self, weights, objective, count):
        low, high = np.log(STARTS)
        exponents = np.exp(low + low_discrepancy(count, 2) * (high - low))
        target = np.exp(self.data) if self.on == "log" else self.data
        half = np.log(np.median(np.abs(target)) / 2)
        centres = [np.log(getattr(self.columns, role)).mean() for role in self.law.inputs]
        constants = np.exp(np.array(centres) + half / exponents)
        return self.internal(np.concatenate([constants, exponents], axis=1))
