"""How an optimum is looked for: many starts for the point fit, and for each bootstrap draw its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from scalelab.laws.objective import Objective
from scalelab.laws.progress import progress
from scalelab.laws.regression import Regression
from scalelab.laws.resample import Resamples
from scalelab.laws.solver import ALONE, Solution, minimise

AGREE = 1e-6  # relative excess of the objective up to which a start has found the optimum
EXCHANGED = 64  # optima of bootstrap draws that the other draws are compared with


def polish(
    problem: Regression, starts: Float[np.ndarray, "S P"], weights: Float[np.ndarray, " n"], goal: Objective,
    name: str = "fit",
) -> Solution:  # fmt: skip
    """Every start's own minimum, the best first and carried to its end.

    A first pass with a wider Huber zone brings far starts near; it need not finish. Starts that crawl along a valley
    above the best are let go, and counted as not agreeing, unless most do.
    """
    with progress(2 * len(starts), f"{name}: {len(starts)} starts") as advance:
        lead = minimise(problem, starts, weights, goal.widened(10), tolerance=1e-4, max_iterations=15, tick=advance)
        found = minimise(problem, lead.theta, weights, goal, max_iterations=75, race=True, tick=advance)
    if 2 * found.converged.sum() < len(starts):
        found = _resume(problem, found, ~found.converged, weights, goal)
    order = np.argsort(np.where(np.isfinite(found.value), found.value, np.inf), kind="stable")
    found = Solution(*(getattr(found, f.name)[order] for f in dataclasses.fields(found)))
    if not found.converged[0]:
        found = _resume(problem, found, np.arange(len(starts)) == 0, weights, goal)
    return found


def _resume(problem: Regression, found: Solution, which: Bool[np.ndarray, " S"], weights, goal: Objective) -> Solution:
    """Carry some lanes on."""
    more = minimise(problem, found.theta[which], weights, goal, race=True)
    for f in dataclasses.fields(found):
        before = getattr(found, f.name)[which]
        getattr(found, f.name)[which] = getattr(more, f.name) + (before if f.name == "iterations" else 0)
    return found


def refit(
    problem: Regression, found: Solution, weights: Float[np.ndarray, " n"], goal: Objective, resamples: Resamples,
    free: int, name: str = "fit", around: Float[np.ndarray, "1 P"] | None = None,
) -> tuple[Float[np.ndarray, "R P"], Bool[np.ndarray, " R"]]:  # fmt: skip
    """Each bootstrap draw's own optimum, NaN where none was found, and whether it sits on a bound.

    It is the better of the point fit's basin and a start of its own (`cold_starts`), or, for a law without these, of
    every local optimum that the point fit met; unless another draw's optimum suits it better still.
    `around`: what wild and parametric draws are made of, where that is not the point fit.
    """
    theta = np.full((resamples.draws, len(problem.lower)), np.nan)
    boundary = np.zeros(resamples.draws, bool)
    others = _other_optima(found)
    rng = np.random.default_rng([resamples.seed, 2])
    centre = found.theta[:1] if around is None else around
    with progress(resamples.draws, f"{name}: bootstrap") as advance:
        for part, counts, data in resamples.chunks(problem.model(centre)[0], problem.data, free):
            counts *= weights
            back = np.arange(len(counts))
            if data is None and resamples.groups < len(weights):  # a few clusters make few different draws
                counts, back = np.unique(counts, axis=0, return_inverse=True)
                back = back.reshape(-1)
            own = problem.cold_starts(counts) if data is None else None
            data = problem.redrawn(data, len(counts), rng)
            rivals = others if own is None else [own]
            share = (part.stop - part.start) / (len(counts) * (1 + len(rivals)))  # of a draw that one lane is
            best = _Best(problem, counts, goal, data, lambda lanes, share=share: advance(lanes * share))
            for start in [found.theta[:1], *rivals]:
                best.offer(start)
            if data is None:
                best.exchange()
            good = best.converged & (np.count_nonzero(counts, axis=1) >= free)
            held = (best.theta <= problem.lower) | (best.theta >= problem.upper)
            boundary[part] = held[back].any(axis=1)
            theta[part] = np.where(good[:, None], best.theta, np.nan)[back]
    return theta, boundary


class _Best:
    """The best minimum met so far in each lane, from starts that are offered one after the other."""

    def __init__(
        self, problem: Regression, weights: Float[np.ndarray, "S n"], goal: Objective,
        data: Float[np.ndarray, "S n"] | None, tick: Callable[[int], None],
    ):  # fmt: skip
        self.problem, self.weights, self.goal, self.data, self.tick = problem, weights, goal, data, tick
        self.theta = np.zeros((len(weights), len(problem.lower)))
        self.value, self.converged = np.full(len(weights), np.inf), np.zeros(len(weights), bool)

    def offer(self, start: Float[np.ndarray, "S P"]) -> None:
        """Start each lane here (one start for all, or one each), and keep what is better than what it has."""
        self._offer(np.broadcast_to(start, self.theta.shape), np.arange(len(self.value)), self.weights, self.data)

    def exchange(self) -> None:
        """Offer each lane the optimum of another that suits its weights better than its own: then it sat in a worse
        basin. Matrix products compare them all."""
        others = self.theta[self.converged][:EXCHANGED]
        if len(others) < 2:
            return
        loss = self.goal.rho(self.problem.model(others) - self.problem.data)[0]
        loss = np.nan_to_num(loss, nan=1e300, posinf=1e300)
        size = max(1, ALONE // loss.size)
        values = np.concatenate([self.weights[i : i + size] @ loss.T for i in range(0, len(self.weights), size)])
        pick = values.argmin(axis=1)
        fooled = np.flatnonzero(values[np.arange(len(pick)), pick] < self.value * (1 - AGREE))
        if len(fooled):
            self._offer(others[pick[fooled]], fooled, self.weights[fooled], None)

    def _offer(self, start: np.ndarray, lanes: np.ndarray, weights: np.ndarray, data: np.ndarray | None) -> None:
        rival = minimise(self.problem, start, weights, self.goal, data=data, tick=self.tick)
        converged, value = self.converged[lanes], self.value[lanes]
        better = (rival.converged & ~converged) | ((rival.converged == converged) & (rival.value < value))
        at = lanes[better]
        self.theta[at], self.value[at] = rival.theta[better], rival.value[better]
        self.converged[at] = rival.converged[better]


def _other_optima(found: Solution) -> list[Float[np.ndarray, "1 P"]]:
    """Converged local optima that are worse by less than a factor two: one may be a resample's best."""
    out: list[np.ndarray] = []
    values = [found.value[0]]
    for theta, value, converged in zip(found.theta[1:], found.value[1:], found.converged[1:], strict=True):
        if converged and value < 2 * found.value[0] and all(value > v * (1 + 1e-4) for v in values):
            out.append(theta[None])
            values.append(value)
    return out[:2]
