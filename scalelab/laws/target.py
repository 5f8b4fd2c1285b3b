"""What studies ask of a law: the compute-optimal choice and loss at a budget, or the target at the largest inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit
    from scalelab.laws.law import Law

FURTHER = 10.0  # times the largest run's compute: one decade on, the usual step of a plan


@dataclasses.dataclass(frozen=True)
class Target:
    """A budget of `flops` (C = 6 N D) with the law's further inputs, or, for a law that allocates nothing, inputs."""

    law: Law
    flops: float | None
    inputs: dict[str, float]

    def quantities(self, params: Float[np.ndarray, "R P"]) -> dict[str, Float[np.ndarray, " R"]]:
        """loss, N*, D/N* (a law that allocates) or the target alone, for each parameter vector."""
        if self.flops is None:
            columns = {role: np.array([value]) for role, value in self.inputs.items()}
            return {self.law.target: self.law.evaluate(params, columns)[:, 0]}
        good = np.isfinite(params).all(1)
        out = np.full((3, len(params)), np.nan)
        if good.any():
            found = self.law.optimum(params[good], np.array([self.flops]), 6.0, **self.inputs)
            out[:, good] = np.stack([v[:, 0] for v in found])
        N, D, loss = out
        return {self.law.target: loss, "params": N, "D/N": D / N}

    def __str__(self) -> str:
        if self.flops is not None:
            return f"C = {self.flops:.3g}"
        return ", ".join(f"{role} = {value:.3g}" for role, value in self.inputs.items())


def target_of(fit: Fit, C: float | None = None) -> Target:
    """The compute-optimal point at C, by default ten times the largest run; for a law without one, its largest run."""
    from scalelab.laws.validate import scale_of

    law, rows = fit.law, fit.rows
    if law.allocates and rows.has_compute:
        if C is not None and not (np.isfinite(C) and C > 0):
            raise BadInput("C", C, "must be positive FLOPs")
        rest = {r: _middle(rows.columns[r]) for r in law.inputs if r not in (law.paid, "tokens")}
        return Target(law, float(FURTHER * rows.compute.max() if C is None else C), rest)
    if C is not None:
        raise BadInput("C", C, f"{law.name} allocates no compute: leave it out, for the loss at the largest run")
    largest = int(np.argmax(scale_of(fit)[0]))
    return Target(law, None, {role: float(rows.columns[role][largest]) for role in law.inputs})


def _middle(values: np.ndarray) -> float:
    """The middle one of the values that there are: also of labels and of experts, which have no mean."""
    return float(np.sort(values)[len(values) // 2])
