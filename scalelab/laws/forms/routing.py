"""The unified routing law: dense and routed models of one data budget, by size and number of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import free, positive


def saturating(x: Any, start: Any, end: Any) -> Any:
    """1 / (1 / (x + 1 / (1/start - 1/end)) + 1/end): `start` at x = 0, about x + start between, `end` as x grows.

    Clark et al. 2022, eq. 7: routing does nothing for few experts and nothing more for very many. Needs start < end.
    """
    return 1.0 / (1.0 / (x + 1.0 / (1.0 / start - 1.0 / end)) + 1.0 / end)


class Routing(Law):
    """log10 L(N, E) = a log10 N + b log10 Ehat + c log10 N log10 Ehat + d (Clark et al. 2022, arXiv 2202.01169, eq. 9).

    N: parameters that one token sees (count), the size of the dense model that was given experts; E: experts per routed
    layer (1: dense, whichever the router); L: validation loss, nats per token. Ehat: the effective number of experts,
    1/Ehat = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max, which is E_start for dense models and at most E_max.
    a: the exponent of size of a model with Ehat = 1, below 0; b: that of experts at N = 1, below 0; c: how fast routing
    stops helping with size, above 0. The source fits one law to each router, dense models in each; routing one layer in
    two, one expert per token, 130e9 tokens.

    The constants go with base 10. Round none of them: c multiplies a number of about 20.

    Objective: least squares on log L, as in the source (whose base-10 squares are these over ln(10)^2).
    """

    name = "routing"
    parameters = {
        "a": free(-0.2, 0.0),
        "b": free(-0.4, 0.0),
        "c": free(0.0, 0.05),
        "d": free(0.5, 2.0),
        "E_start": positive(1.0, 8.0),
        "E_max": positive(60.0, 3000.0),
    }
    inputs = ("params_active", "experts")
    ranges = {"experts": (1.0, np.inf)}
    scale = ("params_active",)
    equation = "log10 L = a log10 N + b log10 Ehat + c log10 N log10 Ehat + d"
    source = "Clark et al. 2022 (arXiv 2202.01169), eq. 9"
    objective = LOG_SQUARES
    published = {
        "Clark 2022, S-Base": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.478},
        "Clark 2022, RL-R": {"a": -0.083, "b": -0.126, "c": 0.012, "d": 1.111, "E_start": 1.880, "E_max": 469.982},
        "Clark 2022, Hash": {"a": -0.087, "b": -0.136, "c": 0.012, "d": 1.157, "E_start": 4.175, "E_max": 477.741},
    }

    def formula(self, p, x):
        size = np.log10(x.params_active)
        experts = np.log10(saturating(x.experts - 1.0, p.E_start, p.E_max))
        return np.exp(np.log(10.0) * (p.a * size + p.b * experts + p.c * size * experts + p.d))

    @staticmethod
    def cutoff(p: Any) -> Any:
        """N = 10^(-b/c), the size beyond which more experts raise the loss; NaN where there is none (c <= 0).

        p: anything with p.b and p.c (`fit.params`, `fit.draws`, constants as a Series).
        """
        b, c = np.asarray(p.b, float), np.asarray(p.c, float)
        with np.errstate(all="ignore"):
            return np.where(c > 0, 10.0 ** (-b / c), np.nan)[()]

    @staticmethod
    def effective_params(p: Any, params_active: Any, experts: Any) -> Any:
        """The size of the dense model with the loss of one of this size and number of experts, by the law p.

        Clark et al. 2022, eq. 10. Arrays broadcast. p as in `cutoff`; for draws, p.a and so on of shape (draws, 1).
        """
        size = np.log10(params_active)
        dense = np.log10(p.E_start)
        routed = np.log10(saturating(np.asarray(experts) - 1.0, p.E_start, p.E_max))
        return 10.0 ** ((p.a * size + p.b * (routed - dense) + p.c * size * routed) / (p.a + p.c * dense))
