"""Normal priors on parameters of a fit: what is known of them from elsewhere, weighed against the rows.

A robust objective is no log-likelihood, but near its minimum it acts as one in units of `noise`: for estimates that
minimise sum w rho(r) the rows' information is (sum w rho'')^2 / sum w^2 rho'^2 times J' J (Huber 1981), and the
objective's own curvature is sum w rho'' J' J. A prior enters with its information in the same units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.objective import Objective, mean_bend
from scalelab.laws.regression import Regression, is_own

if TYPE_CHECKING:
    from scalelab.laws.law import Law


def checked(priors: Mapping[str, Any] | None) -> dict[str, tuple[float, float]]:
    """Raises `BadInput` for what is no (mean, standard deviation)."""
    out = {}
    for name, prior in (priors or {}).items():
        try:
            mean, sd = (float(v) for v in prior)
        except (TypeError, ValueError):
            raise BadInput(f"priors[{name}]", prior, "must be (mean, standard deviation)") from None
        if not (np.isfinite([mean, sd]).all() and sd > 0):
            raise BadInput(f"priors[{name}]", prior, "must be (mean, standard deviation), finite, the second above 0")
        out[name] = (mean, sd)
    return out


def noise(
    objective: Objective, residual: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], parameters: int
) -> float:
    """Units of the objective per unit of log-likelihood; for least squares the residual variance."""
    used = weights > 0
    n = int(used.sum())
    slope = objective.rho(residual)[1]
    bend = mean_bend(objective, residual[used], parameters) * weights.sum()
    return float((weights**2 * slope**2).sum() / bend * n / max(1, n - parameters))


class Informed(Regression):
    """Another problem with (p - mean)^2 / (2 sd^2) for each prior, in units of the noise, added to the objective.

    A target of more columns than there are rows gives, in the further ones, means of its own to each lane: the draws
    of a bootstrap take them from the prior, as they take their rows from the data.
    """

    def __init__(self, base: Regression, law: Law, priors: Mapping[str, tuple[float, float]], noise: float):
        self.base, self.rows, self.data, self.load = base, base.rows, base.data, base.load
        self.lower, self.upper = base.lower, base.upper
        names = list(law.parameters)
        places, specs = [], []
        for name in priors:
            if name not in names:
                raise BadInput("priors", name, f"must be one of {', '.join(names)}")
            row, constant = base.own(names.index(name))
            if not row.any():
                raise BadInput("priors", name, "is held fixed")
            spec = law.parameters[name]
            if not is_own(base, spec, names.index(name), row, constant, base.lower.clip(-1, 1)):
                raise BadInput("priors", name, f"{law.name} is fitted in coordinates in which it can have none")
            places.append((row, constant))
            specs.append(spec)
        self.row, self.constant = (np.array(part) for part in zip(*places, strict=True))
        self.specs = specs
        self.mean, self.sd = np.array(list(priors.values())).T
        self.strength = noise / self.sd**2

    @property
    def bare(self):
        return self.base

    def own(self, i):
        return self.base.own(i)

    def _values(self, theta: Float[np.ndarray, "S P"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The parameters that have priors, (S, k), and their first and second derivatives by their own coordinate."""
        u = theta @ self.row.T + self.constant
        signed = np.array([spec.sign != 0 for spec in self.specs])
        p = np.stack([spec.to_p(u[:, k]) for k, spec in enumerate(self.specs)], axis=1)
        return p, np.where(signed, p, 1.0), np.where(signed, p, 0.0)

    def evaluate(self, theta, weights, objective, data=None):
        mean = self.mean
        if data is not None and data.shape[1] > self.rows:
            data, mean = data[:, : self.rows], data[:, self.rows :]
        value, gradient, hessian, metric = self.base.evaluate(theta, weights, objective, data)
        with np.errstate(over="ignore", invalid="ignore"):  # a trial step may be wild: infinite, and refused
            p, first, second = self._values(theta)
            gap = p - mean
            value = value + 0.5 * (self.strength * gap * gap).sum(1)
            squares = self.row[:, :, None] * self.row[:, None, :]
            gradient = gradient + (self.strength * gap * first) @ self.row
            metric = metric + np.tensordot(self.strength * first**2, squares, 1)
            hessian = hessian + np.tensordot(self.strength * (first**2 + gap * second), squares, 1)
        sound = np.isfinite(value) & np.isfinite(hessian).all((1, 2))
        return (
            np.where(sound, value, np.inf),
            np.where(sound[:, None], gradient, 0.0),
            np.where(sound[:, None, None], hessian, 0.0),
            np.where(sound[:, None, None], metric, 0.0),
        )

    def prior(self, theta):
        _, first, _ = self._values(theta[None])
        pull = (self.strength * first[0])[:, None] * self.row
        return pull.T @ (first[0][:, None] * self.row), pull * self.sd[:, None]

    def redrawn(self, data, draws, rng):
        base = self.base.redrawn(data, draws, rng)
        base = np.broadcast_to(self.data, (draws, self.rows)) if base is None else base
        return np.concatenate([base, rng.normal(self.mean, self.sd, (draws, len(self.mean)))], axis=1)

    def model(self, theta):
        return self.base.model(theta)

    def jacobian(self, theta):
        return self.base.jacobian(theta)

    def natural(self, theta):
        return self.base.natural(theta)

    def internal(self, params):
        return self.base.internal(params)

    def starts(self, weights, objective, count):
        return self.base.starts(weights, objective, count)

    def cold_starts(self, weights):
        return self.base.cold_starts(weights)
