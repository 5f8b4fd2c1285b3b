"""Comparison: what comes back from `laws.compare`. Tables, text, figures, a file; the fits stay with the caller."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws.contrast import NO_VERDICT
from scalelab.laws.notices import Notice
from scalelab.laws.result import SCHEMA, jsonable
from scalelab.laws.shown import Notices, Shown, worst_first
from scalelab.paths import save

AT = ("compute", "params", "tokens", "seconds")


class Comparison(Shown):
    """Arms against a reference, see `laws.compare`.

    `contrasts` has a row per (arm, what is equal, C); `curves` an arm's compute-optimal N, D and loss at each C;
    `crossings` a row per arm. `record` says how the numbers came about.
    """

    kind = "comparison"

    def __init__(
        self,
        contrasts: pd.DataFrame,
        curves: pd.DataFrame,
        crossings: pd.DataFrame,
        notices: list[Notice],
        record: dict[str, Any],
    ):
        self.contrasts, self.curves, self.crossings = contrasts, curves, crossings
        self._notices, self.record = list(notices), record

    @property
    def reference(self) -> str:
        return self.record["arms"][0]

    @property
    def arms(self) -> list[str]:
        """The arms that are held against the reference."""
        return self.record["arms"][1:]

    @property
    def warnings(self) -> Notices:
        """Findings, worst first."""
        return worst_first(self._notices)

    @property
    def ok(self) -> bool:
        """No finding of severity `error`."""
        return not any(n.severity == "error" for n in self._notices)

    def table(self, at: str = "compute", arm: str | None = None) -> pd.DataFrame:
        """A row per budget: loss difference, interval, probability that the arm is better, verdict.

        at: what is equal: "compute" (with the multiplier), "params", "tokens", or "seconds" where it was recorded.
        """
        if at not in AT:
            raise BadInput("at", at, f"must be one of {', '.join(AT)}")
        chosen: Any = self.contrasts[self.contrasts["at"] == at]
        if chosen.empty:
            raise BadInput("at", at, "was not recorded for all arms: compare tables that have the column")
        if arm is not None:
            if arm not in self.arms:
                raise BadInput("arm", arm, f"must be one of {', '.join(self.arms)}")
            chosen = chosen[chosen["arm"] == arm]
        return chosen.drop(columns="at").dropna(axis=1, how="all").reset_index(drop=True)

    # ---------------------------------------------------------------------------------------- text

    def summary(self) -> str:
        """Per arm: multipliers and verdicts over the budgets, the crossing, and the findings."""
        r = self.record
        level = f"{100 * r['level']:g} %"
        lines = [
            f"{' and '.join(self.arms)} against {self.reference}: {r['laws']}",
            f"{r['draws']} draws, {r['drawn']}; intervals: {level}; "
            "a verdict where that of the loss difference excludes 0",
        ]
        for arm in self.arms:
            table = self.table(arm=arm)
            lines += ["", f"{arm}: compute needed for the optimal loss of {self.reference}, and the loss difference"]
            lines.append(
                f"{'C':>10} {'multiplier':>10} {'interval':>19} {'difference':>10} {'interval':>21}  P(better)"
            )
            for row in table.to_dict("records"):
                at = lambda name, row=row: row.get(name, np.nan)  # noqa: E731  columns of NaN are left out
                lines.append(
                    f"{row['flops']:10.3g} {at('multiplier'):10.3g} "
                    f"{_interval(at('multiplier_lower'), at('multiplier_upper'), '.3g'):>19} {at('difference'):+10.4f} "
                    f"{_interval(at('lower'), at('upper'), '+.4f'):>21} {at('probability'):10.3f}  {row['verdict']}"
                    f"{'' if row['inside'] else ' (outside the data)'}"
                )
            lines.append(self.crossing_line(arm))
        return "\n".join([*lines, "", str(self.warnings)])

    def crossing_line(self, arm: str) -> str:
        """Where an arm crosses the reference, in words."""
        row = self.crossings.loc[arm]
        chance = "" if np.isnan(row.probability_inside) else f"; P(within the data) = {row.probability_inside:.3f}"
        if np.isnan(row.flops):
            return f"no crossing{chance}"
        interval = "" if np.isnan(row.lower) else f" {_interval(row.lower, row.upper, '.3g')}"
        return f"crossing at C = {row.flops:.3g}{interval}, {row.better_above} better above it{chance}"

    def __repr__(self) -> str:
        codes = sorted({n.code for n in self._notices})
        warned = f" warnings: {', '.join(codes)}" if codes else ""
        return f"<Comparison of {', '.join(self.arms)} against {self.reference}{warned}>"

    @property
    def plot(self) -> ComparisonPlot:
        """Figures: each method takes and returns a matplotlib `ax`."""
        return ComparisonPlot(self)

    # ---------------------------------------------------------------------------------------- disk

    def document(self) -> dict[str, Any]:
        frames = {name: getattr(self, name) for name in ("contrasts", "curves")}
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            **{name: frame.to_dict("list") for name, frame in frames.items()},
            "crossings": self.crossings.reset_index().to_dict("list"),
            "warnings": [vars(n) for n in self._notices],
            "record": self.record,
        }

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the comparison as JSON, atomically; `laws.load` gives it back."""
        return save(path, json.dumps(jsonable(self.document()), allow_nan=False, indent=1) + "\n")

    @classmethod
    def restore(cls, document: dict[str, Any]) -> Comparison:
        """From its `document`, read from a file."""
        frames = []
        for name in ("contrasts", "curves", "crossings"):
            stored = document[name]
            frames.append(pd.DataFrame({c: v if c in LABELS else np.array(v, dtype=float) for c, v in stored.items()}))
        frames[0]["inside"] = frames[0]["inside"].astype(bool)
        notices = [Notice.restore(n) for n in document["warnings"]]
        return cls(frames[0], frames[1], frames[2].set_index("arm"), notices, document["record"])


