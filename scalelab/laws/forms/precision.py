"""Precision: what training in few bits costs, for integer-like (Kumar et al.) and floating-point (Sun et al.) types."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws import allocate
from scalelab.laws.law import Law
from scalelab.laws.parameter import free, positive

PARTS = ("weights", "activations", "kv")


class Precision(Law):
    """L = E + A / N_eff^alpha + B / D^beta, N_eff = N prod_x (1 - exp(-P_x / gamma_x)) (Kumar et al. 2024, 2411.04330).

    N: parameters (count), D: training tokens (count), P_x: bits of x while training, for x among weights, activations
    and the KV cache (columns bits_weights, bits_activations, bits_kv), L: cross-entropy (nats per token). E, A, B,
    alpha, beta: as in Chinchilla's law at full precision; gamma_x: the bits at which x keeps 63 % of the parameters.

        laws.Precision().fit(table)                    # all three vary
        laws.Precision("weights").fit(table)           # only the weights' bits vary, and only their column is needed

    Objective: Huber, delta = 1e-3, on log losses, as in Chinchilla's fit.
    """

    name = "precision"
    source = "Kumar et al. 2024 (arXiv 2411.04330)"

    def __init__(self, *parts: str):
        parts = parts or PARTS
        wrong = [x for x in parts if x not in PARTS]
        if wrong or len(set(parts)) < len(parts):
            raise BadInput("precision", parts, f"must be different ones of {', '.join(PARTS)}")
        self.parts = self.arguments = parts
        self.parameters = {
            "E": positive(1e-2, 10, linear=True),
            "A": positive(1, 1e5, linear=True),
            "B": positive(1, 1e5, linear=True),
            "alpha": free(0.05, 1.5, lower=1e-3, upper=4.0),
            "beta": free(0.05, 1.5, lower=1e-3, upper=4.0),
        } | {f"gamma_{x}": positive(0.1, 20) for x in parts}
        self.inputs = ("params", "tokens", *(f"bits_{x}" for x in parts))
        kept = " ".join(f"(1 - exp(-P_{x} / gamma_{x}))" for x in parts)
        self.equation = f"L = E + A / N_eff^alpha + B / D^beta, N_eff = N {kept}"

    def kept(self, p: Any, x: Any) -> Any:
        """N_eff / N at bits x.bits_weights, ...: an array, or a jet."""
        share: Any = 1.0
        for part in self.parts:
            share = share * -np.expm1(-getattr(x, f"bits_{part}") / getattr(p, f"gamma_{part}"))
        return share

    def formula(self, p, x):
        return p.E + p.A * (x.params * self.kept(p, x)) ** -p.alpha + p.B * x.tokens**-p.beta

    def optimum(self, params, flops, cost, **others):
        """As Chinchilla's, at given bits: optimal(C, bits_weights=8, ...). `cost` counts FLOPs, whatever their bits."""
        missing = [role for role in self.inputs[2:] if role not in others]
        if missing:
            raise BadInput("optimal", missing, f"{self.name} needs a value for each: optimal(C, {missing[0]}=8, ...)")
        p = types.SimpleNamespace(**{name: params[:, i] for i, name in enumerate(self.parameters)})
        x = types.SimpleNamespace(**others)
        chinchilla = params[:, :5].copy()
        chinchilla[:, 1] *= self.kept(p, x) ** -p.alpha
        return allocate.optimum(chinchilla, flops, cost)

    def exponents(self, params: Float[np.ndarray, "R P"]) -> Float[np.ndarray, "R 3"]:
        return allocate.exponents(params)

    def best_bits(self, p: Any) -> Float[np.ndarray, "R 1"]:
        """The bits, one number for all parts, at which a budget that pays for N D P buys the lowest loss.

        Multiplying N_eff by 1 % costs 1 % of compute through N and the inverse of d ln N_eff / d ln P through P: the
        optimum, whatever the budget, is where that elasticity is 1: sum_x (P / gamma_x) / (exp(P / gamma_x) - 1) = 1.
        NaN where it is below 1 already at P = 0, as with one part: then fewer bits always pay.
        `fit.derive(law.best_bits)` gives it with its interval.
        """
        gammas = np.stack([np.asarray(getattr(p, f"gamma_{x}"), float) for x in self.parts], axis=-1)
        low, high = np.zeros(gammas.shape[:-1]), 50.0 * gammas.max(-1)
        if len(self.parts) == 1:
            return np.full(gammas.shape[:-1], np.nan)
        for _ in range(60):  # the elasticity falls from the number of parts to 0: bisect
            middle = 0.5 * (low + high)
            ratio = np.maximum(middle[..., None] / gammas, 1e-12)
            above = (ratio / np.expm1(np.minimum(ratio, 700.0))).sum(-1) > 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return 0.5 * (low + high)


