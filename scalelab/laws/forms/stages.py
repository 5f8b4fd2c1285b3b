"""Farseer's differential piecewise estimate (Li et al. 2025, arXiv 2506.10972): stage by stage, no joint fit.

A floor and a power of D cannot be told apart in one curve of noisy losses; in the differences between neighbouring
token counts the floor is gone.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput

EXPONENTS = np.linspace(-1, 1, 201)  # tried for each curve
ROUNDS = 2  # of the alternation between the exponent's and the coefficient's curve
PAIRS = 3  # neighbouring token counts that a size needs


def differential(
    N: Float[np.ndarray, " n"], D: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " 9"]:
    """Slope, exponent and value at the mean size of each curve: ln of D's exponent, ln of its coefficient, ln floor.

    1. Per size, R(D) = L(D) - L(ratio D); a line through ln R against ln D gives the exponent A of D and the
       coefficient B = R's coefficient / (1 - ratio^-A). Differences that noise made negative are left out.
    2. ln A and ln B as bent curves of ln N: the bends are chosen in turn for the least squared error of all R.
    3. The floor is what A and B leave of each size's losses, on average; its bend is chosen for ln floor.

    Raises `BadInput` where the runs are no grid in D, or under four sizes have enough of it.
    """
    log_d = np.log(D)
    x, y, difference = [], [], []  # ln N, ln D and L(D) - L(ratio D) of each pair of neighbours
    gaps, pairs = [], []
    for size in np.unique(N):
        at = np.flatnonzero(size == N)
        at = at[np.argsort(log_d[at], kind="stable")]
        pairs.append(np.stack([at[:-1], at[1:]]))
        gaps.append(np.diff(log_d[at]))
    step = float(np.median(np.concatenate(gaps)))
    levels: list[list[float]] = []  # ln N, ln A, ln B
    for (first, second), gap in zip(pairs, gaps, strict=True):
        drop = loss[first] - loss[second]
        good = (np.abs(gap - step) < 0.1 * abs(step)) & (drop > 0)
        if good.sum() < PAIRS or not step > 0:
            continue
        at, drop = first[good], drop[good]
        slope, intercept = np.polyfit(log_d[at], np.log(drop), 1)
        if slope < 0:
            levels.append([float(np.log(N[at[0]])), np.log(-slope), intercept - np.log(-np.expm1(slope * step))])
            x.append(np.log(N[at]))
            y.append(log_d[at])
            difference.append(drop)
    if len(levels) < 4:
        raise BadInput(
            "table", f"{len(levels)} sizes with a grid of tokens",
            f"needs four sizes or more, each at {PAIRS + 1} or more token counts in one constant ratio",
        )  # fmt: skip
    centre = float(np.log(N).mean())
    log_n, log_a, log_b = (np.array(v) for v in zip(*levels, strict=True))
    sizes, tokens, drops = np.concatenate(x) - centre, np.concatenate(y), np.concatenate(difference)
    log_n = log_n - centre

    exponents = [curve(log_n, log_a, q) for q in EXPONENTS]
    coefficients = [curve(log_n, log_b, q) for q in EXPONENTS]

    def error(of_a: np.ndarray, of_b: np.ndarray) -> float:
        A = np.exp(value(of_a, sizes))
        return float(np.sum((np.exp(value(of_b, sizes) - A * tokens) * -np.expm1(-A * step) - drops) ** 2))

    best_a = exponents[int(np.argmin([misfit(c, log_n, log_a) for c in exponents]))]
    best_b = coefficients[int(np.argmin([misfit(c, log_n, log_b) for c in coefficients]))]
    for _ in range(ROUNDS):
        best_a = min(exponents, key=lambda c: error(c, best_b))
        best_b = min(coefficients, key=lambda c: error(best_a, c))

    at = np.log(N) - centre
    rest = loss - np.exp(value(best_b, at) - np.exp(value(best_a, at)) * log_d)
    unique, group = np.unique(at, return_inverse=True)
    floor = np.bincount(group, rest) / np.bincount(group)
    if not (floor > 0).all():
        raise BadInput("table", f"floor {floor.min():.3g}", "the differences leave no positive floor; use fit")
    curves = [curve(unique, np.log(floor), q) for q in EXPONENTS]
    best_e = curves[int(np.argmin([misfit(c, unique, np.log(floor)) for c in curves]))]
    return np.concatenate([best_a, best_b, best_e])


def bend(x: np.ndarray, q: float) -> np.ndarray:
    """((N/N0)^q - 1) / q at x = ln N/N0; x at q = 0."""
    return np.expm1(q * x) / q if abs(q) > 1e-9 else x


def value(c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A curve (slope, exponent, value at the mean size) at x = ln N/N0."""
    return c[2] + c[0] * bend(x, c[1])


def curve(x: np.ndarray, y: np.ndarray, q: float) -> np.ndarray:
    """The least-squares curve of this exponent."""
    slope, level = np.polyfit(bend(x, q), y, 1)
    return np.array([slope, q, level])


def misfit(c: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum((value(c, x) - y) ** 2))
