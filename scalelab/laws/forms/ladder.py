"""The model ladder: accuracy on a task from parameters and tokens, by way of the loss on the task's answers."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from scalelab.errors import BadInput
from scalelab.laws.fit import Fit, Options
from scalelab.laws.forms.chinchilla import Chinchilla
from scalelab.laws.law import Law
from scalelab.laws.notices import Notice
from scalelab.laws.parameter import Parameter, free, positive
from scalelab.laws.result import provenance
from scalelab.laws.table import Rows

SOURCE = "Bhagia et al. 2024 (arXiv 2412.04403)"


class TaskLoss(Chinchilla):
    """l(N, D) = E + A / N^alpha + B / D^beta: the ladder's first step (Bhagia et al. 2024, arXiv 2412.04403).

    As Chinchilla's law, for l, a model's loss on the correct answers of a task (column task_loss; nats or bits per byte
    or character, which is then E's unit). Objective: Huber, delta = 1e-3, on log losses, as in the authors' code.
    """

    name = "task-loss"
    target = "task_loss"
    equation = "l(N, D) = E + A / N^alpha + B / D^beta"
    source = SOURCE
    published = {}


class LossToAccuracy(Law):
    """acc(l) = a / (1 + exp(-k (l - L0))) + b: the ladder's second step (Bhagia et al. 2024, arXiv 2412.04403).

    l: loss on the task's correct answers (column task_loss), acc: accuracy in (0, 1] (column accuracy). b: accuracy at
    no loss; a + b (a is negative): at high loss, where a model guesses; L0: the loss at half height; k: how sharply
    accuracy falls there. Which runs and checkpoints the rows are is yours to choose: the source takes all late ones.

    Objective: Huber, delta = 1e-3, on log accuracies, as in the authors' code.
    """

    name = "loss-to-accuracy"
    parameters = {
        "a": Parameter(-1.0, -0.05, sign=-1, lower=-1.0, upper=0.0, linear=True),
        "k": positive(0.3, 30),
        "L0": free(0.05, 4.0),
        "b": positive(0.1, 1.0, upper=1.0, linear=True),
    }
    inputs = ("task_loss",)
    target = "accuracy"
    equation = "acc(l) = a / (1 + exp(-k (l - L0))) + b"
    source = SOURCE

    def formula(self, p, x):
        return 0.5 * p.a * (1.0 + np.tanh(0.5 * p.k * (x.task_loss - p.L0))) + p.b

    def size(self, columns):
        return 1 / columns["task_loss"], "1/l"


class Ladder(Law):
    """acc(N, D) = a / (1 + exp(-k (l - L0))) + b, l = E + A / N^alpha + B / D^beta (Bhagia et al. 2024, 2412.04403).

        fit = laws.fit("ladder", runs, columns={"task_loss": "arc_bpb", "accuracy": "arc_acc"})
        fit.get_prediction(target).summary_frame()

    N: parameters (count), D: training tokens (count), l: loss on the task's correct answers (column task_loss, needed
    to fit and not to predict), acc: accuracy in (0, 1]. Two fits (`TaskLoss`, `LossToAccuracy`; in `fit.steps`), the
    second to the measured task losses. Both are refitted to the same resampled runs in each bootstrap draw, so that the
    interval of an accuracy holds the errors of both, and their correlation.

    Objective of each step: Huber, delta = 1e-3, on logarithms, as in the authors' code.
    """

    name = "ladder"
    steps: tuple[Law, Law] = (TaskLoss(), LossToAccuracy())
    parameters = {**TaskLoss.parameters, **LossToAccuracy.parameters}
    inputs = TaskLoss.inputs
    measured = LossToAccuracy.inputs
    target = LossToAccuracy.target
    equation = "acc(N, D) = a / (1 + exp(-k (l - L0))) + b, l = E + A / N^alpha + B / D^beta"
    source = SOURCE

    def formula(self, p, x):
        first, second = self.steps
        return second.formula(p, types.SimpleNamespace(task_loss=first.formula(p, x)))

    def optimum(self, params, flops, cost, **others):
        """N*, D* of the lowest task loss, which is the highest accuracy, and that accuracy."""
        N, D, task_loss = self.steps[0].optimum(params[:, :5], flops, cost)
        a, k, L0, b = (v[:, None] for v in params[:, 5:].T)
        return N, D, 0.5 * a * (1.0 + np.tanh(0.5 * k * (task_loss - L0))) + b

    def fit_rows(
        self, rows: Rows, options: Options, bootstrap: int | np.ndarray = 0, about: Mapping[str, Any] | None = None,
        near: np.ndarray | None = None,
    ) -> LadderFit:  # fmt: skip
        if options.objective.delta is None and options.objective.kind != "squares":
            raise BadInput("delta", "auto", "must be a number: the ladder's two steps have residuals of different size")
        for field in ("fixed", "tied"):
            unknown = [name for name in getattr(options, field) if name not in self.parameters]
            if unknown:
                raise BadInput(field, unknown[0], f"must be one of {', '.join(self.parameters)}")
        fits = []
        for number, law in enumerate(self.steps):
            own = options.replace(
                fixed={k: v for k, v in options.fixed.items() if k in law.parameters},
                tied={k: v for k, v in options.tied.items() if k in law.parameters},
                # the same rows in both steps, but not the same noise
                seed=options.seed + (number if options.method != "pairs" else 0),
            )
            part = None if near is None else near[[list(self.parameters).index(name) for name in law.parameters]]
            columns = {k: v for k, v in (about or {}).get("columns", {}).items() if k in (*law.inputs, law.target)}
            fits.append(law.fit_rows(rows, own, bootstrap, {"columns": columns}, near=part))
        return LadderFit(self, rows, options, (fits[0], fits[1]), about or {})


class LadderFit(Fit):
    """The two fits of a ladder as one: parameters and draws side by side, findings of both."""

    def __init__(self, law: Ladder, rows: Rows, options: Options, steps: tuple[Fit, Fit], about: Mapping[str, Any]):
        first, second = (step.record for step in steps)
        samples = np.concatenate([step.samples for step in steps], axis=1)
        record = first | {
            "law": law.name,
            "equation": law.equation,
            "source": law.source,
            "value": first["value"] + second["value"],
            "converged": first["converged"] and second["converged"],
            "iterations": max(first["iterations"], second["iterations"]),
            "agreement": min(first["agreement"], second["agreement"]),
            "agreeing": min(first["agreeing"], second["agreeing"]),
            "free": first["free"] + second["free"],
            "draws_failed": int((~np.isfinite(samples).all(1)).sum()),
            "draws_at_boundary": first["draws_at_boundary"] + second["draws_at_boundary"],
            "data_sha256": rows.digest((*law.inputs, *law.measured, law.target)),
            **provenance(),
            **about,
        }
        estimate = np.concatenate([step.estimate for step in steps])
        super().__init__(law, rows, options, estimate, samples, list(rows.notices), record)
        self.steps = steps

    @property
    def notices(self) -> list[Notice]:
        if not self._examined:
            self._examined = True
            self._notices += self._of_steps("notices")
        return self._notices

    @property
    def warnings(self) -> list[Notice]:
        if not self._studied:
            self._examined = self._studied = True
            own = [n for n in self._notices if not n.message.startswith("step ")]
            self._notices = own + self._of_steps("warnings")
        return super().warnings

    def _of_steps(self, which: str) -> list[Notice]:
        return [
            dataclasses.replace(notice, message=f"step {number} ({step.law.target}): {notice.message}")
            for number, step in enumerate(self.steps, 1)
            for notice in getattr(step, which)
            if notice not in self.rows.notices
        ]
