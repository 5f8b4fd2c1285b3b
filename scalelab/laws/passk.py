"""From counts of solved attempts: coverage without bias, tables of it, and its law from the distribution of success."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws.notices import Notice
from scalelab.laws.objective import SQUARES
from scalelab.laws.regression import Problem
from scalelab.laws.result import Result, provenance
from scalelab.laws.solver import minimise

Counts = int | Sequence[int] | Int[np.ndarray, "*s"]

BOX = (-14.0, 14.0)  # of the logarithms of alpha and beta
STARTS = np.log([[0.3, 3.0], [1.0, 1.0], [0.1, 0.3], [3.0, 30.0]])
ELEMENTS = 1 << 22  # draws x terms of the likelihood in memory at once
MOST_ZEROS = 3.0  # standard deviations by which the problems never solved may exceed the law's


def pass_at_k(samples: Counts, correct: Counts, k: Counts) -> Any:
    """Coverage of k attempts at a problem, 1 - C(n - c, k) / C(n, k), from c correct ones (`correct`) of n (`samples`).

    The unbiased estimate (Chen et al. 2021, arXiv 2107.03374) of 1 - (1 - p)^k; mean over problems: coverage. Computed
    as a product of min(c, k) factors, 1 - prod_j (1 - max(c, k) / (n - j)), by its logarithm. Arguments broadcast;
    what comes back has their shape.

    Raises `BadInput` unless 0 <= c <= n and 1 <= k <= n: no estimate without bias exists beyond the attempts made.
    """
    n, c = _counts(samples, correct)
    k = _whole("k", k)
    if (k < 1).any() or (k > n).any():
        raise BadInput("k", np.max(k).item(), f"must lie from 1 to the number of samples, {int(np.min(n))}")
    shape = np.broadcast_shapes(n.shape, c.shape, k.shape)
    n, c, k = (np.broadcast_to(a, shape).reshape(-1) for a in (n, c, k))
    fewer, more = np.minimum(c, k), np.maximum(c, k)
    log = np.where(n - c < k, -np.inf, 0.0)  # k attempts cannot all be among the wrong ones
    left = np.flatnonzero((log == 0) & (fewer > 0))
    for j in range(int(fewer[left].max(initial=0))):
        left = left[fewer[left] > j]
        log[left] += np.log1p(-more[left] / (n[left] - j))
    return -np.expm1(log).reshape(shape)[()]


def coverage_table(samples: Counts, correct: Counts, k: Sequence[int] | None = None) -> pd.DataFrame:
    """A row for each problem and each k, to fit the law `coverage` to: attempts (k), coverage (`pass_at_k`), run, seed.

    `run` and `seed` number the problems: the first makes them clusters of the bootstrap, the second says that two
    problems with equal counts are two. k: powers of two up to the fewest samples of any problem, if not given.
    """
    n, c = (a.reshape(-1) for a in np.broadcast_arrays(*_counts(samples, correct)))
    ks = 2 ** np.arange(int(np.log2(n.min())) + 1) if k is None else np.atleast_1d(_whole("k", k))
    problem = np.repeat(np.arange(len(n)), len(ks))
    value = pass_at_k(n[:, None], c[:, None], ks[None, :])
    return pd.DataFrame(
        {"attempts": np.tile(ks, len(n)), "coverage": np.clip(value, 0, 1).reshape(-1), "run": problem, "seed": problem}
    )


def beta_tail(samples: Counts, correct: Counts, *, bootstrap: int = 1000, seed: int = 0) -> BetaTail:
    """The coverage law's a and b from the left tail of the distribution of single-attempt success.

    Where the density of success p over problems is f p^(alpha - 1) near p = 0, failures of k attempts, the mean of
    (1 - p)^k, fall as f Gamma(alpha) k^-alpha (Schaeffer et al. 2025, arXiv 2502.17578): in c(k) = exp(a k^b), b =
    -alpha and a = -f Gamma(alpha) for large k. Here p is Beta(alpha, beta) distributed, so that the number of correct
    attempts is beta-binomial; both are fitted by maximum likelihood, one pair (samples, correct) per problem. All
    counts bear on b, not only the failures of many attempts: it needs orders of magnitude fewer attempts than a curve.

    bootstrap: draws of whole problems, for intervals. Raises `BadInput` for impossible counts, fewer than 4 problems,
    or where no problem, or every one, was ever solved.
    """
    n, c = (a.reshape(-1) for a in np.broadcast_arrays(*_counts(samples, correct)))
    if len(n) < 4:
        raise BadInput("samples", f"{len(n)} problems", "must be at least 4")
    if not c.any() or (c == n).all():
        raise BadInput("correct", f"{c.sum()} of {n.sum()}", "some attempts must succeed and some fail")
    pairs, number = np.unique(np.stack([n, c], axis=1), axis=0, return_counts=True)
    problem = BetaBinomial(pairs)
    found = minimise(problem, STARTS, problem.terms(number[None]), SQUARES)
    best = int(np.argmin(found.value))
    theta, converged = found.theta[best], bool(found.converged[best])
    rng = np.random.default_rng(seed)
    samples_of = np.full((bootstrap, 4), np.nan)
    size = max(1, ELEMENTS // problem.rows)
    for start in range(0, bootstrap, size):
        part = slice(start, min(start + size, bootstrap))
        drawn = rng.multinomial(len(n), number / len(n), size=part.stop - part.start)
        refit = minimise(problem, np.tile(theta, (len(drawn), 1)), problem.terms(drawn), SQUARES)
        samples_of[part] = np.where(refit.converged[:, None], _derived(refit.theta), np.nan)
    record = {
        "problems": len(n), "attempts": int(n.sum()), "solved": int((c > 0).sum()), "value": float(found.value[best]),
        "converged": converged, "draws": bootstrap, "seed": seed, **provenance(),
    }  # fmt: skip
    estimate = _derived(theta[None])[0]
    return BetaTail(BetaTail.parameters, estimate, samples_of, list(_findings(theta, converged, n, c)), record)


class BetaTail(Result):
    """alpha and beta of the distribution of single-attempt success, and with them a and b of c(k) = exp(a k^b)."""

    kind = "beta-tail"
    parameters = ("alpha", "beta", "a", "b")

    @classmethod
    def restore(cls, names, estimate, samples, notices, record, document) -> BetaTail:
        return cls(names, estimate, samples, notices, record)

    def coverage(self, k: Sequence[float] | Float[np.ndarray, " m"], level: float = 0.95) -> pd.DataFrame:
        """The law's own coverage at any k, 1 - B(alpha, beta + k) / B(alpha, beta), with its interval: between 0 and 1.

        Columns attempts, coverage, lower, upper. The power law is its limit for many attempts.
        """
        k = np.atleast_1d(np.asarray(k, float))
        if not (np.isfinite(k) & (k > 0)).all():
            raise BadInput("k", k.tolist(), "must be numbers of attempts above 0")

        def curve(params: np.ndarray) -> np.ndarray:
            return -np.expm1(_log_failure(params[:, [0]], params[:, [1]], k))

        lower, upper = self.interval(curve(self.samples), level)
        return pd.DataFrame({"attempts": k, "coverage": curve(self.estimate[None])[0], "lower": lower, "upper": upper})

    def summary(self, level: float = 0.95) -> str:
        r = self.record
        lines = [
            "p ~ Beta(alpha, beta); coverage ~ exp(a k^b) for many attempts k",
            f"{r['problems']} problems, {r['solved']} solved at least once, {r['attempts']} attempts; "
            f"{r['draws']} bootstrap draws of problems (seed {r['seed']})",
            "", *self.parameter_lines(level), "", *self.notice_lines(),
        ]  # fmt: skip
        return "\n".join(lines)


class BetaBinomial(Problem):
    """The negative log-likelihood of counts, in (ln alpha, ln beta).

    ln P = sum_(j<c) ln(alpha + j) + sum_(j<n-c) ln(beta + j) - sum_(j<n) ln(alpha + beta + j), up to a constant: summed
    over problems every j counts as often as there are problems with c (n - c, n) above j. These tallies are the
    solver's row weights.
    """

    def __init__(self, pairs: Int[np.ndarray, "m 2"]):
        n, c = pairs.T
        self.above = [(what[:, None] > np.arange(what.max())).astype(float) for what in (c, n - c, n)]
        self.ends = np.cumsum([a.shape[1] for a in self.above])
        self.rows, self.data = int(self.ends[-1]), np.ones(1)
        self.lower, self.upper = np.full(2, BOX[0]), np.full(2, BOX[1])

    def terms(self, number: Int[np.ndarray, "R m"]) -> Float[np.ndarray, "R rows"]:
        """Tallies from how often each pair of counts occurs."""
        return np.concatenate([number @ a for a in self.above], axis=1)

    def evaluate(self, theta, weights, objective, data=None):
        p = np.exp(theta)
        value, first, second = np.zeros((3, len(theta), 3))
        for i, (tally, x) in enumerate(
            zip(np.split(weights, self.ends[:2], axis=1), (p[:, 0], p[:, 1], p.sum(1)), strict=True)
        ):
            at = x[:, None] + np.arange(tally.shape[1])
            value[:, i] = (tally * np.log(at)).sum(1)
            first[:, i], second[:, i] = (tally / at).sum(1), -(tally / at**2).sum(1)
        slope = -(first[:, :2] - first[:, 2:])
        bend = np.zeros((len(theta), 2, 2)) + second[:, 2, None, None]
        bend[:, [0, 1], [0, 1]] -= second[:, :2]
        gradient = slope * p
        hessian = bend * p[:, :, None] * p[:, None, :]
        metric = np.maximum(np.abs(np.einsum("sii->si", hessian)), 1e-12)[:, :, None] * np.eye(2)
        hessian[:, [0, 1], [0, 1]] += gradient
        return value[:, 2] - value[:, 0] - value[:, 1], gradient, hessian, metric


def _derived(theta: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, "R 4"]:
    """alpha, beta, a, b."""
    alpha, beta = np.exp(theta).T
    with np.errstate(over="ignore"):  # a is infinite where one difficulty serves for all
        return np.stack([alpha, beta, -np.exp(_lgamma(alpha + beta) - _lgamma(beta)), -alpha], axis=1)


def _log_failure(alpha: Any, beta: Any, k: Any) -> np.ndarray:
    """ln of the mean of (1 - p)^k."""
    return _lgamma(alpha + beta) - _lgamma(beta) + _lgamma(beta + k) - _lgamma(alpha + beta + k)


def _lgamma(x: Any) -> np.ndarray:
    flat = [math.lgamma(v) if v == v else math.nan for v in np.ravel(x).tolist()]
    return np.reshape(flat, np.shape(x))


def _findings(theta: np.ndarray, converged: bool, n: np.ndarray, c: np.ndarray) -> Iterator[Notice]:
    if not converged or (theta <= BOX[0]).any() or (theta >= BOX[1]).any():
        yield Notice(
            "not-converged" if not converged else "at-bound",
            "error",
            f"alpha = {np.exp(theta[0]):.3g}, beta = {np.exp(theta[1]):.3g} do not settle.",
            "look at the counts: problems of one difficulty have no tail, and neither have all-or-nothing ones.",
            {"alpha": float(np.exp(theta[0])), "beta": float(np.exp(theta[1]))},
        )
        return
    if len(n) < 30:
        yield Notice(
            "too-few-rows", "warning", f"{len(n)} problems say little of a distribution's tail.", "use 30 or more.",
            {"problems": len(n)},
        )  # fmt: skip
    never = np.exp(_log_failure(np.exp(theta[0]), np.exp(theta[1]), n.astype(float)))
    expected, spread = float(never.sum()), float(np.sqrt((never * (1 - never)).sum()))
    observed = int((c == 0).sum())
    if observed > expected + MOST_ZEROS * max(spread, 1.0):
        yield Notice(
            "unsolvable-problems",
            "warning",
            f"{observed} problems were never solved, {expected:.1f} expected of this distribution: some may be beyond "
            "reach, and then coverage tends to less than 1.",
            "look at these problems; leave out with a reason those that cannot be solved.",
            {"observed": observed, "expected": expected, "spread": spread},
        )


def _counts(samples: Counts, correct: Counts) -> tuple[np.ndarray, np.ndarray]:
    n, c = _whole("samples", samples), _whole("correct", correct)
    if not n.size or (n < 1).any():
        raise BadInput("samples", np.min(n).item() if n.size else "none", "must be at least 1 attempt at each problem")
    if (c < 0).any() or (c > n).any():
        raise BadInput("correct", [int(np.min(c)), int(np.max(c))], "must lie from 0 to the number of samples")
    return n, c


def _whole(field: str, values: Counts) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or not (np.isfinite(array) & (array == np.floor(array))).all():
        raise BadInput(field, values, "must be whole numbers")
    return array.astype(np.int64)
