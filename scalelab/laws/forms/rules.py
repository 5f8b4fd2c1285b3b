"""Published rules for learning rate, batch and weight decay, each a law that can be fitted to one's own optima.

`law.predict("who", table)` evaluates a rule with its published constants; `step_law` in `hyperparameters.py` fits the
Step Law from a grid of runs by its authors' procedure.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from scalelab.laws.forms.batch import _positive
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import free, positive

SLOPE = free(-1.5, 1.5)


class StepLawLr(Law):
    """lr = c N^a D^b: the best peak learning rate of N non-embedding parameters trained on D tokens (Li et al. 2025).

    For AdamW with a cosine to a fixed 1e-5 and the batch of `step-law-batch`. Objective: least squares on ln lr.
    """

    name = "step-law-lr"
    parameters = {"c": positive(1e-4, 1e3, linear=True), "a": SLOPE, "b": SLOPE}
    inputs = ("params_non_embedding", "tokens")
    target = "lr"
    objective = LOG_SQUARES
    equation = "lr = c N^a D^b"
    source = "Li et al. 2025 (arXiv 2503.04715)"
    published = {"Li 2025": {"c": 1.79, "a": -0.713, "b": 0.307}}

    def formula(self, p, x):
        return p.c * x.params_non_embedding**p.a * x.tokens**p.b


class StepLawBatch(Law):
    """batch = c D^b: the best batch (tokens) when training on D tokens (Li et al. 2025). Least squares on ln batch."""

    name = "step-law-batch"
    parameters = {"c": positive(1e-4, 1e6, linear=True), "b": SLOPE}
    inputs = ("tokens",)
    target = "batch_tokens"
    objective = LOG_SQUARES
    equation = "batch = c D^b"
    source = "Li et al. 2025 (arXiv 2503.04715)"
    published = {"Li 2025": {"c": 0.58, "b": 0.571}}

    def formula(self, p, x):
        return p.c * x.tokens**p.b


class DeepSeekLr(Law):
    """lr = c C^a, C = M D training FLOPs with M the non-embedding FLOPs per token (DeepSeek 2024).

    The source fits near-optimal runs (within 0.25 % of the least loss). Objective: least squares on ln lr.
    """

    name = "deepseek-lr"
    parameters = {"c": positive(1e-6, 1e3, linear=True), "a": SLOPE}
    inputs = ("flops",)
    target = "lr"
    objective = LOG_SQUARES
    equation = "lr = c C^a"
    source = "DeepSeek-AI 2024 (arXiv 2401.02954)"
    published = {"DeepSeek 2024": {"c": 0.3118, "a": -0.1250}}

    def formula(self, p, x):
        return p.c * x.flops**p.a


class DeepSeekBatch(Law):
    """batch = c C^a in tokens, C as in `deepseek-lr` (DeepSeek 2024). Objective: least squares on ln batch."""

    name = "deepseek-batch"
    parameters = {"c": positive(1e-6, 1e3, linear=True), "a": SLOPE}
    inputs = ("flops",)
    target = "batch_tokens"
    objective = LOG_SQUARES
    equation = "batch = c C^a"
    source = "DeepSeek-AI 2024 (arXiv 2401.02954)"
    published = {"DeepSeek 2024": {"c": 0.2920, "a": 0.3271}}

    def formula(self, p, x):
        return p.c * x.flops**p.a


class AdamWTimescale(Law):
    """tau = c (D / N)^m: the best AdamW timescale, as a share of training (Bergsma et al. 2025, Power Lines).

    tau = B / (eta lambda D): batch B and training tokens D in tokens, peak learning rate eta, decoupled weight decay
    lambda: AdamW's weights average the updates of the last tau D tokens (`adamw_timescale`). The input column is
    `tokens_per_param`, D / N; the target column `timescale`. The source finds m about -0.527; the best weight decay
    follows from the law (`best_weight_decay`). Objective: least squares on ln tau.
    """

    name = "adamw-timescale"
    parameters = {"c": positive(1e-2, 1e2, linear=True), "m": SLOPE}
    inputs = ("tokens_per_param",)
    target = "timescale"
    objective = LOG_SQUARES
    equation = "tau = c (D / N)^m"
    source = "Bergsma et al. 2025 (arXiv 2505.13738)"

    def formula(self, p, x):
        return p.c * x.tokens_per_param**p.m


def step_law_lr(params_non_embedding: ArrayLike, tokens: ArrayLike) -> Any:
    """1.79 N^-0.713 D^0.307: the Step Law's published peak learning rate at N non-embedding parameters, D tokens."""
    p = StepLawLr.published["Li 2025"]
    N, D = _positive("params_non_embedding", params_non_embedding), _positive("tokens", tokens)
    return p["c"] * N ** p["a"] * D ** p["b"]


def step_law_batch(tokens: ArrayLike) -> Any:
    """0.58 D^0.571: the Step Law's published batch, in tokens."""
    p = StepLawBatch.published["Li 2025"]
    return p["c"] * _positive("tokens", tokens) ** p["b"]


def deepseek_lr(flops: ArrayLike) -> Any:
    """0.3118 C^-0.1250: DeepSeek's published learning rate; C = M D, M non-embedding FLOPs per token."""
    p = DeepSeekLr.published["DeepSeek 2024"]
    return p["c"] * _positive("flops", flops) ** p["a"]


def deepseek_batch(flops: ArrayLike) -> Any:
    """0.2920 C^0.3271: DeepSeek's published batch, in tokens; C as in `deepseek_lr`."""
    p = DeepSeekBatch.published["DeepSeek 2024"]
    return p["c"] * _positive("flops", flops) ** p["a"]


def adamw_timescale(batch_tokens: ArrayLike, lr: ArrayLike, weight_decay: ArrayLike, tokens: ArrayLike) -> Any:
    """tau = B / (eta lambda D): AdamW's averaging time as a share of training."""
    B, eta = _positive("batch_tokens", batch_tokens), _positive("lr", lr)
    return B / (eta * _positive("weight_decay", weight_decay) * _positive("tokens", tokens))


def best_weight_decay(batch_tokens: ArrayLike, lr: ArrayLike, tokens: ArrayLike, timescale: ArrayLike) -> Any:
    """lambda_opt = B / (eta D tau_opt): the weight decay that gives the timescale tau_opt, as a fit predicts it."""
    B, eta = _positive("batch_tokens", batch_tokens), _positive("lr", lr)
    return B / (eta * _positive("tokens", tokens) * _positive("timescale", timescale))