LABELS = ("arm", "at", "verdict", "better_above")


def _interval(lower: float, upper: float, form: str) -> str:
    return "" if np.isnan(lower) or np.isnan(upper) else f"[{lower:{form}}, {upper:{form}}]"


class ComparisonPlot:
    """`comparison.plot.multiplier(ax)` and so on; matplotlib is imported on the first call."""

    def __init__(self, comparison: Comparison):
        self._of = comparison

    def multiplier(self, ax: Any = None) -> Any:
        """The compute multiplier of each arm against C, with bands, which leave the picture where an interval has no
        end; filled points where there is a verdict. Dotted: the crossing; the thick line is its interval."""
        from scalelab import plots

        ax = self._bands(ax, "multiplier", "multiplier_lower", "multiplier_upper", 1.0)
        ax.set(yscale="log", ylabel=f"compute for the loss\nof {self._of.reference} (× C)")
        plots.plain_log(ax, "y")
        return ax

    def difference(self, ax: Any = None) -> Any:
        """The loss difference at equal compute against C, in the same way."""
        ax = self._bands(ax, "difference", "lower", "upper", 0.0)
        ax.set(ylabel=f"optimal loss minus\nthat of {self._of.reference}")
        return ax

    def _bands(self, ax: Any, value: str, lower: str, upper: str, level: float) -> Any:
        from scalelab import plots

        ax = plots.new_axes(ax)
        low, high = self._of.record["inside"] or (np.nan, np.nan)
        shown = self._of.table().reindex(columns=[value, lower, upper]).to_numpy(float)
        shown = shown[np.isfinite(shown) & (shown > 0)] if level else shown
        edges = (shown.min() / 2, shown.max() * 2) if level and shown.size else (np.nan, np.nan)
        for i, arm in enumerate(self._of.arms):
            table: Any = self._of.table(arm=arm).reindex(columns=["flops", "verdict", value, lower, upper])
            colour = plots.COLOURS[i % len(plots.COLOURS)]
            finite = table[[value, lower, upper]].replace([np.inf, -np.inf, 0.0] if level else [], np.nan)
            ax.plot(table["flops"], finite[value], color=colour, linewidth=1.6, label=arm)
            if level:  # ends of multipliers at infinity or nothing: beyond the edge of the picture
                table = table.replace({lower: {0.0: edges[0]}, upper: {np.inf: edges[1]}})
            ax.fill_between(table["flops"], table[lower], table[upper], color=colour, alpha=0.18, linewidth=0)
            sure = (table["verdict"] != NO_VERDICT).to_numpy()
            ax.plot(table["flops"][sure], finite[value][sure], "o", color=colour, markersize=5)
            ax.plot(
                table["flops"][~sure], finite[value][~sure], "o", color=colour, markersize=5, markerfacecolor="white"
            )
            crossing = self._of.crossings.loc[arm]
            first, last = table["flops"].min(), table["flops"].max()
            if np.isfinite(crossing.flops) and first <= crossing.flops <= last:
                ax.axvline(crossing.flops, color=colour, linewidth=0.9, linestyle=":")
                ends = np.clip([crossing.lower, crossing.upper], first, last)  # NaN without draws
                ax.plot(ends, [level, level], color=colour, linewidth=3.5, alpha=0.7, solid_capstyle="butt")
        ax.axhline(level, color="black", linewidth=0.8)
        ax.set(xscale="log", xlabel="training compute C (FLOP)")
        left, right = ax.get_xlim()
        if low > left:
            ax.axvspan(left, low, color="#999999", alpha=0.12, linewidth=0)
        if high < right:
            ax.axvspan(high, right, color="#999999", alpha=0.12, linewidth=0)
        ax.set_xlim(left, right)
        if np.isfinite(edges[0]):
            ax.set_ylim(*edges)
        title = f"bands: {100 * self._of.record['level']:g} % intervals\nhollow: no verdict; grey: outside the data"
        ax.set_title(title, fontsize="small", color=plots.GREY)
        plots.power_log(ax, "x")
        ax.legend(fontsize="small", frameon=False)
        return ax
