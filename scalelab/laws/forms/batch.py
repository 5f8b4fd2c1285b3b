"""Batch size: the trade-off of steps against examples, the critical batch, and how the learning rate follows it.

McCandlish et al. 2018 (arXiv 1812.06162): to a given loss, S steps and Ex examples are traded along
(S / S_min - 1) (Ex / Ex_min - 1) = 1; the critical batch B_crit = Ex_min / S_min is where both cost twice their least.
Batches and examples are in one unit, tokens where columns have RunRecord's names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import ArrayLike

from scalelab.errors import BadInput
from scalelab.laws.fit import Fit
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import positive


class CriticalBatch(Law):
    """S(B) = S_min (1 + B_crit / B): optimizer steps to a given loss at batch B (McCandlish et al. 2018).

    B: batch (tokens), S: steps to reach the loss. S_min: the steps that no batch goes below; B_crit: critical batch
    (tokens). All rows must be of one loss; interpolate the curves of runs at several batches to get them. Examples
    needed: Ex = S B = Ex_min (1 + B / B_crit), Ex_min = S_min B_crit (`least_examples`).

    Objective: least squares on ln S.
    """

    name = "critical-batch"
    parameters = {"S_min": positive(1, 1e7, linear=True), "B_crit": positive(1e2, 1e9)}
    inputs = ("batch_tokens",)
    target = "steps"
    objective = LOG_SQUARES
    equation = "S(B) = S_min (1 + B_crit / B)"
    source = "McCandlish et al. 2018 (arXiv 1812.06162)"

    def formula(self, p, x):
        return p.S_min * (1 + p.B_crit / x.batch_tokens)


class CriticalBatchOfLoss(Law):
    """B_crit(L) = B_star L^(-1 / alpha_B): the critical batch grows as the loss falls (Kaplan et al. 2020).

    L: training loss (nats per token), B_crit in tokens. B_star: its value at a loss of 1; alpha_B: exponent. The
    table has one row per loss, with the critical batch that a `critical-batch` fit or the noise scale gave there.

    Objective: least squares on ln B_crit.
    """

    name = "critical-batch-of-loss"
    parameters = {"B_star": positive(1e6, 1e10, linear=True), "alpha_B": positive(0.05, 2)}
    inputs = ("loss",)
    target = "batch_tokens"
    objective = LOG_SQUARES
    equation = "B_crit(L) = B_star L^(-1 / alpha_B)"
    source = "Kaplan et al. 2020 (arXiv 2001.08361)"
    published = {"Kaplan 2020": {"B_star": 2e8, "alpha_B": 0.21}}

    def formula(self, p, x):
        return p.B_star * np.exp(-np.log(x.loss) / p.alpha_B)


def least_examples(fit: Fit, level: float = 0.95) -> pd.Series:
    """Ex_min = S_min B_crit of a `critical-batch` fit, in the unit of its batches: estimate, lower, upper."""
    if not isinstance(fit.law, CriticalBatch):
        raise BadInput("fit", fit.law.name, "must be of the critical-batch law")
    derived = fit.derive(lambda p: p.S_min * p.B_crit, level)
    assert isinstance(derived, pd.Series)
    return derived.rename("Ex_min")


def critical_batch(loss: ArrayLike) -> Any:
    """Kaplan's B_crit(L) = 2e8 / L^(1 / 0.21) tokens, at a loss in nats per token; of their data and tokenizer."""
    p = CriticalBatchOfLoss.published["Kaplan 2020"]
    return p["B_star"] / _positive("loss", loss) ** (1 / p["alpha_B"])


def least_steps(steps: ArrayLike, batch: ArrayLike, critical: ArrayLike) -> Any:
    """S_min = S / (1 + B_crit / B): the steps that an unlimited batch would have needed to the same loss."""
    S, B, crit = _positive("steps", steps), _positive("batch", batch), _positive("critical", critical)
    return S / (1 + crit / B)


def least_compute(flops: ArrayLike, batch: ArrayLike, critical: ArrayLike) -> Any:
    """C_min = C / (1 + B / B_crit): the compute that a batch far below the critical one would have needed."""
    C, B, crit = _positive("flops", flops), _positive("batch", batch), _positive("critical", critical)
    return C / (1 + B / crit)


