"""A law and a table as a regression problem in unconstrained coordinates theta: what the solver minimises.

Residuals are differences of the model and the data on the objective's scale (logarithms or values). `Problem` says what
the solver asks, `Regression` what a fit asks beside that; `FormRegression` takes it from a law's own formula, whose
derivatives are exact (`jet.py`); `Constrained` fixes and ties parameters of another problem. A law whose structure
allows a faster way brings its own problem (`powersum.py`).
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.jet import Jet
from scalelab.laws.objective import Objective

if TYPE_CHECKING:
    from scalelab.laws.law import Law

CANDIDATES = 1024  # points of the search box that are scored for starts
APART = 0.15  # how far starts lie from each other, as a share of the search box in some coordinate


class Problem(ABC):
    """n rows, P coordinates. data: (n,) the target on the objective's scale. lower, upper: (P,) box of theta."""

    load = 1  # numbers that one evaluation holds, relative to one with derivatives by hand
    rows: int
    lower: Float[np.ndarray, " P"]
    upper: Float[np.ndarray, " P"]
    data: Float[np.ndarray, " n"]

    @abstractmethod
    def evaluate(
        self,
        theta: Float[np.ndarray, "S P"],
        weights: Float[np.ndarray, "S n"],
        objective: Objective,
        data: Float[np.ndarray, "S n"] | None = None,
    ) -> tuple[
        Float[np.ndarray, " S"], Float[np.ndarray, "S P"], Float[np.ndarray, "S P P"], Float[np.ndarray, "S P P"]
    ]:
        """Objective, gradient, Hessian, and the iteratively reweighted Gauss-Newton matrix."""


