"""Laws of borrowed knowledge and of learning curves between chance and floor: distillation, transfer, M4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scalelab.laws.jet import Jet, value_of
from scalelab.laws.law import Law
from scalelab.laws.objective import LOG_SQUARES
from scalelab.laws.parameter import free, positive
from scalelab.laws.regression import FormRegression, Regression

STEPS = 60  # of Newton's method; it needs fewer than 10


class AtMean(FormRegression):
    """Coefficients are moved to the data's geometric mean: ln A = ln A' + slope ln x0, A' being the term's size there.

    Starts are then sought among sizes that terms can have, whatever the unit of x, and A hardly depends on its
    exponent. `shifts`: coefficient -> (its exponent, ln x0); `search`: where values at the mean are sought.
    """

    def __init__(
        self, law: Law, columns: Mapping[str, np.ndarray], on: str,
        shifts: Mapping[str, tuple[str, float]], search: Mapping[str, tuple[float, float]],
    ):  # fmt: skip
        super().__init__(law, columns, on)
        names = list(law.parameters)
        for name, (exponent, shift) in shifts.items():
            self.to_units[names.index(name), names.index(exponent)] = shift
        for name, (low, high) in search.items():
            at = names.index(name)
            self.specs[at] = dataclasses.replace(self.specs[at], low=low, high=high)
        self.from_units = np.linalg.inv(self.to_units)

    def _namespace(self, coordinates: Sequence[Any]) -> Any:
        moved = []
        for row in self.to_units:
            terms = [w * c for w, c in zip(row, coordinates, strict=True) if w]
            moved.append(sum(terms[1:], terms[0]))
        return super()._namespace(moved)

    def natural(self, theta):
        return super().natural(theta @ self.to_units.T)

    def internal(self, params):
        u = np.stack([s.to_u(params[..., i]) for i, s in enumerate(self.specs)], axis=-1)
        return np.clip(u @ self.from_units.T, self.lower, self.upper)


class Distillation(Law):
    """L_S = L_T + L_T^-c0 (1 + (L_T / (L1 d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma
    (Busbridge et al. 2025, arXiv 2502.08606, eq. 8).

    L_S: cross-entropy of the distilled student, nats per token; L_T: the teacher's (`teacher_loss`); N: parameters of
    the student, D: tokens it is distilled on; L1: the loss of such a student trained without a teacher on as many
    tokens (`supervised_loss`), measured, or from a fit of supervised runs: `fit.predict(table)`. The student ends above
    its teacher, by what its own size and data leave, in a broken power of L_T: where the teacher is far better than
    the student could become (L_T below d1 L1), a still better one helps no more, and by c0 < 0 may hurt. f1: width of
    that bend.

    A^gamma, and not A, is what the data fix: read coefficients together with exponents.

    Objective: Huber, delta 1e-3, on log residuals (the text at hand does not name the source's).
    """

    name = "distillation"
    parameters = {
        "c0": free(-1, 4),
        "c1": free(-4, 10),
        "d1": positive(0.5, 2.0),
        "f1": positive(0.03, 0.5, upper=5.0),
        "A": positive(1, 1e6),
        "B": positive(1, 1e6),
        "alpha": free(0.1, 0.8, lower=0.0, upper=5.0),
        "beta": free(0.1, 0.8, lower=0.0, upper=5.0),
        "gamma": positive(0.3, 2.0),
    }
    inputs = ("params", "tokens", "teacher_loss", "supervised_loss")
    equation = "L_S = L_T + L_T^-c0 (1 + (L_T / (L1 d1))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma"
    source = "Busbridge et al. 2025 (arXiv 2502.08606)"

    def columns_of(self, columns):
        return {
            "n": np.log(columns["params"]),
            "d": np.log(columns["tokens"]),
            "teacher": np.log(columns["teacher_loss"]),
            "ratio": np.log(columns["teacher_loss"] / columns["supervised_loss"]),
        }

    def formula(self, p, x):
        log_d1, width = np.log(p.d1), p.f1
        bend = p.c1 * width * np.logaddexp(0.0, (x.ratio - log_d1) / width)
        left = np.logaddexp(np.log(p.A) - p.alpha * x.n, np.log(p.B) - p.beta * x.d)
        return np.exp(x.teacher) + np.exp(-p.c0 * x.teacher - bend + p.gamma * left)

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        shifts = {
            "A": ("alpha", np.log(columns["params"]).mean()),
            "B": ("beta", np.log(columns["tokens"]).mean()),
        }
        return AtMean(self, columns, on, shifts, {"A": (0.02, 5.0), "B": (0.02, 5.0)})


class Transfer(Law):
    """D_T = k D_F^alpha N^beta (Hernandez et al. 2021, arXiv 2102.01293).

    D_T: effective data transferred (`transferred`), how much more of the target data a model trained from scratch would
    need for the loss that the pre-trained one reaches on D_F; D_F: target data used (`tokens`, in D_T's unit); N:
    parameters without embeddings (`params`, count). Measure D_T at equal size, from the from-scratch law or by
    interpolation between runs.

    Objective: least squares on log D_T: one linear system.
    """

    name = "transfer"
    target = "transferred"
    parameters = {"k": positive(1e-6, 1e12), "alpha": free(0, 1), "beta": free(0, 1)}
    inputs = ("tokens", "params")
    equation = "D_T = k D_F^alpha N^beta"
    source = "Hernandez et al. 2021 (arXiv 2102.01293)"
    objective = LOG_SQUARES

    @property
    def allocates(self) -> bool:
        """False: D_F and N are no training run's, and D_T is no loss."""
        return False

    def formula(self, p, x):
        return np.exp(np.log(p.k) + p.alpha * np.log(x.tokens) + p.beta * np.log(x.params))


class M4(Law):
    """(L - E) / (L0 - L)^alpha = B x^-c, solved for L (Alabdulmohsin et al. 2022, arXiv 2209.06640).

    L: loss or error; x: data seen or compute (`tokens`; any size by `columns=`); E: what L tends to for endless x, L0:
    what it starts from (chance); between them a power law that bends where chance is near. One L between E and L0
    solves it. Hold L0 where chance is known: `fixed={"L0": ...}`.

    With y = (L - E) / (L0 - E): ln y - alpha ln(1 - y) = ln B - c ln x + (alpha - 1) ln(L0 - E), whose left side rises
    in the logit of y with slopes between 1 and alpha and one sense of curvature, so that Newton's method converges
    from any start.

    Objective: least squares on log L (the text at hand does not name the source's).
    """

    name = "m4"
    parameters = {
        "E": free(0.0, 10, lower=0.0),
        "L0": positive(1e-2, 20),
        "alpha": positive(0.1, 4, upper=50.0),
        "B": positive(1e-3, 1e6),
        "c": free(0.05, 1.5),
    }
    inputs = ("tokens",)
    equation = "(L - E) / (L0 - L)^alpha = B x^-c"
    source = "Alabdulmohsin et al. 2022 (arXiv 2209.06640)"
    objective = LOG_SQUARES

    def formula(self, p, x):
        span = p.L0 - p.E
        goal = np.log(p.B) - p.c * np.log(x.tokens) + (p.alpha - 1.0) * np.log(span)
        logit = solve_logit(goal, p.alpha)
        return p.E + span * np.exp(-np.logaddexp(0.0, -logit))

    def problem(self, columns: Mapping[str, np.ndarray], on: str) -> Regression:
        loss = columns[self.target]
        search = {
            "E": (0.0, loss.min()),
            "L0": (loss.max(), loss.max() * 4),
            "B": (1e-3, 1e2),
        }
        return AtMean(self, columns, on, {"B": ("c", np.log(columns["tokens"]).mean())}, search)


def solve_logit(goal: Any, alpha: Any) -> Any:
    """z with alpha ln(1 + e^z) - ln(1 + e^-z) = goal, alpha > 0; of arrays or jets."""
    aim, power = np.broadcast_arrays(value_of(goal), value_of(alpha))
    z = np.where(aim < 0, aim, aim / power)  # the asymptotes
    for _ in range(STEPS):
        above, below = np.logaddexp(0.0, z), np.logaddexp(0.0, -z)
        slope = power * np.exp(-below) + np.exp(-above)
        step = (power * above - below - aim) / slope
        z = z - step
        if not np.any(np.abs(step) > 1e-12 * (1 + np.abs(z))):
            break
    if isinstance(goal, Jet):
        for _ in range(2):  # at the solution one more step carries first derivatives, the next second derivatives
            z = z - (alpha * np.logaddexp(0.0, z) - np.logaddexp(0.0, -z) - goal) / slope
    return z