class PostTraining(Precision):
    """`Precision` plus the loss of quantising the trained weights to P_post bits (Kumar et al. 2024).

    L = Precision + C_T D^gamma_D / N^gamma_N exp(-P_post / gamma_post), P_post in column bits_post. The longer a model
    was trained, the more quantising it costs; from some D on, more tokens raise the loss. A run that was never
    quantised has its training bits (16, 32) here.
    """

    name = "precision-post-training"

    def __init__(self, *parts: str):
        super().__init__(*parts)
        self.parameters = {
            **self.parameters,
            "C_T": positive(1e-6, 1e3, linear=True),
            "gamma_D": free(0.05, 1.5, lower=-1.0, upper=4.0),
            "gamma_N": free(0.05, 1.5, lower=-1.0, upper=4.0),
            "gamma_post": positive(0.1, 10),
        }
        self.inputs = (*self.inputs, "bits_post")
        self.equation += " + C_T D^gamma_D / N^gamma_N exp(-P_post / gamma_post)"

    def formula(self, p, x):
        cost = p.C_T * np.exp(p.gamma_D * np.log(x.tokens) - p.gamma_N * np.log(x.params) - x.bits_post / p.gamma_post)
        return super().formula(p, x) + cost

    def optimum(self, params, flops, cost, **others):
        return Law.optimum(self, params, flops, cost, **others)

    def exponents(self, params):
        return None


class FloatPrecision(Law):
    """L(N, D, E, M, B) = n / N^alpha + d / D^beta + epsilon + D^beta / N^alpha log2(B) / (gamma (E + 0.5)^delta
    (M + 0.5)^nu) (Sun et al. 2025, arXiv 2501.02423).

    N: parameters (count), D: training tokens (count), E: exponent bits, M: mantissa bits (0 is allowed), B: values that
    share one scale factor (block size), L: cross-entropy (nats per token); columns params, tokens, exponent_bits,
    mantissa_bits, block_size. n, d, alpha, beta, epsilon: Chinchilla's terms; gamma, delta, nu: what precision the
    format keeps. The last term grows with D: beyond `critical_tokens` more data raise the loss.

    Objective: Huber, delta = 1e-3, on log losses.
    """

    name = "float-precision"
    parameters = {
        "n": positive(1, 1e5, linear=True),
        "alpha": free(0.05, 1.0, lower=1e-3, upper=4.0),
        "d": positive(1, 1e6, linear=True),
        "beta": free(0.05, 1.0, lower=1e-3, upper=4.0),
        "epsilon": positive(1e-2, 10, linear=True),
        "gamma": positive(10, 1e7),
        "delta": free(0.3, 6.0, lower=0.0, upper=20.0),
        "nu": free(0.3, 6.0, lower=0.0, upper=20.0),
    }
    inputs = ("params", "tokens", "exponent_bits", "mantissa_bits", "block_size")
    may_be_zero = ("exponent_bits", "mantissa_bits")
    equation = (
        "L = n / N^alpha + d / D^beta + epsilon + D^beta / N^alpha log2(B) / (gamma (E + 0.5)^delta (M + 0.5)^nu)"
    )
    source = "Sun et al. 2025 (arXiv 2501.02423)"
    published = {
        "Sun 2025": {
            "n": 69.2343, "alpha": 0.2368, "d": 68973.0621, "beta": 0.5162, "epsilon": 1.9061,
            "gamma": 11334.5197, "delta": 3.1926, "nu": 2.9543,
        },
    }  # fmt: skip

    def formula(self, p, x):
        log_N, log_D = np.log(x.params), np.log(x.tokens)
        lost = np.exp(p.beta * log_D - p.alpha * log_N) * np.log2(x.block_size) / _kept(p, x)
        return p.n * np.exp(-p.alpha * log_N) + p.d * np.exp(-p.beta * log_D) + p.epsilon + lost

    @staticmethod
    def critical_tokens(p: Any, params: float, exponent_bits: float, mantissa_bits: float, block_size: float) -> Any:
        """The tokens from which on more of them raise the loss:
        D_crit = [d gamma N^alpha (E + 0.5)^delta (M + 0.5)^nu / log2 B]^(1 / (2 beta)).

        p has the law's parameters: `fit.derive(lambda p: law.critical_tokens(p, 1e9, 2, 1, 128))` gives it with its
        interval.
        """
        if not block_size > 1:
            raise BadInput(
                "block_size", block_size, "must be above 1; with a scale per value there is no critical size"
            )
        kept = p.gamma * (exponent_bits + 0.5) ** p.delta * (mantissa_bits + 0.5) ** p.nu
        return (p.d * kept * params**p.alpha / np.log2(block_size)) ** (1 / (2 * p.beta))


def _kept(p: Any, x: Any) -> Any:
    """gamma (E + 0.5)^delta (M + 0.5)^nu."""
    return p.gamma * np.exp(p.delta * np.log(x.exponent_bits + 0.5) + p.nu * np.log(x.mantissa_bits + 0.5))