class Regression(Problem):
    """A problem with a model of each row, whose coordinates are those of a law's parameters."""

    to_units: Float[np.ndarray, "P P"]  # theta -> u, each parameter's own coordinate (`Parameter.to_u`)

    @property
    def bare(self) -> Regression:
        """The problem that the rows alone pose."""
        return self

    def own(self, i: int) -> tuple[Float[np.ndarray, " P"], float]:
        """(row, constant): the own coordinate u of the law's parameter i is row @ theta + constant."""
        return self.to_units[i], 0.0

    @abstractmethod
    def model(self, theta: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S n"]:
        """The law on the objective's scale."""

    @abstractmethod
    def jacobian(self, theta: Float[np.ndarray, " P"]) -> Float[np.ndarray, "n P"]:
        """d model / d theta, row by row."""

    @abstractmethod
    def natural(self, theta: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        """theta -> the law's parameters."""

    @abstractmethod
    def internal(self, params: Float[np.ndarray, "S P"]) -> Float[np.ndarray, "S P"]:
        """The law's parameters -> theta."""

    @abstractmethod
    def starts(
        self, weights: Float[np.ndarray, " n"], objective: Objective, count: int
    ) -> Float[np.ndarray, "count P"]:
        """Spread starting points, best first."""

    def cold_starts(self, weights: Float[np.ndarray, "R n"]) -> Float[np.ndarray, "R P"] | None:
        """A start of its own for each row of weights, where one costs less than a refit; None otherwise."""
        return None

    def prior(self, theta: Float[np.ndarray, " P"]) -> tuple[Float[np.ndarray, "P P"], Float[np.ndarray, "k P"]]:
        """What priors add to the Gauss-Newton matrix, and to the gradient's standard deviation (one row for each)."""
        return np.zeros((len(theta), len(theta))), np.zeros((0, len(theta)))

    def redrawn(
        self, data: Float[np.ndarray, "k n"] | None, draws: int, rng: np.random.Generator
    ) -> Float[np.ndarray, "k m"] | None:
        """The targets of bootstrap draws: priors have draws of their own."""
        return data


class FormRegression(Regression):
    """Any law, from its formula."""

    load = 3

    def __init__(self, law: Law, columns: Mapping[str, np.ndarray], on: str):
        self.law, self.on = law, on
        self.columns = types.SimpleNamespace(**law.columns_of(columns))
        target = columns[law.target]
        if on == "log" and target.min() <= 0:
            remedy = f"{law.target} has values of 0 or less, which have no logarithm: objective='squares' takes them"
            raise BadInput("objective", "residuals of logarithms", remedy)
        self.data = np.log(target) if on == "log" else np.asarray(target, float)
        self.rows = len(target)
        specs = list(law.parameters.values())
        self.specs = specs
        self.lower, self.upper = (np.array(ends, float) for ends in zip(*(s.box for s in specs), strict=True))
        self.to_units = np.eye(len(specs))

    def _namespace(self, coordinates: Sequence[Any]) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            **{name: s.to_p(u) for (name, s), u in zip(self.law.parameters.items(), coordinates, strict=True)}
        )

    def _formula(self, coordinates: Sequence[Any]) -> Any:
        with np.errstate(all="ignore"):  # starts and trial steps may be wild; the solver refuses what is not finite
            value = self.law.formula(self._namespace(coordinates), self.columns)
            return np.log(value) if self.on == "log" else value

    def model(self, theta):
        value = self._formula([theta[:, i, None] for i in range(theta.shape[1])])
        return np.broadcast_to(value, (len(theta), self.rows))

    def _jet(self, theta: np.ndarray) -> Jet:
        jet = self._formula([Jet.variable(theta[:, i, None], i) for i in range(theta.shape[1])])
        if not isinstance(jet, Jet):
            raise BadInput("law", self.law.name, "its formula does not depend on its parameters")
        return jet

    def evaluate(self, theta, weights, objective, data=None):
        S, P = theta.shape
        shape = (S, self.rows)
        with np.errstate(all="ignore"):
            jet = self._jet(theta)
            residual = np.broadcast_to(jet.value, shape) - (self.data if data is None else data)
            loss, slope, bend, robust = objective.rho(residual)
            value = np.where(np.isfinite(residual).all(1), (weights * loss).sum(-1), np.inf)
            push, bent, robust = weights * slope, weights * bend, weights * robust
            slopes = np.zeros((S, P, self.rows))
            for i, g in jet.gradient.items():
                slopes[:, i] = g
            across = slopes.transpose(0, 2, 1)
            gradient = (slopes @ push[:, :, None])[:, :, 0]
            metric = (slopes * robust[:, None]) @ across
            hessian = (slopes * bent[:, None]) @ across
            for (i, j), h in jet.hessian.items():
                term = _dot(push, h)
                hessian[:, i, j] += term
                if i != j:
                    hessian[:, j, i] += term
            sound = np.isfinite(value) & np.isfinite(gradient).all(1) & np.isfinite(hessian).all((1, 2))
        value = np.where(sound, value, np.inf)
        return (
            value,
            np.where(sound[:, None], gradient, 0.0),
            np.where(sound[:, None, None], hessian, 0.0),
            np.where(sound[:, None, None], metric, 0.0),
        )

    def jacobian(self, theta):
        jet = self._jet(np.asarray(theta)[None])
        out = np.zeros((self.rows, len(theta)))
        for i, g in jet.gradient.items():
            out[:, i] = np.broadcast_to(g, (1, self.rows))[0]
        return out

    def natural(self, theta):
        return np.stack([s.to_p(theta[..., i]) for i, s in enumerate(self.specs)], axis=-1)

    def internal(self, params):
        u = np.stack([s.to_u(params[..., i]) for i, s in enumerate(self.specs)], axis=-1)
        return np.clip(u, self.lower, self.upper)

    # ---------------------------------------------------------------------------------------- starting points

    def starts(self, weights, objective, count):
        """The best of a low-discrepancy sample of the search box, linear parameters solved for, apart from each other.

        For given other parameters a law that is linear in some is solved for these by least squares on the target
        (variable projection, Golub & Pereyra 1973); one that must be positive restarts small where it comes out not.
        """
        low, high = (np.array(ends) for ends in zip(*(s.search for s in self.specs), strict=True))
        linear = [i for i, s in enumerate(self.specs) if s.linear]
        moving = [i for i in range(len(self.specs)) if i not in linear] or linear
        candidates = min(CANDIDATES, 16 ** len(moving))
        place = np.full((candidates, len(self.specs)), 0.5)
        place[:, moving] = low_discrepancy(candidates, len(moving))
        theta = np.clip(low + place * (high - low), self.lower, self.upper)
        lanes = max(1, (1 << 16) // self.rows)
        values = np.empty(len(theta))
        for i in range(0, len(theta), lanes):
            part = slice(i, i + lanes)
            if linear:
                theta[part] = self._solve_linear(theta[part], linear, weights)
            with np.errstate(all="ignore"):
                residual = self.model(theta[part]) - self.data
                # far starts are ranked by their absolute residuals, which no outlier and no delta decides
                values[part] = (weights * np.abs(residual)).sum(-1)
        values = np.where(np.isfinite(values), values, np.inf)
        order = np.argsort(values, kind="stable")
        if not np.isfinite(values[order[0]]):
            raise BadInput(f"law {self.law.name}", "no finite value", "its formula gives NaN or infinity on this table")
        chosen: list[int] = []
        for k in order[np.isfinite(values[order])]:
            if all(np.abs(place[k] - place[c])[moving].max() > APART for c in chosen):
                chosen.append(int(k))
            if len(chosen) == count:
                break
        return theta[chosen]

    def _solve_linear(self, theta: np.ndarray, linear: list[int], weights: np.ndarray) -> np.ndarray:
        target = np.exp(self.data) if self.on == "log" else self.data
        relative = np.sqrt(weights) / (np.abs(target) if self.on == "log" else 1.0)
        p = self._namespace([theta[:, i, None] for i in range(theta.shape[1])])
        names, S = list(self.law.parameters), len(theta)
        for i in linear:
            setattr(p, names[i], Jet.variable(np.zeros((S, 1)), i))
        with np.errstate(all="ignore"):
            jet = self.law.formula(p, self.columns)
            basis = np.stack([np.broadcast_to(jet.gradient[i], (S, self.rows)) for i in linear], axis=1) * relative
            right = (target - np.broadcast_to(jet.value, (S, self.rows))) * relative
        sound: Any = np.isfinite(basis).all((1, 2)) & np.isfinite(right).all(1)
        basis, right = np.where(sound[:, None, None], basis, 0.0), np.where(sound[:, None], right, 0.0)
        gram = basis @ basis.transpose(0, 2, 1)
        size = np.sqrt(np.maximum(np.einsum("skk->sk", gram), 1e-300))
        gram = gram / (size[:, :, None] * size[:, None, :]) + 1e-10 * np.eye(len(linear))
        solution = np.linalg.solve(gram, (basis @ right[:, :, None]) / size[:, :, None])[..., 0] / size
        out = theta.copy()
        for position, k in enumerate(linear):
            s, c = self.specs[k], solution[:, position]
            if s.sign:  # restart at a small share of the target where the sign comes out wrong
                scale = np.abs(target).mean() / np.maximum(size[:, position], 1e-300) * np.sqrt(self.rows)
                c = s.sign * np.maximum(s.sign * c, 1e-3 * np.minimum(scale, 1e300))
            out[:, k] = np.clip(s.to_u(np.clip(c, s.lower, s.upper)), self.lower[k], self.upper[k])
        return np.where(sound[:, None], out, theta)


class StartsBy(FormRegression):
    """A law's own regression, whose starts are sought in another writing of it that is linear in more parameters.

    other: that writing, a law of the same inputs and target. translate: its parameters (S, P) -> the law's.
    """

    def __init__(
        self, law: Law, columns: Mapping[str, np.ndarray], on: str,
        other: Law, translate: Callable[[Float[np.ndarray, "S P"]], Float[np.ndarray, "S P"]],
    ):  # fmt: skip
        super().__init__(law, columns, on)
        self.other, self.translate = FormRegression(other, columns, on), translate

    def starts(self, weights, objective, count):
        found = self.other.natural(self.other.starts(weights, objective, count))
        with np.errstate(all="ignore"):
            return self.internal(self.translate(found))


class Constrained(Regression):
    """Another problem with parameters fixed or tied: theta = spread @ free + offset.

    fixed: parameter -> value. tied: parameter -> the parameter that it equals.
    """

    def __init__(
        self, base: Regression, names: Sequence[str], specs: Sequence[Any],
        fixed: Mapping[str, float], tied: Mapping[str, str],
    ):  # fmt: skip
        self.base, self.rows, self.data, self.load = base, base.rows, base.data, base.load
        P = len(names)
        spread, offset = np.eye(P), np.zeros(P)
        gone: set[int] = set()
        for name, other in [*((n, v) for n, v in fixed.items()), *((n, v) for n, v in tied.items())]:
            i = _position(names, name, "fixed" if name in fixed else "tied")
            if i in gone:
                raise BadInput("fixed and tied", name, "is named twice")
            row = base.to_units[i].copy()
            constant = 0.0
            if name in fixed:
                value, spec = float(fixed[name]), specs[i]
                inside = spec.lower <= value <= spec.upper and (not spec.sign or spec.sign * value > 0)
                if not inside:
                    raise BadInput(f"fixed[{name}]", value, f"must lie within {spec.lower:g} and {spec.upper:g}")
                constant = float(spec.to_u(value))
            else:
                j = _position(names, str(other), f"tied[{name}]")
                if j == i or j in gone or specs[i].sign != specs[j].sign:
                    raise BadInput(f"tied[{name}]", other, "must be another, free parameter of the same sign")
                row -= base.to_units[j]
            # row @ theta = constant, solved for theta_i in what is already substituted
            combined, known = row @ spread, constant - row @ offset
            pivot = combined[i]
            replacement = -combined / pivot
            replacement[i] = 0.0
            shift = known / pivot
            spread, offset = spread + np.outer(spread[:, i], replacement), offset + spread[:, i] * shift
            spread[:, i] = 0.0
            gone.add(i)
        keep = [i for i in range(P) if i not in gone]
        if not keep:
            raise BadInput("fixed", dict(fixed), "leaves no parameter to fit")
        self.keep, self.spread, self.offset = keep, spread[:, keep], offset
        self.lower, self.upper = base.lower[keep], base.upper[keep]

    def own(self, i):
        row, constant = self.base.own(i)
        return row @ self.spread, float(row @ self.offset) + constant

    def _full(self, free: np.ndarray) -> np.ndarray:
        return free @ self.spread.T + self.offset

    def model(self, theta):
        return self.base.model(self._full(theta))

    def evaluate(self, theta, weights, objective, data=None):
        value, gradient, *matrices = self.base.evaluate(self._full(theta), weights, objective, data)
        hessian, metric = (self.spread.T @ matrix @ self.spread for matrix in matrices)
        return value, gradient @ self.spread, hessian, metric

    def jacobian(self, theta):
        return self.base.jacobian(self._full(np.asarray(theta)[None])[0]) @ self.spread

    def natural(self, theta):
        return self.base.natural(self._full(theta))

    def internal(self, params):
        return self.base.internal(params)[..., self.keep]

    def starts(self, weights, objective, count):
        return self.base.starts(weights, objective, count)[:, self.keep]

    def cold_starts(self, weights):
        own = self.base.cold_starts(weights)
        return None if own is None else own[:, self.keep]


def is_own(
    problem: Regression, spec: Any, i: int, row: Float[np.ndarray, " P"], constant: float,
    near: Float[np.ndarray, " P"],
) -> bool:  # fmt: skip
    """Whether parameter i is what `own` says, tried near some theta: a law may be fitted in coordinates in which it is
    no straight line."""
    theta = near + np.linspace(0.01, 0.02, len(near))
    with np.errstate(all="ignore"):
        u = spec.to_u(problem.natural(theta[None])[0, i])
    return bool(np.isclose(u, row @ theta + constant, rtol=1e-6, atol=1e-9))


def low_discrepancy(n: int, dimensions: int) -> Float[np.ndarray, "n d"]:
    """n points that fill the unit cube evenly: multiples of powers of the generalised golden ratio, modulo 1."""
    ratio = 2.0
    for _ in range(60):  # the positive root of x^(d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1, dimensions + 1)
    return (0.5 + np.arange(1, n + 1)[:, None] * steps) % 1.0


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum over rows of a product whose factors may be constant over rows or lanes."""
    if b.shape[-1] == 1 and a.shape[-1] != 1:
        return a.sum(-1) * np.broadcast_to(b, (*b.shape[:-1], 1))[..., 0]
    return np.vecdot(a, b)


def _position(names: Sequence[str], name: str, field: str) -> int:
    if name not in names:
        raise BadInput(field, name, f"must be one of {', '.join(names)}")
    return list(names).index(name)
