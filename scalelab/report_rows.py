"""What the report's file and the terminal both say: rows of tables, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scalelab.laws import allocate

if TYPE_CHECKING:
    from scalelab.laws import Comparison, Fit, IsoflopFit

FURTHER = 10.0  # the report looks this far beyond the largest budget
ALLOCATED = ("C (FLOP)", "N*", "D* (tokens)", "D*/N*", "loss")
MINIMA = ("C (FLOP)", "runs", "N*", "D* (tokens)", "loss", "")
COMPARED = ("", "C (FLOP)", "compute for its loss", "loss difference", "P(better)", "verdict")


def cost_of(fit: Fit) -> Any:
    """FLOPs per token as a function of N where the fitted runs' FLOPs are known, else 6 (for C = 6 N D)."""
    return allocate.measured(fit.rows.columns, fit.law.paid)


def parabolas_of(isoflop: IsoflopFit | Mapping[str, IsoflopFit] | None) -> dict[str, IsoflopFit]:
    """Name -> parabolas, of all runs or of each family."""
    if isinstance(isoflop, Mapping):
        return {f"IsoFLOP, {family}": fit for family, fit in isoflop.items()}
    return {} if isoflop is None else {"IsoFLOP": isoflop}


def parameters(fit: Fit | IsoflopFit) -> list[tuple[str, str, str]]:
    """(name, estimate, interval) of a fit's parameters and, for laws, of the allocation exponents."""
    frame = fit.conf_int().assign(estimate=fit.params)
    law = hasattr(fit, "allocation")
    frame = pd.concat([frame, fit.allocation()]) if law else frame.loc[["a", "b"]]  # type: ignore[union-attr]
    return [
        (
            str(name),
            number(row.estimate),
            f"{number(row.lower)} to {number(row.upper)}" if np.isfinite(row.lower) else "—",
        )
        for name, row in frame.iterrows()
    ]


def optima(fit: Fit) -> list[tuple[str, ...]]:
    """What to train at the largest budget and `FURTHER` times beyond, with intervals."""
    largest = float(fit.rows.compute.max())
    rows = []
    best: Any = fit.optimal([largest, FURTHER * largest], cost_of(fit))
    for _, row in best.iterrows():
        if np.isfinite(row.params):
            shown = (
                between(row, "params"),
                between(row, "tokens"),
                f"{row.tokens / row.params:.3g}",
                between(row, "loss"),
            )
        else:
            shown = ("no interior optimum", "—", "—", "—")
        rows.append((sci(row.flops), *shown))
    return rows


def vertex_rows(isoflop: IsoflopFit) -> list[tuple[str, ...]]:
    """A row per budget: its minimum with intervals, or why it is refused."""
    rows = []
    for _, v in isoflop.vertices.iterrows():
        shown = tuple(between(v, c) for c in ("params", "tokens", "loss")) if v.used else ("—",) * 3
        rows.append((sci(v.flops), f"{v.used_runs} of {v.runs}", *shown, "" if v.used else f"refused: {v.reason}"))
    return rows


def compared(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row per arm and budget: multiplier and loss difference with intervals, verdict."""
    rows = []
    for arm in comparison.arms:
        for row in comparison.table(arm=arm).to_dict("records"):
            at = dict.fromkeys(("multiplier", "multiplier_lower", "multiplier_upper", "lower", "upper"), np.nan) | row
            cells = [f"{at['multiplier']:.3g} ×", f"{at['difference']:+.4f}"]
            for k, ends in enumerate((("multiplier_lower", "multiplier_upper"), ("lower", "upper"))):
                if not np.isnan([at[e] for e in ends]).any():
                    form = "+.4f" if k else ".3g"
                    cells[k] += f" [{at[ends[0]]:{form}}, {at[ends[1]]:{form}}]"
            chance = at.get("probability", np.nan)
            where = "" if row["inside"] else " (outside data)"
            rows.append(
                (arm, sci(row["flops"]), *cells, "—" if np.isnan(chance) else f"{chance:.3f}", row["verdict"] + where)
            )
    return rows


# ------------------------------------------------------------------------------------------------ formats


def number(value: float) -> str:
    """Four significant digits; powers of ten only where plain digits would not do."""
    if not np.isfinite(value):
        return "—"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def count(value: float) -> str:
    from scalelab.plots import human

    return human(value)


def sci(value: float) -> str:
    return f"{value:.3g}"


def between(row: Any, column: str) -> str:
    """`1.2M [1.1M, 1.4M]`, or the number alone where there is no interval."""
    show = number if column == "loss" else count
    value, low, high = (getattr(row, f"{column}{end}", float("nan")) for end in ("", "_lower", "_upper"))
    return f"{show(value)} [{show(low)}, {show(high)}]" if np.isfinite(low) else show(value)
