"""Laws of inference: repeated sampling, search at test time, drafted decoding, reinforcement learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES, SQUARES
from scalelab.laws.parameter import free, negative, positive
from scalelab.laws.regression import FormRegression, Regression


class Coverage(Law):
    """c(k) = exp(a k^b), a < 0, b < 0 (Brown et al. 2024, arXiv 2407.21787).

    c: coverage, the share of problems that at least one of k independent attempts solves (0 to 1); k: attempts.
    exp(a): coverage of one attempt; b: exponent of -ln c, which is a power law in k. By its form c lies between 0 and
    1 and tends to 1: a benchmark with unsolvable problems breaks it.

    Estimate coverage with `pass_at_k`, never as the share solved by the first k of n attempts. Coverages at several k
    come from the same problems: `coverage_table` gives a row per problem and k, with problems as clusters, so that
    the bootstrap draws problems whole; the curve fitted is that of their mean. `beta_tail` estimates b from the
    distribution of single-attempt success instead, from far fewer attempts.

    Objective: least squares on coverage, which a coverage of 0 does not break (the text at hand does not name the
    source's).
    """

    name = "coverage"
    target = "coverage"
    parameters = {"a": negative(-20, -0.01), "b": negative(-2, -0.01)}
    inputs = ("attempts",)
    may_be_zero = ("coverage",)
    ranges = {"attempts": (1.0, np.inf), "coverage": (0.0, 1.0)}
    equation = "c(k) = exp(a k^b)"
    source = "Brown et al. 2024 (arXiv 2407.21787)"
    objective = SQUARES

    def formula(self, p, x):
        return np.exp(p.a * x.attempts**p.b)


class TrainTestCompute(Law):
    """log10 T = a log10 C + b Elo + d (Jones 2021, arXiv 2104.03113).

    T: compute of tree search at test time that plays at a given Elo after training on C FLOPs; a: below 0, what ten
    times the training saves in decades of search; b: what strength costs. Elo is relative and may be negative.

    Objective: least squares on log T: one linear system.
    """

    name = "train-test-compute"
    target = "test_flops"
    parameters = {"a": free(-4, 1), "b": free(-0.02, 0.02), "d": free(-30, 60)}
    inputs = ("flops", "elo")
    may_be_zero = ("elo",)
    equation = "log10 T = a log10 C + b Elo + d"
    source = "Jones 2021 (arXiv 2104.03113)"
    objective = LOG_SQUARES
    published = {"Jones 2021, 9x9 Hex": {"a": -1.2, "b": 0.004, "d": 29.0}}

    def formula(self, p, x):
        return np.exp(np.log(10.0) * (p.a * np.log10(x.flops) + p.b * x.elo + p.d))


class Speculative(Law):
    """l(D, N, B) = l0 + t ln D + s ln N + q ln B (Yan et al. 2025, arXiv 2505.07858, theorems 1.1 to 1.3).

    l: mean accepted length (`accepted`), tokens per verification by the target model; D: the draft model's pre-training
    tokens; N: its parameters; B: decoding batch size (`decode_batch`). The source states the three separately, each
    with the others held: `Speculative(("tokens",))` takes what a table varies and nothing else. Where several vary,
    that they add is this law's assumption.

    Objective: least squares on l: one linear system.
    """

    name = "speculative"
    target = "accepted"
    slopes = {"tokens": "t", "params": "s", "decode_batch": "q"}
    equation = "l(D, N, B) = l0 + t ln D + s ln N + q ln B"
    source = "Yan et al. 2025 (arXiv 2505.07858)"
    objective = SQUARES

    def __init__(self, varied: Sequence[str] = ("tokens", "params", "decode_batch")):
        if not varied or not set(varied) <= set(self.slopes):
            raise BadInput("varied", varied, f"must be some of {', '.join(self.slopes)}")
        self.inputs = tuple(role for role in self.slopes if role in varied)
        names = ["l0", *(self.slopes[role] for role in self.inputs)]
        self.parameters = {n: free(-20, 20, linear=True) if n == "l0" else free(-2, 2, linear=True) for n in names}
        self.arguments = {"varied": list(self.inputs)}

    @property
    def allocates(self) -> bool:
        """False: the more tokens are accepted the better, and more of everything helps."""
        return False

    def formula(self, p, x):
        return p.l0 + sum(getattr(p, self.slopes[role]) * np.log(getattr(x, role)) for role in self.inputs)


class RLCompute(Law):
    """R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B) (Khatri et al. 2025, arXiv 2510.13786).

    R: mean reward, a pass rate (0 to 1); C: compute of reinforcement learning, in any unit; R0: R before training; A:
    what R tends to; C_mid: compute at which half the gain is made; B: steepness. R stays between R0 and A, both within
    0 and 1. A is known only where the curve has visibly bent: see its interval. Hold R0 where it was measured.

    Objective: least squares on R (the text at hand does not name the source's).
    """

    name = "rl-compute"
    target = "reward"
    parameters = {
        "R0": free(0, 0.6, lower=0.0, upper=1.0, linear=True),
        "A": free(0.2, 1.0, lower=0.0, upper=1.0, linear=True),
        "C_mid": positive(1, 1e25),
        "B": positive(0.3, 5),
    }
    inputs = ("flops",)
    may_be_zero = ("reward",)
    ranges = {"reward": (0.0, 1.0)}
    equation = "R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)"
    source = "Khatri et al. 2025 (arXiv 2510.13786)"
    objective = SQUARES

    def formula(self, p, x):
        gained = np.exp(-np.logaddexp(0.0, p.B * (np.log(p.C_mid) - np.log(x.flops))))
        return p.R0 + (p.A - p.R0) * gained

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        problem = FormRegression(self, columns, on)
        at = list(self.parameters).index("C_mid")  # sought among the data and a decade on either side: C has any unit
        low, high = columns["flops"].min() / 10, columns["flops"].max() * 10
        problem.specs[at] = dataclasses.replace(problem.specs[at], low=low, high=high)
        return problem


def tokens_per_verification(
    rate: float | Float[np.ndarray, "*s"], draft: float | Float[np.ndarray, "*s"]
) -> float | Float[np.ndarray, "*s"]:
    """Expected tokens per verification, (1 - r^(g+1)) / (1 - r), of `draft` = g drafted tokens, each accepted with
    probability `rate` = r given those before it (Leviathan et al. 2023, arXiv 2211.17192): from 1 to g + 1.

    Raises `BadInput` for rates outside 0 to 1 and drafts below 0. Arguments broadcast.
    """
    r, g = np.asarray(rate, float), np.asarray(draft, float)
    if not ((r >= 0) & (r <= 1)).all():
        raise BadInput("rate", rate, "must lie from 0 to 1")
    if not ((g >= 0) & np.isfinite(g)).all():
        raise BadInput("draft", draft, "must be a number of tokens, 0 or more")
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.log(r)
        return np.where(r == 1, g + 1, np.expm1((g + 1) * each) / np.expm1(each))[()]


def speculative_speedup(
    rate: float | Float[np.ndarray, "*s"], draft: float | Float[np.ndarray, "*s"], cost: float | Float[np.ndarray, "*s"]
) -> float | Float[np.ndarray, "*s"]:
    """Speed of drafted over plain decoding, tokens per verification / (1 + g c), `cost` = c being the time of one draft
    step over that of one target step; verifying g + 1 tokens costs as much as decoding one (memory-bound decoding).

    Raises `BadInput` for a cost below 0, and as `tokens_per_verification`.
    """
    c = np.asarray(cost, float)
    if not ((c >= 0) & np.isfinite(c)).all():
        raise BadInput("cost", cost, "must be 0 or more")
    return tokens_per_verification(rate, draft) / (1 + np.asarray(draft, float) * c)
