"""One law for several arms at once: each arm its own parameters, tied where they are shared.

The regression is block-diagonal: every arm's rows in the form's own problem, with the form's own coordinates and
derivatives. Sharing is the solver's tie between parameters, so it works for every form.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from scalelab.errors import BadInput
from scalelab.laws.law import Law
from scalelab.laws.regression import Regression

INHERITED = ("target", "measured", "objective", "may_be_zero", "ranges", "scale", "arguments", "paid", "fewest_tokens")


class Joint(Law):
    """`law` with parameters `name[arm]` for each arm; a row's arm is the label in column `arm`."""

    group = "arm"

    def __init__(self, law: Law, arms: Sequence[str]):
        if law.group is not None:
            raise BadInput("law", law.name, f"has parameters per {law.group} already: fit it to one table")
        self.base, self.arms = law, tuple(sorted(arms))  # in the order of the labels' integers
        self.name, self.source = law.name, law.source
        self.equation = f"{law.equation}, for {', '.join(self.arms)}"
        self.parameters = {f"{n}[{arm}]": spec for arm in self.arms for n, spec in law.parameters.items()}
        self.inputs = ("arm", *law.inputs)
        for attribute in INHERITED:
            setattr(self, attribute, getattr(law, attribute))

    @property
    def allocates(self) -> bool:
        return False

    def optimum(self, params, flops, cost, **others):
        raise BadInput("optimal", self.name, "every arm has its own optimum: fit.arm(name).optimal(C)")

    def ties(
        self, shared: Sequence[str], fixed: Mapping[str, float], tied: Mapping[str, str]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """The solver's `fixed` and `tied`: parameters of the form held and tied in every arm, shared across arms."""
        for field, names in (("shared", shared), ("fixed", fixed), ("tied", [*tied, *tied.values()])):
            for name in names:
                if name not in self.base.parameters:
                    raise BadInput(field, name, f"must be among {', '.join(self.base.parameters)}")
        first, ties = self.arms[0], {}
        for k, arm in enumerate(self.arms):
            for name in self.base.parameters:
                if name in tied:
                    ties[f"{name}[{arm}]"] = f"{tied[name]}[{first if tied[name] in shared else arm}]"
                elif k and name in shared and name not in fixed:
                    ties[f"{name}[{arm}]"] = f"{name}[{first}]"
        return {f"{name}[{arm}]": value for name, value in fixed.items() for arm in self.arms}, ties

    def split(self, params: Float[np.ndarray, "R KP"], arm: int) -> Float[np.ndarray, "R P"]:
        """An arm's parameters of the form."""
        P = len(self.base.parameters)
        return params[:, arm * P : (arm + 1) * P]

    def size(self, columns):
        return self.base.size(columns)

    def problem(self, columns, on):
        return Blocks(self, columns, on)

    def columns_of(self, columns):
        return {"arm": columns["arm"], **self.base.columns_of(columns)}

    def formula(self, p, x):
        value = np.nan
        for k, arm in enumerate(self.arms):
            own = types.SimpleNamespace(**{n: getattr(p, f"{n}[{arm}]") for n in self.base.parameters})
            value = np.where(x.arm == k, self.base.formula(own, x), value)
        return value


class Blocks(Regression):
    """One problem per arm, side by side."""

    def __init__(self, joint: Joint, columns: Mapping[str, np.ndarray], on: str):
        arm = columns["arm"].astype(int)
        base, K = joint.base, len(joint.arms)
        self.members = [np.flatnonzero(arm == k) for k in range(K)]
        lacking = [name for name, rows in zip(joint.arms, self.members, strict=True) if not len(rows)]
        if lacking:
            raise BadInput("arms", lacking, "have no rows")
        self.parts = [base.problem(_take(columns, rows), on) for rows in self.members]
        self.pooled = base.problem(columns, on)
        self.rows, self.data = self.pooled.rows, self.pooled.data
        self.P = len(base.parameters)
        self.lower, self.upper = (np.concatenate([getattr(p, e) for p in self.parts]) for e in ("lower", "upper"))
        self.to_units = np.zeros((K * self.P, K * self.P))
        for k, part in enumerate(self.parts):
            self.to_units[self._block(k), self._block(k)] = part.to_units

    def _block(self, k: int) -> slice:
        return slice(k * self.P, (k + 1) * self.P)

    def model(self, theta):
        out = np.empty((len(theta), self.rows))
        for k, (part, rows) in enumerate(zip(self.parts, self.members, strict=True)):
            out[:, rows] = part.model(theta[:, self._block(k)])
        return out

    def evaluate(self, theta, weights, objective, data=None):
        S, Q = theta.shape
        value, gradient = np.zeros(S), np.zeros((S, Q))
        hessian, metric = np.zeros((2, S, Q, Q))
        for k, (part, rows) in enumerate(zip(self.parts, self.members, strict=True)):
            b = self._block(k)
            v, gradient[:, b], hessian[:, b, b], metric[:, b, b] = part.evaluate(
                np.ascontiguousarray(theta[:, b]), weights[:, rows], objective, None if data is None else data[:, rows]
            )
            value += v
        return value, gradient, hessian, metric

    def jacobian(self, theta):
        out = np.zeros((self.rows, len(theta)))
        for k, (part, rows) in enumerate(zip(self.parts, self.members, strict=True)):
            out[rows, self._block(k)] = part.jacobian(theta[self._block(k)])
        return out

    def natural(self, theta):
        return np.concatenate([p.natural(theta[..., self._block(k)]) for k, p in enumerate(self.parts)], axis=-1)

    def internal(self, params):
        return np.concatenate([p.internal(params[..., self._block(k)]) for k, p in enumerate(self.parts)], axis=-1)

    def starts(self, weights, objective, count):
        """Half from all rows together, one law for all arms; half from each arm's own rows."""
        together = self.pooled.natural(self.pooled.starts(weights, objective, -(-count // 2)))
        common = np.concatenate([part.internal(together.copy()) for part in self.parts], axis=1)
        own = [
            part.starts(weights[rows], objective, max(1, count // 2))
            for part, rows in zip(self.parts, self.members, strict=True)
        ]
        least = min(map(len, own))
        return np.concatenate([common, np.concatenate([o[:least] for o in own], axis=1)])


def _take(columns: Mapping[str, np.ndarray], which: np.ndarray) -> dict[str, Any]:
    return {role: values[which] for role, values in columns.items()}
