"""Laws in one column: a power law, one with a floor, one with breaks."""

from __future__ import annotations

import dataclasses

import numpy as np

from scalelab.errors import BadInput
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import free, positive
from scalelab.laws.powersum import EXPONENTS, PowerSum
from scalelab.laws.regression import APART, CANDIDATES, FormRegression, low_discrepancy

SYMBOL = {"params": "N", "params_non_embedding": "N", "tokens": "D", "flops": "C", "steps": "S", "batch_tokens": "B"}
SHARPEST, BLUNTEST = 0.02, 10.0  # f of a break; it spans about 4 f e-folds of x
BLUNT, FLOORS = (0.05, 3.0), (0.0, 0.99)  # starts: f; E as a share of the lowest loss
MARGIN = 0.05  # breaks are sought this share of ln x away from either end of the data


class OneColumn(Law):
    """A law of one column, `flops` unless another role is named: `PowerLaw("params")`."""

    def __init__(self, column: str = "flops"):
        self.inputs = (column,)
        self.arguments = {"column": column}
        self.equation = self.equation.replace("X", SYMBOL.get(column, column))


class PowerLaw(OneColumn):
    """L(X) = A / X^alpha.

    X: one column (compute in FLOPs unless named otherwise: `PowerLaw("params")`), L: the loss in any unit. A: the loss
    at X = 1, in the unit of L; alpha: the power, below 0 where L rises with X. There is no floor, so the law cannot
    hold for ever; inside a narrow range it is often all that the data can tell.

    Objective: squares of log residuals, for which the best line in logs is the answer in closed form.
    """

    name = "power"
    parameters = {"A": positive(1e-3, 1e6, linear=True), "alpha": free(-1, 1)}
    equation = "L(X) = A / X^alpha"
    source = "the plain power law, as in Kaplan et al. 2020 (arXiv 2001.08361), section 1.2"
    objective = LOG_SQUARES

    def formula(self, p, x):
        return p.A * getattr(x, self.inputs[0]) ** -p.alpha


class PowerFloor(OneColumn):
    """L(X) = E + A / X^alpha.

    X: one column (compute in FLOPs unless named otherwise: `PowerFloor("tokens")`), L: the loss in any unit. E: the
    loss that no X removes, A: what X = 1 adds to it, both in the unit of L; alpha > 0: the power. In one column E, A
    and alpha are nearly collinear: over less than two decades of X trust predictions, not E.

    Objective: sum of w Huber_delta(ln L_model - ln L), delta = 1e-3, as for the Chinchilla law.
    """

    name = "power-floor"
    parameters = {
        "E": positive(1e-2, 10, linear=True),
        "A": positive(1, 1e5, linear=True),
        "alpha": free(0.05, 1.5, lower=EXPONENTS[0], upper=EXPONENTS[1]),
    }
    equation = "L(X) = E + A / X^alpha"
    source = "Henighan et al. 2020 (arXiv 2010.14701), eq. 1.1"

    def formula(self, p, x):
        return p.E + p.A * getattr(x, self.inputs[0]) ** -p.alpha

    def problem(self, columns, on):
        if on == "value":
            return super().problem(columns, on)
        return PowerSum([columns[self.inputs[0]]], columns[self.target])


class BrokenPower(OneColumn):
    """L(X) = E + b X^-c0 prod_i (1 + (X/d_i)^(1/f_i))^(-c_i f_i), i = 1 .. n
    (Caballero et al. 2022, arXiv 2210.14891, eq. 1, where E is a).

    X: one column, L: the loss in any unit. n + 1 power laws joined smoothly: the slope in logs is -c0 below d_1 and
    -(c0 + c_1 + ... + c_i) beyond d_i. E: the limit, b: scale (unit of L times that of X^c0), d_i: where break i is,
    in the unit of X and within the data, in rising order; f_i > 0: how blunt it is (about 4 f_i e-folds of X).

    Each break costs three parameters. One that the data do not show has c_i about 0, and its d_i and f_i mean nothing.
    """

    name = "broken-power"
    source = "Caballero et al. 2022 (arXiv 2210.14891), eq. 1"

    def __init__(self, breaks: int = 1, column: str = "flops"):
        if isinstance(breaks, bool) or not isinstance(breaks, int) or not 1 <= breaks <= 5:
            raise BadInput("breaks", breaks, "must be 1 to 5")
        self.equation = "L(X) = E + b X^-c0" + "".join(
            f" (1 + (X/d{i})^(1/f{i}))^(-c{i} f{i})" for i in range(1, breaks + 1)
        )
        self.breaks = breaks
        self.parameters = {
            "E": positive(1e-2, 10, linear=True),
            "b": positive(1e-3, 1e6, linear=True),
            "c0": free(-0.5, 1),
        }
        for i in range(1, breaks + 1):
            self.parameters |= {
                f"c{i}": free(-1, 1),
                f"d{i}": positive(1e-3, 1e3),  # the data's own range takes its place: see `WithBreaks`
                f"f{i}": dataclasses.replace(positive(0.05, 2), lower=SHARPEST, upper=BLUNTEST),
            }
        super().__init__(column)
        self.arguments = {"breaks": breaks, "column": column}

    def formula(self, p, x):
        log_x = np.log(getattr(x, self.inputs[0]))
        power = -p.c0 * log_x
        for i in range(1, self.breaks + 1):
            c, d, f = (getattr(p, f"{name}{i}") for name in "cdf")
            power = power - c * f * np.logaddexp(0.0, (log_x - np.log(d)) / f)
        return p.E + p.b * np.exp(power)

    def problem(self, columns, on):
        return WithBreaks(self, columns, on)


