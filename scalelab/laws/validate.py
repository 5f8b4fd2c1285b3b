"""Held-out error: fit without the largest compute, or a group, predict it, and compare with trivial baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from scalelab.errors import BadInput
from scalelab.laws.intervals import groups
from scalelab.laws.shown import Shown, percent

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

DRAWS = 200  # bootstrap draws of the refit, for the band of its predictions
GAP = 0.18  # two runs belong to different budgets where ln C between neighbours jumps by more (about 20 %)


@dataclasses.dataclass(frozen=True)
class Holdout(Shown):
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
        rest = ", ".join(f"{name} {percent(row.mean_abs)}" for name, row in self.errors.iloc[1:].iterrows())
        return (
            f"hold-out: fitted to {self.fitted} runs, {self.held_out} of {self.called} >= {self.cut:.3g} predicted "
            f"({self.distance:.2f} decades on): mean error {percent(self.error)} "
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
    size, called = scale_of(fit)
    if cut is None:
        cut = default_cut(size)
    elif not size.min() < cut <= size.max():
        raise BadInput("cut", cut, f"must lie among the runs' {called}, above {size.min():.4g} up to {size.max():.4g}")
    below = size < cut
    counts = int(below.sum()), int((~below).sum())
    table, errors, why = _predicted(fit, below, min(DRAWS, fit.record["draws"]))
    if why:
        return Holdout(cut, *counts, called=called, reason=f"{why} below {called} = {cut:.3g}")
    distance = float(np.log10(size.max() / size[below].max()))
    return Holdout(cut, *counts, distance, table, errors, called)


def _predicted(fit: Fit, keep: np.ndarray, draws: int = 0) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """The other rows predicted by a fit to those of `keep`, each method's errors, and why there is none or ""."""
    law, rows = fit.law, fit.rows
    size, called = scale_of(fit)
    fewer, test = rows.take(keep), rows.take(~keep)
    need = fit.record["free"] + 1
    different = len(np.unique(np.stack([fewer.columns[role] for role in law.inputs]), axis=1).T) if len(fewer) else 0
    if different < need:
        return pd.DataFrame(), pd.DataFrame(), f"{different} different runs, {need} needed,"
    clustered = fewer.clusters is not None and len(np.unique(fewer.clusters)) < 2
    refit = fit.refit(fewer, bootstrap=0 if clustered else draws)
    if not refit.converged:
        return pd.DataFrame(), pd.DataFrame(), "no convergence of the fit to the runs"
    inputs = {role: fewer.columns[role] for role in law.inputs}
    ask = {role: test.columns[role] for role in law.inputs}
    measured = test.columns[law.target]
    table = pd.DataFrame({"flops" if called == "C" else "size": size[~keep], **ask, law.target: measured})
    table.index = test.index
    table["predicted"] = law.evaluate(refit.estimate[None], ask)[0]
    table["lower"], table["upper"] = refit.interval(law.evaluate(refit.samples, ask))
    table["nearest run"] = _nearest(inputs, fewer.columns[law.target], ask)
    power = f"power law in {called}"
    table[power] = _power_law(size[keep], fewer.columns[law.target], size[~keep])
    off = relative(table, law.target, power)
    table["error"] = off["law"]
    return table, pd.DataFrame({"mean_abs": off.abs().mean(), "bias": off.mean(), "worst": off.abs().max()}), ""


def relative(table: pd.DataFrame, target: str, power: str) -> Any:
    """Relative errors of the law and of both baselines; of a target that may be 0 (coverage, reward) in units of its
    mean."""
    measured: Any = table[target]
    unit = measured if (measured > 0).all() else max(float(np.abs(measured).mean()), 1e-300)
    methods: Any = table[["predicted", "nearest run", power]]
    return methods.sub(measured, axis=0).div(unit, axis=0).rename(columns={"predicted": "law"})


# ------------------------------------------------------------------------------------------------ many cuts


