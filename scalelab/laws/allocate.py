"""Compute-optimal allocation: the N and D that minimise a law's loss under a training budget C.

With C = k N D the Chinchilla surface has a closed form (Hoffmann et al. 2022, eq. 4). With any other cost the
first-order condition is solved numerically in ln N; where no interior minimum exists, none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.errors import BadInput

if TYPE_CHECKING:
    from scalelab.laws.law import Law

Cost = float | Callable[[np.ndarray], np.ndarray]

GRID = 256  # points of ln N among which minima are bracketed
STEPS = 25  # of the root finder; a smooth cost needs fewer than 10


def exponents(params: Float[np.ndarray, "R 5"]) -> Float[np.ndarray, "R 3"]:
    """a, b, gamma of N* ~ C^a, D* ~ C^b, L* - E ~ C^-gamma under C = k N D. Columns of params: E, A, B, alpha, beta."""
    alpha, beta = params[:, 3], params[:, 4]
    total = alpha + beta
    return np.stack([beta / total, alpha / total, alpha * beta / total], axis=1)


def optimum(
    params: Float[np.ndarray, "R 5"], flops: Float[np.ndarray, " m"], cost: Cost
) -> tuple[Float[np.ndarray, "R m"], Float[np.ndarray, "R m"], Float[np.ndarray, "R m"]]:
    """N*, D* and the loss there, for each parameter vector (E, A, B, alpha, beta) and each budget.

    `cost` is k in C = k N D, or a function from N to FLOPs per token. NaN where the loss has no interior minimum.
    """
    E, A, B, alpha, beta = (p[:, None] for p in params.T)
    if not callable(cost) and not float(cost) > 0:
        raise BadInput("flops_per_param_token", cost, "must be above 0, or a function of the parameter count")
    with np.errstate(all="ignore"):  # a law without an optimum sends N to 0 or infinity; these become NaN below
        if callable(cost):
            N = np.stack([_solve(params, budget, cost) for budget in flops], axis=1)
            D = flops / per_token(cost, N)
        else:
            ratio = (np.log(alpha * A) - np.log(beta * B)) / (alpha + beta)
            N = np.exp(ratio + beta / (alpha + beta) * np.log(flops / float(cost)))
            D = flops / (float(cost) * N)
        loss = E + A * N**-alpha + B * D**-beta
        sound = np.isfinite(N) & np.isfinite(D) & np.isfinite(loss) & (N > 1e-100) & (D > 1e-100)
    return np.where(sound, N, np.nan), np.where(sound, D, np.nan), np.where(sound, loss, np.nan)


def per_token(cost: Callable[[np.ndarray], np.ndarray], N: np.ndarray) -> np.ndarray:
    """FLOPs per token at N, checked where N is a number."""
    known = np.isfinite(N)
    out = np.full(N.shape, np.nan)
    values = np.asarray(cost(N[known]), dtype=np.float64)
    if values.shape != N[known].shape or not (np.isfinite(values) & (values > 0)).all():
        raise BadInput("flops_per_param_token", cost, "must map an array of N to as many positive FLOPs per token")
    out[known] = values
    return out


def _solve(params: np.ndarray, budget: float, cost: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """N* of one budget for every parameter vector: bracket on a grid of ln N, then find the zero of dL/dlnN."""
    E, A, B, alpha, beta = (p[:, None] for p in params.T)

    def slope(log_n: np.ndarray) -> np.ndarray:
        """Has the sign of dL/dlnN: the log of the data term's slope over the parameter term's."""
        step = 1e-4
        low, high = (np.log(per_token(cost, np.exp(log_n + s))) for s in (-step, step))
        rise = np.maximum((high - low) / (2 * step), 1e-300)
        with np.errstate(divide="ignore", invalid="ignore"):
            data = np.log(rise * beta * B) - beta * (np.log(budget) - 0.5 * (low + high))
            return data - np.log(alpha * A) + alpha * log_n

    grid = np.linspace(0.0, np.log(budget), GRID)[None]
    sign = slope(grid)
    turns = (sign[:, :-1] < 0) & (sign[:, 1:] >= 0)
    with np.errstate(over="ignore"):
        tokens = np.log(budget) - np.log(per_token(cost, np.exp(grid)))
        loss = E + A * np.exp(-alpha * grid) + B * np.exp(-beta * tokens)
    at = np.where(turns, loss[:, :-1], np.inf).argmin(1)[:, None]
    low, high = grid[0, at], grid[0, at + 1]
    below, above = np.take_along_axis(sign, at, 1), np.take_along_axis(sign, at + 1, 1)
    for _ in range(STEPS):  # regula falsi with Illinois's halving, which cannot stall at one end
        with np.errstate(invalid="ignore", divide="ignore"):
            middle = np.clip(high - above * (high - low) / (above - below), low, high)
        value = slope(middle)
        left = value < 0
        below, above = np.where(left, value, 0.5 * below), np.where(left, 0.5 * above, value)
        low, high = np.where(left, middle, low), np.where(left, high, middle)
    return np.where(turns.any(1), np.exp(middle)[:, 0], np.nan)


def flops_per_token(
    params: Float[np.ndarray, " n"], tokens: Float[np.ndarray, " n"], flops: Float[np.ndarray, " n"]
) -> Callable[[np.ndarray], np.ndarray]:
    """FLOPs per token as a function of N, from measured runs: ln f a cubic in ln N (lower for few sizes).

    A smooth curve and no interpolant, because the first-order condition takes its slope and neighbouring sizes of a
    sweep differ in shape. Beyond the measured sizes it goes on along its tangents.
    """
    log_n, where = np.unique(np.log(params), return_inverse=True)
    log_f = np.bincount(where, np.log(flops / tokens)) / np.bincount(where)
    centre, low, high = log_n.mean(), log_n[0], log_n[-1]
    degree = min(3, len(log_n) // 2) if high - low > 0.1 else 0
    curve = np.polynomial.Polynomial.fit(log_n - centre, log_f, degree, domain=[low - centre - 1, high - centre + 1])
    slope = curve.deriv() if degree else lambda x: np.ones_like(x)

    def cost(N: np.ndarray) -> np.ndarray:
        x = np.log(np.asarray(N, dtype=np.float64))
        inside = np.clip(x, low, high)
        return np.exp(curve(inside - centre) + slope(inside - centre) * (x - inside))

    return cost


def measured(columns: Mapping[str, Any], paid: str = "params") -> Cost:
    """`flops_per_token` of a table's columns by role, where every run has FLOPs, else 6 (C = 6 N D).

    paid: role of the parameters that compute is paid for.
    """
    known = [pd.to_numeric(columns[role], errors="coerce") for role in (paid, "tokens", "flops") if role in columns]
    N_D_C = [np.asarray(values, dtype=np.float64) for values in known]
    if len(N_D_C) < 3 or not len(N_D_C[0]) or not all((np.isfinite(v) & (v > 0)).all() for v in N_D_C):
        return 6.0
    return flops_per_token(*N_D_C)


def search(
    law: Law, params: Float[np.ndarray, "R P"], flops: Float[np.ndarray, " m"], cost: Cost, others: Mapping[str, float]
) -> tuple[Float[np.ndarray, "R m"], Float[np.ndarray, "R m"], Float[np.ndarray, "R m"]]:
    """N*, D* and the target there for any law in params and tokens: the lowest interior minimum along each budget.

    ln N is searched from 1,000 parameters to D = N, or as few tokens per parameter as `Law.fewest_tokens` says (a
    spurious minimum at D << N is a known trap of flexible surfaces), first on a grid, then by golden section. NaN where
    the lowest point is an end of that range.
    """
    if not callable(cost) and not float(cost) > 0:
        raise BadInput("flops_per_param_token", cost, "must be above 0, or a function of the parameter count")
    R = len(params)
    out = np.full((3, R, len(flops)), np.nan)

    def along(log_n: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
        """ln D and the target at (R, k) points of ln N."""
        N = np.exp(log_n)
        D = budget / (per_token(cost, N) if callable(cost) else float(cost) * N)
        flat = {law.paid: N.reshape(-1), "tokens": D.reshape(-1)}
        flat |= {role: np.full(N.size, float(value)) for role, value in others.items()}
        value = law.evaluate_each(np.repeat(params, N.shape[1], axis=0), flat).reshape(N.shape)
        return D, value

    golden = (np.sqrt(5) - 1) / 2
    for m, budget in enumerate(flops):
        middle = np.array([np.sqrt(budget)])
        per_param = per_token(cost, middle)[0] / middle[0] if callable(cost) else float(cost)
        top = 0.5 * np.log(budget / (per_param * law.fewest_tokens))
        grid = np.linspace(np.log(1e3), top, GRID)
        _, value = along(np.broadcast_to(grid, (R, GRID)), float(budget))
        value = np.where(np.isfinite(value), value, np.inf)
        inner = (value[:, 1:-1] < value[:, :-2]) & (value[:, 1:-1] <= value[:, 2:])
        at = np.where(inner, value[:, 1:-1], np.inf).argmin(1) + 1
        found = inner.any(1) & (value[np.arange(R), at] <= value[:, -1])
        low, high = grid[at - 1], grid[at + 1]
        for _ in range(40):
            left, right = high - golden * (high - low), low + golden * (high - low)
            _, pair = along(np.stack([left, right], axis=1), float(budget))
            shrink = pair[:, 0] < pair[:, 1]
            low, high = np.where(shrink, low, left), np.where(shrink, right, high)
        middle = 0.5 * (low + high)
        D, value = along(middle[:, None], float(budget))
        for target, values in zip(out, (np.exp(middle), D[:, 0], value[:, 0]), strict=True):
            target[:, m] = np.where(found, values, np.nan)
    return out[0], out[1], out[2]
