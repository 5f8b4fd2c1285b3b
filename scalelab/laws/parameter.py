"""A law's parameters: names, signs, bounds, and where a search for them begins."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from scalelab.errors import BadInput

TINY, HUGE = 1e-300, 1e300


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter p. The solver moves in u: p = exp(u) (sign +1), -exp(u) (sign -1) or u (sign 0).

    low, high: starts are drawn between them (log-uniformly where p has a sign). lower, upper: what p may be.
    linear: given the other parameters the law is linear in it (plus terms that do not contain it), so that starting
    values come from a least-squares solution instead of a search.
    """

    low: float
    high: float
    sign: int = 0
    lower: float = -np.inf
    upper: float = np.inf
    linear: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise BadInput("parameter", f"low={self.low}, high={self.high}", "low must be below high, both finite")
        if self.sign not in (-1, 0, 1):
            raise BadInput("parameter: sign", self.sign, "must be 1 (positive), -1 (negative) or 0 (either)")
        if self.sign and (self.sign * self.low <= 0 or self.sign * self.high <= 0):
            raise BadInput("parameter", f"low={self.low}, high={self.high}", "must have the parameter's sign")
        if not self.lower < self.upper:
            raise BadInput("parameter", f"lower={self.lower}, upper={self.upper}", "lower must be below upper")

    def to_u(self, p: Any) -> Any:
        """Solver coordinate of a natural value."""
        return np.log(np.clip(self.sign * np.asarray(p, float), TINY, HUGE)) if self.sign else np.asarray(p, float)

    def to_p(self, u: Any) -> Any:
        """Natural value of a solver coordinate, an array or a jet."""
        if not self.sign:
            return u
        return np.exp(u) if self.sign > 0 else -np.exp(u)

    @property
    def box(self) -> tuple[float, float]:
        """Bounds of u."""
        if not self.sign:
            return self.lower, self.upper
        ends = (
            sorted(float(self.to_u(np.clip(self.sign * b, TINY, HUGE) * self.sign)) for b in (self.lower, self.upper))
            if np.isfinite([self.lower, self.upper]).any()
            else [-690.0, 690.0]
        )
        return max(ends[0], -690.0), min(ends[1], 690.0)  # exp stays finite

    @property
    def search(self) -> tuple[float, float]:
        """The range of u that starts are drawn from."""
        ends = sorted((float(self.to_u(self.low)), float(self.to_u(self.high))))
        return ends[0], ends[1]


def positive(low: float, high: float, *, upper: float = np.inf, linear: bool = False) -> Parameter:
    """A parameter above 0 (and at most `upper`), sought between low and high."""
    return Parameter(low, high, sign=1, lower=0.0, upper=upper, linear=linear)


def negative(low: float, high: float, *, lower: float = -np.inf) -> Parameter:
    """A parameter below 0 (and at least `lower`), sought between low and high, both below 0."""
    return Parameter(low, high, sign=-1, lower=lower, upper=0.0)


def free(low: float, high: float, *, lower: float = -np.inf, upper: float = np.inf, linear: bool = False) -> Parameter:
    """A parameter of either sign, within bounds if given, sought between low and high."""
    return Parameter(low, high, lower=lower, upper=upper, linear=linear)
