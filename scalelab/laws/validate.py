"""Held-out extrapolation: fit without the largest compute, predict it, and compare with trivial baselines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

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
    called: str = "C"  # what `cut` is in
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
            f"hold-out: fitted to {self.fitted} runs, {self.held_out} of {self.called} >= {self.cut:.3g} predicted "
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
    law, rows = fit.law, fit.rows
    size, called = scale_of(fit)
    if cut is None:
        cut = default_cut(size)
    elif not size.min() < cut <= size.max():
        raise BadInput("cut", cut, f"must lie among the runs' {called}, above {size.min():.4g} up to {size.max():.4g}")
    fewer, test = rows.take(size < cut), rows.take(size >= cut)
    need = fit.record["free"] + 1
    inputs = {role: fewer.columns[role] for role in law.inputs}
    different = len(np.unique(np.stack(list(inputs.values())), axis=1).T) if len(fewer) else 0
    if different < need:
        why = f"{different} different runs below {called} = {cut:.3g}, {need} needed"
        return Holdout(cut, len(fewer), len(test), called=called, reason=why)
    clustered = fewer.clusters is not None and len(np.unique(fewer.clusters)) < 2
    refit = fit.refit(fewer, bootstrap=0 if clustered else min(DRAWS, fit.record["draws"]))
    if not refit.converged:
        why = "the fit to the smaller runs did not converge"
        return Holdout(cut, len(fewer), len(test), called=called, reason=why)
    measured = test.columns[law.target]
    ask = {role: test.columns[role] for role in law.inputs}
    table = pd.DataFrame({"flops" if called == "C" else "size": size[size >= cut], **ask, law.target: measured})
    table.index = test.index
    table["predicted"] = law.evaluate(refit.estimate[None], ask)[0]
    table["lower"], table["upper"] = refit.interval(law.evaluate(refit.samples, ask))
    table["nearest run"] = _nearest(inputs, fewer.columns[law.target], ask)
    power = f"power law in {called}"
    table[power] = _power_law(size[size < cut], fewer.columns[law.target], size[size >= cut])
    # relative errors; of a target that may be 0 (coverage, reward) in units of its mean
    unit = measured if (measured > 0).all() else max(float(np.abs(measured).mean()), 1e-300)
    table["error"] = (table["predicted"] - measured) / unit
    relative = table[["predicted", "nearest run", power]].sub(measured, axis=0).div(unit, axis=0)
    errors = pd.DataFrame({"mean_abs": relative.abs().mean(), "bias": relative.mean(), "worst": relative.abs().max()})
    distance = float(np.log10(size.max() / size[size < cut].max()))
    errors = errors.rename(index={"predicted": "law"})
    return Holdout(cut, len(fewer), len(test), distance, table, errors, called)


def scale_of(fit: Fit) -> tuple[np.ndarray, str]:
    """What orders runs by size, and its name: the law's own `size` or `scale`, else compute, else its first input."""
    rows, law = fit.rows, fit.law
    own = law.size(rows.columns)
    if own is not None:
        return own
    if not law.scale and rows.has_compute:
        return rows.compute, "C"
    roles = law.scale or law.inputs[:1]
    symbol = {"params": "N", "tokens": "D"}
    return np.prod([rows.columns[role] for role in roles], axis=0), " ".join(symbol.get(r, r) for r in roles)


def _nearest(inputs: dict[str, np.ndarray], loss: np.ndarray, ask: dict[str, np.ndarray]) -> np.ndarray:
    """The loss of the fitted run that is nearest in the logs of the inputs."""
    distance = np.zeros((len(next(iter(ask.values()))), len(loss)))
    for role in inputs:
        if (inputs[role] > 0).all() and (ask[role] > 0).all():
            distance += (np.log(ask[role])[:, None] - np.log(inputs[role])) ** 2
        else:
            spread = max(float(np.std(inputs[role])), 1e-300)
            distance += ((ask[role][:, None] - inputs[role]) / spread) ** 2
    return loss[np.argmin(distance, axis=1)]


def _power_law(compute: np.ndarray, loss: np.ndarray, ask: np.ndarray) -> np.ndarray:
    """ln L linear in ln C, by least squares; the mean where a target or a size is not positive."""
    if not ((loss > 0).all() and (compute > 0).all() and (ask > 0).all()):
        return np.full(len(ask), loss.mean())
    centre = np.log(compute).mean()
    degree = 1 if np.ptp(np.log(compute)) > 1e-6 else 0
    return np.exp(np.polyval(np.polyfit(np.log(compute) - centre, np.log(loss), degree), np.log(ask) - centre))
