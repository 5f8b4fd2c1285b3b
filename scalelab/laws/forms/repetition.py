"""Repeated data: what tokens are worth when they are seen again, from one pool or from several."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.law import Law
from scalelab.laws.objective import SQUARES
from scalelab.laws.parameter import free, negative, positive
from scalelab.laws.powersum import EXPONENTS
from scalelab.laws.regression import StartsBy

EPOCHS = 4096  # the most that `UtilityDecay` adds up
AT_ONCE = 16  # of these, for all rows and parameter vectors in memory together


def worth(seen: Any, unique: Any, R_star: Any) -> Any:
    """What `seen` tokens drawn from `unique` ones are worth in fresh ones: U + U R* (1 - exp(-R / R*)), R = seen/U - 1.

    Equal to `seen` up to one epoch; never above U (1 + R*).
    """
    repeats = np.maximum(seen / unique - 1.0, 0.0)
    first = np.minimum(seen, unique)
    return first - first * R_star * np.expm1(-repeats / R_star)


class DataConstrained(Law):
    """L = E + A / N'^alpha + B / D'^beta (Muennighoff et al. 2023, arXiv 2305.16264).

    N: parameters (count), D: training tokens seen (count), U: unique tokens among them (count; where a table has more
    than D, D counts), L: held-out cross-entropy (nats per token).

        D' = U + U R_D (1 - exp(-(D/U - 1) / R_D))
        N' = U_N + U_N R_N (1 - exp(-(N/U_N - 1) / R_N)),  U_N = min(N, G (G U)^(beta/alpha))

    U_N: as many parameters as are compute-optimal for U tokens, G = (alpha A / (beta B))^(1/(alpha+beta)); what a model
    has beyond them it wears out as data are worn out by epochs. E, A, B, alpha, beta: the law of single-epoch runs. R_D
    and R_N (R_D*, R_N* in the source): how many repeats, and how much excess size, are worth anything much; both are
    weakly identified and depend on which runs are dropped as outliers.

    The source fits in two stages, the base law first, to other runs of one epoch near their compute-optimal size:

        base = laws.fit("chinchilla", base_runs, tied={"beta": "alpha"})
        laws.fit("data-constrained", runs, fixed=dict(base.params))

    whose intervals hold for that base. Single-epoch runs with N above U_N are no such runs: to this law their
    parameters are worn out already. Without `fixed` all seven are fitted at once. The source drops runs whose loss
    rises with more epochs or parameters: the law cannot rise.

    Objective: Huber, delta = 1e-3, on log losses.
    """

    name = "data-constrained"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5),
        "B": positive(1, 1e5),
        "alpha": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
        "beta": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
        "R_D": positive(1, 100),
        "R_N": positive(1, 100),
    }
    inputs = ("params", "tokens", "unique_tokens")
    equation = "L = E + A / N'^alpha + B / D'^beta, D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), N' likewise"
    source = "Muennighoff et al. 2023 (arXiv 2305.16264)"
    published = {
        "Muennighoff 2023, C4": {
            "E": float(np.exp(0.6254804)), "A": float(np.exp(6.255414)), "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743,
        },
    }  # fmt: skip

    def formula(self, p, x):
        log_G = (np.log(p.alpha) + np.log(p.A) - np.log(p.beta) - np.log(p.B)) / (p.alpha + p.beta)
        N, D = _effective(p, x, log_G)
        return p.E + p.A * N**-p.alpha + p.B * D**-p.beta

    def problem(self, columns, on):
        return StartsBy(self, columns, on, _ByBalance(), _from_balance)


def _effective(p: Any, x: Any, log_G: Any) -> tuple[Any, Any]:
    """N' and D'."""
    unique = np.minimum(x.unique_tokens, x.tokens)
    fitting = np.exp(log_G + p.beta / p.alpha * (log_G + np.log(unique)))
    return worth(x.params, fitting, p.R_N), worth(x.tokens, unique, p.R_D)


class _ByBalance(Law):
    """The same law with ln G in place of B, in which E and A are linear: where starts are sought."""

    name = "data-constrained, by balance"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5, linear=True),
        "log_G": free(-4, 3),
        "alpha": free(0.05, 1.0),
        "beta": free(0.05, 1.0),
        "R_D": positive(1, 100),
        "R_N": positive(1, 100),
    }
    inputs = DataConstrained.inputs

    def formula(self, p, x):
        N, D = _effective(p, x, p.log_G)
        return p.E + p.A * (N**-p.alpha + p.alpha / p.beta * np.exp(-(p.alpha + p.beta) * p.log_G) * D**-p.beta)


def _from_balance(params: Float[np.ndarray, "S 7"]) -> Float[np.ndarray, "S 7"]:
    """Parameters of `_ByBalance` -> of `DataConstrained`."""
    E, A, log_G, alpha, beta, R_D, R_N = params.T
    B = alpha / beta * A * np.exp(-(alpha + beta) * log_G)
    return np.stack([E, A, B, alpha, beta, R_D, R_N], axis=1)


class _Pooled(Law):
    """A law of several pools of data, named when it is made."""

    def __init__(self, *pools: str):
        pools = pools or ("1", "2")
        if len(set(pools)) < len(pools):
            raise BadInput("pools", pools, "must have different names")
        self.pools = self.arguments = pools

    def names(self, what: str) -> tuple[str, ...]:
        """A role or parameter per pool."""
        return tuple(f"{what}_{pool}" for pool in self.pools)


class RepeatedPools(_Pooled):
    """L = E + A / N^alpha + B / D'^beta, D' = sum_k q_k U_k (1 + R_k (1 - exp(-(D_k / U_k - 1) / R_k))).

        laws.RepeatedPools("web", "books").fit(table)

    N: parameters (count); for each pool k, columns tokens_k and unique_tokens_k: D_k, the tokens seen of it (0 is
    allowed) and U_k, its unique tokens; L: held-out cross-entropy (nats per token). q_k: what a fresh token of pool k
    is worth in fresh tokens of the first pool (whose own q is 1); R_k: how many repeats of it are worth anything much.
    For one R of all pools tie them: `tied={"R_books": "R_web"}`.

    What repeats of one pool are worth is Muennighoff et al.'s D' (arXiv 2305.16264). Adding it up over pools, with a
    weight each, is scalelab's own generalisation, as is leaving out their term for excess parameters. `UtilityDecay` is
    the published law of mixed pools.

    Objective: Huber, delta = 1e-3, on log losses.
    """

    name = "repeated-pools"
    source = "scalelab, after Muennighoff et al. 2023 (arXiv 2305.16264)"

    def __init__(self, *pools: str):
        super().__init__(*pools)
        self.parameters = (
            {
                "E": positive(1e-2, 10, linear=True),
                "A": positive(1, 1e5, linear=True),
                "B": positive(1, 1e5, linear=True),
                "alpha": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
                "beta": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
            }
            | {name: positive(0.05, 20) for name in self.names("q")[1:]}
            | {name: positive(1, 100) for name in self.names("R")}
        )
        self.inputs = ("params", *self.names("tokens"), *self.names("unique_tokens"))
        self.may_be_zero = self.names("tokens")
        self.equation = (
            "L = E + A / N^alpha + B / D'^beta, "
            "D' = sum_k q_k U_k (1 + R_k (1 - exp(-(D_k/U_k - 1) / R_k))) over "
            + ", ".join(self.pools)
            + f" (q_{self.pools[0]} = 1)"
        )

    def formula(self, p, x):
        D: Any = 0.0
        for i, (pool, seen, unique) in enumerate(
            zip(self.pools, self.names("tokens"), self.names("unique_tokens"), strict=True)
        ):
            quality = getattr(p, f"q_{pool}") if i else 1.0
            D = D + quality * worth(getattr(x, seen), getattr(x, unique), getattr(p, f"R_{pool}"))
        return p.E + p.A * x.params**-p.alpha + p.B * D**-p.beta


class UtilityDecay(_Pooled):
    """y(n) = d + (a n_1)^(b_0) prod_(j=1,2,...) (n_(j+1) / n_j)^(b_j): error after n samples of pools whose utility
    halves with repetition (Goyal et al. 2024, arXiv 2404.07177).

        laws.UtilityDecay("best", "rest").fit(table, columns={"tokens": "samples_seen", "error": "error"})

    n: samples (or tokens) seen (column tokens), drawn evenly from the union of the pools, whose sizes are in columns
    unique_tokens_k (0: the pool is not in this mixture); U: their sum; n_j = min(j U, n): seen after j epochs; y:
    error or loss (column error). d: its floor; a: 1/a is the number of samples of one unit; -b_k: utility of fresh
    samples of pool k; tau_k: epochs over which it halves. A mixture's utility in its j-th repeat is

        b_j = sum_k (U_k / U) b_k 2^(-j / (tau_k U / U_k))

    as in the source for pools of one size; the weights U_k / U are scalelab's extension to unequal ones. The authors'
    code multiplies d by the product too; here, as in their equation, it stays outside. Up to 4,096 epochs.

    Objective: unweighted least squares on the error, as in the source (which scans a grid).
    """

    name = "utility-decay"
    target = "error"
    objective = SQUARES
    source = "Goyal et al. 2024 (arXiv 2404.07177)"

    def __init__(self, *pools: str):
        super().__init__(*pools)
        self.parameters = (
            {"d": positive(1e-3, 10, linear=True), "a": positive(1e-10, 1e-2)}
            | {name: negative(-1.0, -0.01) for name in self.names("b")}
            | {name: positive(0.3, 30) for name in self.names("tau")}
        )
        self.inputs = ("tokens", *self.names("unique_tokens"))
        self.may_be_zero = self.names("unique_tokens")
        self.scale = ("tokens",)
        self.equation = (
            "y = d + (a n_1)^(b_0) prod_j (n_(j+1) / n_j)^(b_j), b_j = sum_k (U_k/U) b_k 2^(-j U_k / (tau_k U)) over "
            + ", ".join(self.pools)
        )

    def columns_of(self, columns):
        seen, pools = columns["tokens"], np.stack([columns[name] for name in self.names("unique_tokens")])
        total = pools.sum(0)
        if not ((pools >= 0).all() and (total > 0).all()):
            raise BadInput("unique_tokens", "none", "each row needs at least one pool above 0, and none below")
        most = float((seen / total).max())
        if most > EPOCHS:
            raise BadInput("tokens", float(seen[np.argmax(seen / total)]), f"are {most:.3g} epochs; up to {EPOCHS}")
        epochs = np.arange(1, max(2, int(np.ceil(most))))
        after = np.minimum(total[:, None] * (epochs + 1), seen[:, None])
        before = np.minimum(total[:, None] * epochs, seen[:, None])
        return {
            "log_first": np.log(np.minimum(total, seen)),
            "log_growth": np.log(after) - np.log(before),  # (rows, repeats); 0 beyond the last
            "repeat": epochs,
            "shares": pools / total,
        }

    def formula(self, p, x):
        log_excess: Any = 0.0
        start = np.log(p.a) + x.log_first
        for pool, share in zip(self.pools, x.shares, strict=True):
            b, tau = getattr(p, f"b_{pool}"), getattr(p, f"tau_{pool}")
            later: Any = 0.0
            for first in range(0, len(x.repeat), AT_ONCE):
                part = slice(first, first + AT_ONCE)
                halvings = share[:, None] * x.repeat[part] / tau[..., None]
                later = later + np.sum(np.exp(-np.log(2.0) * halvings) * x.log_growth[:, part], axis=-1)
            log_excess = log_excess + b * share * (start + later)
        return p.d + np.exp(log_excess)
