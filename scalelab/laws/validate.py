"""Held-out extrapolation: fit without the largest compute, predict it, and compare with trivial baselines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput

if TYPE_CHECKING:
    from scalelab.laws.law import Fit

DRAWS = 200  # bootstrap draws of the refit, for the band of its predictions
GAP = 0.18  # two runs belong to different budgets where ln C between neighbours jumps by more (about 20 %)


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The runs of at least `cut` FLOPs, predicted by a fit to the others.

    `table` has a row per held-out run: its inputs, measured and predicted loss, 95 % band of the law, relative error,
    and the two baselines. `errors` has a row per method (law, nearest run, power law in C): mean absolute and signed
    relative error, and the largest. `distance` is in decades of compute, from the largest run fitted to the largest
    predicted. Where nothing could be held out, `reason` says why and the rest is empty.
    """

    cut: float
    fitted: int
    held_out: int
    distance: float = float("nan")
    table: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    errors: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def error(self) -> float:
        """Mean absolute relative error of the law on the held-out runs."""
        return float(self.errors.loc["law", "mean_abs"]) if self.ok else float("nan")

    def summary(self) -> str:
        if not self.ok:
            return f"hold-out: none ({self.reason})"
        rest = ", ".join(f"{name} {row.mean_abs:.2%}" for name, row in self.errors.iloc[1:].iterrows())
        return (
            f"hold-out: fitted to {self.fitted} runs, {self.held_out} of C >= {self.cut:.3g} predicted "
            f"({self.distance:.2f} decades on): mean error {self.error:.2%} "
            f"(bias {self.errors.loc['law', 'bias']:+.2%}); {rest}"
        )


def budgets(flops: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number the budgets, smallest first: runs whose compute differs by less than about 20 % share one."""
    order = np.argsort(flops, kind="stable")
    label = np.empty(len(flops), int)
    label[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(flops[order])) > GAP)])
    return label


def default_cut(flops: Float[np.ndarray, " n"]) -> float:
    """Where the largest budget begins; the largest few, where one holds under a tenth of the runs.

    Without clear budgets, or where that would take over half of the runs: the compute of the top fifth.
    """
    label, n = budgets(flops), len(flops)
    for first in range(label.max(), 0, -1):
        top = flops[label >= first]
        if len(top) > n / 2:
            break
        if len(top) >= max(2, n / 10):
            return float(top.min())
    return float(np.sort(flops)[-max(1, n // 5)])


def holdout(fit: Fit, cut: float | None = None) -> Holdout:
    """See `Fit.holdout`."""
    compute = fit.rows.compute
    if cut is None:
        cut = default_cut(compute)
    elif not compute.min() < cut <= compute.max():
        raise BadInput(
            "cut", cut, f"must lie among the runs' compute, above {compute.min():.4g} up to {compute.max():.4g}"
        )
    train, test = fit.rows.take(compute < cut), fit.rows.take(compute >= cut)
    need = len(fit.law.parameters) + 1
    inputs = {role: train.columns[role] for role in fit.law.inputs}
    different = len(np.unique(np.stack(list(inputs.values())), axis=1).T) if len(train) else 0
    if different < need:
        why = f"{different} different runs below C = {cut:.3g}, {need} needed"
        return Holdout(cut, len(train), len(test), reason=why)

    refit = fit.law.fit(
        {**inputs, "loss": train.columns["loss"], "replicate": np.arange(len(train)), "weight": train.weights}
        | ({} if train.clusters is None else {"cluster": train.clusters}),
        columns={"seed": "replicate"},  # duplicates were settled by the first fit
        weights="weight",
        cluster=None if train.clusters is None or len(np.unique(train.clusters)) < 2 else "cluster",
        bootstrap=min(DRAWS, fit.record["draws"]),
        seed=fit.record["seed"],
        delta=fit.record["delta"],
    )
    if not refit.converged:
        return Holdout(cut, len(train), len(test), reason="the fit to the smaller runs did not converge")
    measured = test.columns["loss"]
    ask = {role: test.columns[role] for role in fit.law.inputs}
    table = pd.DataFrame({"flops": test.compute, **ask, "loss": measured}, index=test.index)
    table["predicted"] = fit.law.evaluate(refit.estimate[None], ask)[0]
    table["lower"], table["upper"] = refit.interval(fit.law.evaluate(refit.samples, ask))
    table["nearest run"] = _nearest(inputs, train.columns["loss"], ask)
    table["power law in C"] = _power_law(train.compute, train.columns["loss"], test.compute)
    table["error"] = table["predicted"] / measured - 1
    relative = table[["predicted", "nearest run", "power law in C"]].div(measured, axis=0) - 1
    errors = pd.DataFrame({"mean_abs": relative.abs().mean(), "bias": relative.mean(), "worst": relative.abs().max()})
    distance = float(np.log10(test.compute.max() / train.compute.max()))
    return Holdout(cut, len(train), len(test), distance, table, errors.rename(index={"predicted": "law"}))


def _nearest(inputs: dict[str, np.ndarray], loss: np.ndarray, ask: dict[str, np.ndarray]) -> np.ndarray:
    """The loss of the fitted run that is nearest in the logs of the inputs."""
    distance = sum((np.log(ask[role])[:, None] - np.log(inputs[role])) ** 2 for role in inputs)
    return loss[np.argmin(distance, axis=1)]


def _power_law(compute: np.ndarray, loss: np.ndarray, ask: np.ndarray) -> np.ndarray:
    """ln L linear in ln C, by least squares."""
    centre = np.log(compute).mean()
    degree = 1 if np.ptp(np.log(compute)) > 1e-6 else 0
    return np.exp(np.polyval(np.polyfit(np.log(compute) - centre, np.log(loss), degree), np.log(ask) - centre))
