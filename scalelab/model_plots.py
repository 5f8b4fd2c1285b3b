"""Figures of what models can do (probes) and of how they scale (coordinate checks). Conventions as in `plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from scalelab.plots import COLOURS, GREY, MARKERS, new_axes, plain_log

if TYPE_CHECKING:
    import pandas as pd


def probe(table: pd.DataFrame, *, axis: str, trained: int, chance: float, ax: Axes | None = None) -> Axes:
    """Accuracy by size, a line for each family, with its intervals. `table` has family, size, accuracy, low, high."""
    ax = new_axes(ax)
    families = list(dict.fromkeys(table["family"]))
    for i, family in enumerate(families):
        rows: Any = table.loc[table["family"] == family].sort_values(by="size")
        spread = np.maximum(0.0, [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]])
        shift = 1.02 ** (i - (len(families) - 1) / 2)  # side by side, so that no interval hides another
        ax.errorbar(
            rows["size"] * shift, rows["accuracy"], spread, label=family, capsize=2, linewidth=1.4, markersize=5,
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
        )  # fmt: skip
    ax.axhline(chance, color=GREY, linestyle=":", linewidth=1)
    ax.axvline(trained, color=GREY, linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    sizes = sorted(set(table["size"]))
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xlabel(f"{axis} (dashed: the most in training)")
    ax.set_ylabel("accuracy (dotted: guessing)")
    ax.set_ylim(-0.02, 1.04)
    ax.legend(frameon=False)
    return ax


def coordinates(
    table: pd.DataFrame, along: str = "width", quantity: str = "change", ax: Axes | None = None, *, legend: bool = True
) -> Axes:
    """Root mean squares of a coordinate check (`bench.coords.check`) against width or depth: a colour for each
    parametrisation, a marker for each place; geometric means over the seeds, and a band from the least to the largest.
    `quantity`: size (at the start) or change (at the last step)."""
    ax = new_axes(ax)
    x = "width" if along == "width" else "layers"
    step = 0 if quantity == "size" else table["step"].max()
    part: Any = table[(table["along"] == along) & (table["step"] == step)]
    kinds, places = list(dict.fromkeys(part["parametrization"])), list(dict.fromkeys(part["place"]))
    for k, kind in enumerate(kinds):
        for p, place in enumerate(places):
            logs: Any = np.log(
                part[(part["parametrization"] == kind) & (part["place"] == place)].set_index(x)[quantity]
            )
            seeds: Any = logs.groupby(level=0)
            mean, low, high = np.exp(seeds.mean()), np.exp(seeds.min()), np.exp(seeds.max())
            # Lines that coincide stay visible: each later one is thinner and lies on top.
            width = 1.2 + 1.4 * (len(kinds) - 1 - k)
            ax.plot(mean.index, mean, color=COLOURS[k], marker=MARKERS[p], markersize=4.5, linewidth=width)
            ax.fill_between(mean.index, low, high, color=COLOURS[k], alpha=0.15, linewidth=0)
    title = "at the start" if quantity == "size" else f"change after {step} steps"
    ax.set(xscale="log", yscale="log", xlabel=along, ylabel="root mean square", title=title)
    ax.set_xticks(sorted(part[x].unique()), [str(value) for value in sorted(part[x].unique())])
    ax.xaxis.set_minor_locator(NullLocator())
    plain_log(ax, "y")
    if legend:
        for k, kind in enumerate(kinds):
            ax.plot([], [], color=COLOURS[k], linewidth=2, label=kind)
        for p, place in enumerate(places):
            ax.plot([], [], MARKERS[p], color=GREY, markersize=4.5, label=place)
        ax.legend(fontsize="small", frameon=False, ncols=2)
    return ax