# ------------------------------------------------------------------------------------------------ noise scale


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2, in the unit of the batches, and its interval.

    `square` estimates |G|^2 and `trace` estimates tr(Sigma); both are unbiased and may come out below 0, where the
    gradients are too few: `estimate` is then NaN.
    """

    estimate: float
    lower: float
    upper: float
    square: float
    trace: float
    pairs: int


def noise_scale(
    square_small: Float[np.ndarray, " n"], square_big: Float[np.ndarray, " n"], batch_small: float, batch_big: float,
    *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0,
) -> NoiseScale:  # fmt: skip
    """The simple noise scale from squared gradient norms at two batch sizes (McCandlish et al. 2018, appendix A.1).

    Args:
      square_small, square_big: |G|^2 of gradients averaged over batch_small and batch_big examples, one pair per
        measurement (at one place in training, or nearby ones).
      batch_small, batch_big: in tokens, or whatever unit the answer is wanted in.
      bootstrap, level, seed: of the percentile interval, over pairs.

    |G|^2 = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small) and
    tr Sigma = (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big) are averaged over pairs apart, because the mean of
    ratios is biased. Raises `BadInput` for batches that are not 0 < small < big, or pairs that are none.
    """
    small, big = (np.atleast_1d(np.asarray(s, float)) for s in (square_small, square_big))
    if not 0 < batch_small < batch_big:
        raise BadInput("batch_small, batch_big", [batch_small, batch_big], "must be above 0, the small one first")
    if small.shape != big.shape or small.ndim != 1 or not len(small):
        raise BadInput("square_small, square_big", [small.shape, big.shape], "must be pairs: two lists of one length")
    if not (np.isfinite(small) & np.isfinite(big) & (small >= 0) & (big >= 0)).all():
        raise BadInput("square_small, square_big", "not all", "must be finite squared norms")
    square = (batch_big * big - batch_small * small) / (batch_big - batch_small)
    trace = (small - big) / (1 / batch_small - 1 / batch_big)
    lower = upper = np.nan
    n = len(square)
    if bootstrap and n > 1:
        rng = np.random.default_rng(seed)
        parts = [rng.integers(n, size=(min(100, bootstrap - i), n)) for i in range(0, bootstrap, 100)]
        top, bottom = (np.concatenate([v[part].mean(1) for part in parts]) for v in (trace, square))
        # A draw whose |G|^2 is not positive is compatible with any noise, however large.
        draws = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.inf)
        lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    sound = square.mean() > 0 and trace.mean() > 0
    estimate = float(trace.mean() / square.mean()) if sound else np.nan
    return NoiseScale(estimate, float(lower), float(upper), float(square.mean()), float(trace.mean()), n)


# ------------------------------------------------------------------------------------------------ learning rate

POWERS = {"linear": 1.0, "sqrt": 0.5}


def scaled_lr(
    lr: ArrayLike, batch: ArrayLike, new_batch: ArrayLike, rule: str = "sqrt", critical: float | None = None
) -> Any:
    """The learning rate at another batch: eta (B_new / B)^p, no further than the critical batch.

    rule: "linear" (p = 1) for SGD, "sqrt" (p = 1/2) for Adam and its kin: Malladi et al. 2022 (arXiv 2205.10287) from
    the limiting stochastic differential equations, Granziol et al. 2022 (arXiv 2006.09092) from the largest eigenvalue
    of a mini-batch Hessian. Both hold while the gradient's noise dominates; from about the `critical` batch on a larger
    one no longer bears a larger rate, so batches count as at most that. None: no cap.
    """
    if rule not in POWERS:
        raise BadInput("rule", rule, f"must be one of {', '.join(POWERS)}")
    eta, old, new = _positive("lr", lr), _positive("batch", batch), _positive("new_batch", new_batch)
    if critical is not None:
        crit = _positive("critical", critical)
        old, new = np.minimum(old, crit), np.minimum(new, crit)
    return eta * (new / old) ** POWERS[rule]


def best_sgd_lr(lr_max: ArrayLike, batch: ArrayLike, noise: ArrayLike) -> Any:
    """eta(B) = eta_max / (1 + B_noise / B): SGD's best step at batch B, linear below the noise scale and flat above it
    (McCandlish et al. 2018). The decrease of the loss per step follows the same curve."""
    eta, B, scale = _positive("lr_max", lr_max), _positive("batch", batch), _positive("noise", noise)
    return eta / (1 + scale / B)


def _positive(name: str, value: ArrayLike) -> Any:
    array = np.asarray(value, float)
    if not (np.isfinite(array) & (array > 0)).all():
        raise BadInput(name, value, "must be finite and above 0")
    return array[()]