class WithBreaks(FormRegression):
    """Breaks lie within the data. Starts: for given E, d and f the logarithm of L - E is linear in ln b, c0 and c_i,
    which weighted least squares gives; the best of a sample of E, d and f are kept."""

    def __init__(self, law: BrokenPower, columns, on: str):
        super().__init__(law, columns, on)
        self.breaks, names = law.breaks, list(law.parameters)
        self.log_x = np.log(columns[law.inputs[0]])
        self.target = np.asarray(columns[law.target], float)
        first, last = self.log_x.min(), self.log_x.max()
        margin = MARGIN * (last - first)
        self.inside = first + margin, last - margin
        for i in range(1, law.breaks + 1):
            at = names.index(f"d{i}")
            self.lower[at], self.upper[at] = self.inside

    def starts(self, weights, objective, count):
        unit = low_discrepancy(CANDIDATES, 1 + 2 * self.breaks)
        lanes = max(1, (1 << 18) // self.rows)  # arrays of lanes x rows stay small
        parts = [self._solve(unit[i : i + lanes], weights) for i in range(0, len(unit), lanes)]
        params, error = (np.concatenate(values) for values in zip(*parts, strict=True))
        chosen: list[int] = []
        for k in np.argsort(error, kind="stable"):
            if all(np.abs(unit[k] - unit[c]).max() > APART for c in chosen):
                chosen.append(int(k))
            if len(chosen) == count:
                break
        return self.internal(params[chosen])

    def _solve(self, unit: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and squared error of the best law for each E, d and f, from points of the unit cube."""
        n, low, high = self.breaks, *self.inside
        floor = (FLOORS[0] + unit[:, :1] ** 0.5 * (FLOORS[1] - FLOORS[0])) * max(self.target.min(), 0.0)
        d = np.sort(low + unit[:, 1 : 1 + n] * (high - low), axis=1)
        f = BLUNT[0] * (BLUNT[1] / BLUNT[0]) ** unit[:, 1 + n :]
        x = self.log_x - self.log_x.mean()
        rest = np.log(np.maximum(self.target - floor, 1e-3 * np.abs(self.target)))
        bends = f[:, :, None] * np.logaddexp(0.0, (self.log_x - d[:, :, None]) / f[:, :, None])
        basis = np.concatenate([np.broadcast_to([np.ones_like(x), -x], (len(d), 2, len(x))), -bends], axis=1)
        weight = weights * (1 - floor / self.target) ** 2  # an error of ln(L - E) counts as what it makes of ln L
        gram = np.einsum("skn,sn,sln->skl", basis, weight, basis, optimize=True)
        gram += 1e-9 * np.einsum("skk->sk", gram)[:, :, None] * np.eye(n + 2)
        solved = np.linalg.solve(gram, np.einsum("skn,sn->sk", basis, weight * rest)[..., None])[..., 0]
        error = (weight * (np.einsum("sk,skn->sn", solved, basis) - rest) ** 2).sum(1)
        scale = np.exp(solved[:, :1] + solved[:, 1:2] * self.log_x.mean())
        each = np.stack([solved[:, 2:], np.exp(d), f], axis=2).reshape(len(d), 3 * n)
        return np.concatenate([floor, scale, solved[:, 1:2], each], axis=1), error
