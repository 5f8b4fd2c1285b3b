"""What a fit minimises: a sum over rows of w rho(residual), with rho and the kind of residual named.

Residuals are model minus data, of the target's logarithm ("log") or of the target itself ("value").
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput

KINDS = ("huber", "squares", "student", "lower-edge")


@dataclasses.dataclass(frozen=True)
class Objective:
    """huber: r^2/2 up to |r| = delta, linear beyond. squares: r^2/2. student: the negative log-likelihood of
    Student's t with 4 degrees of freedom and scale delta. lower-edge: Huber, a row that the law over-predicts counting
    ten times (another estimand: the best runs, not the mean one).

    delta None: taken from the data, as 1.345 (Huber: 95 % efficient for normal errors) or 1 (Student) times the
    robust scale of the residuals of a first fit.
    """

    kind: str = "huber"
    on: str = "log"
    delta: float | None = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput("objective", self.kind, f"must be one of {', '.join(KINDS)}")
        if self.on not in ("log", "value"):
            raise BadInput("objective: on", self.on, "must be 'log' or 'value'")
        if self.delta is not None and not (np.isfinite(self.delta) and self.delta > 0):
            raise BadInput("delta", self.delta, "must be above 0, or 'auto'")

    def __str__(self) -> str:
        what = "ln model - ln data" if self.on == "log" else "model - data"
        width = "" if self.kind == "squares" else f", {'scale' if self.kind == 'student' else 'delta'} = {self.delta:g}"
        name = {
            "huber": "Huber",
            "squares": "half squares",
            "student": "Student-t (4)",
            "lower-edge": "Huber, over-prediction ten-fold",
        }[self.kind]
        return f"sum of weights x {name}({what}){width}"

    @property
    def scale_factor(self) -> float:
        """delta in robust scales of the residuals, where it is taken from the data."""
        return 1.0 if self.kind == "student" else 1.345

    def widened(self, factor: float) -> Objective:
        return self if self.delta is None else dataclasses.replace(self, delta=self.delta * factor)

    def rho(
        self, r: Float[np.ndarray, "*rows"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | float, np.ndarray | float]:
        """rho, rho', rho'' and the row's weight rho'/r in iteratively reweighted least squares."""
        if self.kind == "squares":
            return 0.5 * r * r, r, 1.0, 1.0
        delta = self.delta
        assert delta is not None
        if self.kind == "student":
            q = 1.0 / (4.0 * delta * delta + r * r)
            # 5/2 ln(1 + r^2 / 4 delta^2), in units in which it is r^2/2 near zero
            unit = 4.0 * delta * delta / 5.0
            weight = 5.0 * q * unit
            return 2.5 * unit * np.log1p(r * r / (4 * delta * delta)), weight * r, weight * (1 - 2 * r * r * q), weight
        slope = np.clip(r, -delta, delta)
        size = np.abs(r)
        value, bend, weight = slope * (r - 0.5 * slope), (size <= delta) * 1.0, delta / np.maximum(size, delta)
        if self.kind == "lower-edge":
            edge = np.where(r > 0, 10.0, 1.0)
            return edge * value, edge * slope, edge * bend, edge * weight
        return value, slope, bend, weight


HUBER = Objective("huber", "log", 1e-3)  # the field's default since Hoffmann et al. 2022
LOG_SQUARES = Objective("squares", "log", None)
SQUARES = Objective("squares", "value", None)

NAMED = {
    "huber": HUBER,
    "log-squares": LOG_SQUARES,
    "squares": SQUARES,
    "student": Objective("student", "log", None),
    "lower-edge": Objective("lower-edge", "log", 1e-3),
}


def parse(objective: str | Objective | None, default: Objective, delta: float | str | None) -> Objective:
    """An objective by name (huber, log-squares, squares, student, lower-edge), as an object, or the law's own.

    `delta` replaces its width: a positive number, or "auto" for one taken from the data.
    """
    if objective is None:
        chosen = default
    elif isinstance(objective, Objective):
        chosen = objective
    elif objective in NAMED:
        chosen = NAMED[objective]
    else:
        raise BadInput("objective", objective, f"must be one of {', '.join(NAMED)}, or a laws.Objective")
    if delta is None:
        return chosen
    if delta == "auto":
        return dataclasses.replace(chosen, delta=None)
    if isinstance(delta, str) or not (np.isfinite(delta) and delta > 0):
        raise BadInput("delta", delta, "must be above 0, or 'auto'")
    return dataclasses.replace(chosen, delta=float(delta))


def robust_scale(residual: np.ndarray) -> float:
    """1.4826 times the median absolute deviation: the standard deviation, were the residuals normal."""
    return float(1.4826 * np.median(np.abs(residual - np.median(residual))))


def mean_bend(objective: Objective, residual: np.ndarray, parameters: int) -> float:
    """The mean of rho'' over rows, smoothed over the residuals' own spread: with a Huber width far below the noise
    rho'' is 1 for a handful of rows and 0 for the rest."""
    n = len(residual)
    # a robust fit passes through as many rows as it has parameters: they say nothing of the density near zero
    apart = np.sort(np.abs(residual))[min(parameters, n - 1)]
    seen = residual[np.abs(residual) >= apart]
    h = max(1.06 * max(robust_scale(residual), 1e-12) * n**-0.2, 1e-9)
    return max(float(np.mean((objective.rho(seen + h)[1] - objective.rho(seen - h)[1]) / (2 * h))), 1e-300)


def first_pass(objective: Objective, data: np.ndarray) -> Objective:
    """The Huber objective whose residuals give the scale of one without a delta."""
    unit = 1.0 if objective.on == "log" else float(np.median(np.abs(data)))
    return Objective("huber", objective.on, 1e-3 * max(unit, 1e-300))


def with_scale(objective: Objective, residual: np.ndarray) -> Objective:
    """`objective` with its delta from these residuals; never so small that rounding decides."""
    scale = max(robust_scale(residual), 1e-9)
    return dataclasses.replace(objective, delta=objective.scale_factor * scale)
