"""Which form to believe: several laws fitted to the same runs, ranked by their error on larger runs.

In-sample every added parameter helps; only held-out error at larger scale tells forms apart, and only down to the seed
noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.noise import SeedNoise, seed_noise, unknown
from scalelab.laws.notices import Notice
from scalelab.laws.objective import robust_scale
from scalelab.laws.shown import Shown, percent
from scalelab.laws.validate import scale_of

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit
    from scalelab.laws.law import Law
    from scalelab.laws.table import Table


@dataclasses.dataclass(frozen=True)
class Ranking(Shown):
    """Forms and baselines, the smallest held-out error first.

    `table`: free parameters, in-sample and held-out mean absolute relative error, bias, error over an expanding window,
    and `verdict`: "best", "tied" (the difference from the best is within two standard errors that noise alone gives
    it), "worse", or why there is no score. `floor` is the held-out error of a perfect law. `fits` are the fits.
    """

    table: pd.DataFrame
    fits: dict[str, Fit]
    noise: SeedNoise
    floor: float
    held_out: int
    cut: float
    called: str
    warnings: list[Notice]

    @property
    def best(self) -> Fit:
        """The fit of the form with the smallest held-out error."""
        return self.fits[next(str(name) for name in self.table.index if name in self.fits)]

    def plot(self, ax: Any = None) -> Any:
        """Held-out and in-sample errors with the noise floor; takes and returns a matplotlib `ax`."""
        from scalelab import study_plots

        return study_plots.ranking(self, ax)

    def summary(self) -> str:
        lines = [
            f"{self.held_out} runs of {self.called} >= {self.cut:.3g} predicted; "
            f"a perfect law would err by {self.floor:.2%} (seed noise {self.noise})",
            self.table.to_string(float_format=percent, na_rep=""),
        ]
        return "\n".join([*lines, *map(str, self.warnings)])


def rank(
    table: Table, forms: Sequence[str | Law], *, cut: float | None = None, known: Mapping[str, Any], **options: Any
) -> Ranking:
    """See `laws.rank`. `known`: name -> law."""
    if not forms:
        raise BadInput("forms", list(forms), "name at least one law")
    fits: dict[str, Fit] = {}
    given: dict[str, Any] = {"bootstrap": 0} | options
    for form in forms:
        if isinstance(form, str) and form not in known:
            raise BadInput("forms", form, f"must be among {', '.join(sorted(known))}, or a law")
        law = known[form]() if isinstance(form, str) else form
        if law.name in fits:
            raise BadInput("forms", law.name, "is named twice")
        fits[law.name] = law.fit(table, **given)
    first = next(iter(fits.values()))
    for name, fit in fits.items():
        if fit.law.target != first.law.target or not np.array_equal(fit.rows.index, first.rows.index):
            raise BadInput("forms", name, f"must predict the same target of the same rows as {first.law.name}")
        if scale_of(fit)[1] != scale_of(first)[1]:
            raise BadInput(
                "forms", name, f"orders runs by {scale_of(fit)[1]}, {first.law.name} by {scale_of(first)[1]}"
            )
    if cut is None:
        cut = first.holdout().cut
    held = {name: fit.holdout(cut) for name, fit in fits.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, fit in fits.items():
        h, window = held[name], fit.expanding()
        across: Any = window.errors
        inside = float(np.mean(np.abs(fit.fittedvalues.to_numpy() / fit.observed - 1)))
        rows[name] = {"parameters": fit.record["free"], "inside": inside, "held_out": h.error,
                      "bias": h.errors.loc["law", "bias"] if h.ok else np.nan,
                      "expanding": float(across["law"].mean()) if window.ok else np.nan,
                      "verdict": "" if h.ok else h.reason}  # fmt: skip
    scored = [h for h in held.values() if h.ok]
    if scored:
        for name, row in scored[0].errors.iloc[1:].iterrows():
            rows[str(name)] = {"held_out": row["mean_abs"], "bias": row["bias"], "verdict": "baseline"}
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_values("held_out", kind="stable")

    noise = seed_noise(first.rows, max((f.law.inputs for f in fits.values()), key=len), first.law.target)
    notices = []
    if noise.known:
        scatter = noise.relative
    else:
        scatter = min(robust_scale(fit.resid.to_numpy() / _unit(fit)) for fit in fits.values())
        notices.append(unknown(scatter))
    count = len(scored[0].table) if scored else 0
    # of a mean of |normal| over the held-out runs; two forms see the same noise, which makes their difference smaller
    error = scatter * float(np.sqrt((1 - 2 / np.pi) / max(1, count)))
    mine = frame.index.isin(list(fits)) & frame["held_out"].notna().to_numpy()
    lowest = frame.loc[mine, "held_out"].min()
    verdict = np.where(frame["held_out"] - lowest <= 2 * error, "tied", "worse")
    verdict = np.where(frame["held_out"] == lowest, "best", verdict)
    frame.loc[mine, "verdict"] = verdict[mine]
    frame["parameters"] = frame["parameters"].astype("Int64")
    floor = scatter * float(np.sqrt(2 / np.pi))
    return Ranking(frame, fits, noise, floor, count, float(cut), scale_of(first)[1], notices)


def _unit(fit: Fit) -> np.ndarray | float:
    """What residuals are divided by to be relative to the target."""
    return 1.0 if fit.options.objective.on == "log" else np.abs(fit.observed)