@dataclasses.dataclass(frozen=True)
class Expanding(Shown):
    """Hold-outs at growing cuts: each fit predicts every larger run.

    `table` has a row per prediction: the cut, the run's size and distance in decades from the largest run fitted,
    measured, predicted, and relative error of the law and the baselines. `errors` has a row per cut, `by_distance` a
    row per half decade of distance: number of predictions and mean absolute relative errors.
    """

    table: pd.DataFrame
    errors: pd.DataFrame
    by_distance: pd.DataFrame
    called: str
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason

    def summary(self) -> str:
        if not self.ok:
            return f"expanding window: none ({self.reason})"
        lines = [f"expanding window over {self.called}, mean absolute error by distance:"]
        row: Any
        for decades, row in self.by_distance.iterrows():
            rest = ", ".join(f"{name} {percent(row[name])}" for name in self.by_distance.columns[1:])
            lines.append(f"  up to {decades:g} decades ({row['predictions']:.0f} predictions): {rest}")
        return "\n".join(lines)


def expanding(fit: Fit, cuts: Sequence[float] | None = None) -> Expanding:
    """See `Fit.expanding`."""
    size, called = scale_of(fit)
    if cuts is None:
        chosen = default_cuts(size, fit.record["free"] + 1)
    else:
        chosen = sorted(float(c) for c in cuts)
        outside = [c for c in chosen if not size.min() < c <= size.max()]
        if outside or not chosen:
            limits = f"above {size.min():.4g} up to {size.max():.4g}"
            raise BadInput("cuts", outside or list(cuts), f"must lie among the runs' {called}, {limits}")
    power, parts, rows = f"power law in {called}", [], []
    methods = ["law", "nearest run", power]
    for cut in chosen:
        below = size < cut
        table, errors, why = _predicted(fit, below)
        if why:
            continue
        part = pd.DataFrame({"cut": cut, "size": size[~below], "decades": np.log10(size[~below] / size[below].max())})
        parts.append(part.set_axis(table.index).join(relative(table, fit.law.target, power)))
        rows.append({"cut": cut, "fitted": int(below.sum()), "held_out": int((~below).sum()),
                     "distance": float(np.log10(size.max() / size[below].max())), **errors["mean_abs"].to_dict(),
                     "bias": errors.loc["law", "bias"]})  # fmt: skip
    if not parts:
        empty = pd.DataFrame()
        return Expanding(empty, empty, empty, called, "no cut leaves enough different runs below it")
    table = pd.concat(parts)
    half_decades: Any = np.maximum(np.ceil(table["decades"] * 2 - 1e-9), 1) / 2
    grouped: Any = table[methods].abs().groupby(half_decades.rename("decades up to"))
    by_distance = pd.DataFrame({"predictions": grouped.size()}).join(grouped.mean())
    return Expanding(table, pd.DataFrame(rows).set_index("cut"), by_distance, called)


def default_cuts(size: Float[np.ndarray, " n"], need: int, most: int = 6) -> list[float]:
    """Where budgets begin that have `need` runs or more below them, at most six, evenly spread.

    Where runs do not fall into budgets (one would hold over half of them): at shares 0.4 to 0.9 of the runs.
    """
    label = budgets(size)
    begins = [float(size[label == g].min()) for g in range(1, int(label.max()) + 1)]
    if np.bincount(label).max() > len(size) / 2:
        begins = sorted({float(c) for c in np.quantile(size, np.linspace(0.4, 0.9, most), method="higher")})
    begins = [c for c in begins if (size < c).sum() >= need]
    if len(begins) > most:
        begins = [begins[i] for i in np.unique(np.linspace(0, len(begins) - 1, most).round().astype(int))]
    return begins


def leave_group_out(fit: Fit, group: str) -> pd.DataFrame:
    """See `Fit.leave_group_out`."""
    if group == fit.law.group:
        raise BadInput("group", group, f"{fit.law.name} has parameters for each {group}: none is known when left out")
    label, names = groups(fit, group)
    if len(names) < 2:
        raise BadInput("group", group, f"has the one value {names[0]}: nothing is left to fit")
    rows = []
    for g, name in enumerate(names):
        _, errors, why = _predicted(fit, label != g)
        row: dict[str, Any] = {group: name, "held_out": int((label == g).sum())}
        if not why:
            row |= errors["mean_abs"].to_dict() | {
                "bias": errors.loc["law", "bias"],
                "worst": errors.loc["law", "worst"],
            }
        rows.append(row | {"reason": why.rstrip(",")})
    return pd.DataFrame(rows).set_index(group)


# ------------------------------------------------------------------------------------------------ baselines


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
