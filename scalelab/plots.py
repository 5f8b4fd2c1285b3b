"""Figures for notebooks and the report. Each function draws into `ax` (or a new figure) and returns it.

Stands on matplotlib alone, outside IPython without pyplot: no global state, no window, no figure that outlives its
variable. Colours are Okabe and Ito's, which the colour-blind can tell apart; quantities are shades of viridis.
"""

from __future__ import annotations

import io
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from scalelab.paths import save as save_file

if TYPE_CHECKING:
    import pandas as pd

    from scalelab.laws import EnvelopeFit, Fit, IsoflopFit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"


SIZE = (4.125, 3.0)  # inches: printed at half a page's width, 3.3, matplotlib's 10 points are 8


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of its own; under IPython one of pyplot's, because a notebook shows those and no others."""
    ipython: Any = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return Figure(figsize=size, layout="constrained")
    from matplotlib import pyplot

    return pyplot.figure(figsize=size, layout="constrained")


def new_axes(ax: Axes | None = None, size: tuple[float, float] = SIZE) -> Axes:
    """The axes given, or those of a new figure, in the house style."""
    if ax is None:
        ax = new_figure(size).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def save(ax: Axes, path: str | os.PathLike[str], field: str = "path") -> pathlib.Path:
    """The figure that an axes is in, as the file's suffix says (.png, .svg, .pdf), whole or not at all."""
    figure: Any = ax.figure
    out = io.BytesIO()
    figure.savefig(out, format=pathlib.Path(path).suffix.removeprefix("."), dpi=200)
    return save_file(path, out.getvalue(), field)


def human(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """3.2e15 -> 3.2×10^15, for matplotlib."""
    power = int(np.floor(np.log10(value) + 1e-9))
    first = f"{value / 10**power:.2g}"
    return rf"$10^{{{power}}}$" if first == "1" else rf"${first}\times10^{{{power}}}$"


def loss_curves(curves: pd.DataFrame, table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Held-out loss against training FLOPs, a line per run, shaded by its parameter count.

    `curves` has id, flops, loss; `table` has id, params and, where known, loss_se. Runs that did not finish are dashed.
    """
    ax = new_axes(ax)
    sizes: Any = table.set_index("id")["params"]
    status: Any = table.set_index("id")["status"] if "status" in table else None
    shade = _shades(sizes[sizes > 0])
    run: Any
    for name, run in curves.groupby("id", sort=False):
        run = run[(run["flops"] > 0) & np.isfinite(run["loss"])].sort_values("flops")
        if run.empty or name not in sizes.index:
            continue
        done = status is None or status[name] == "done"
        colour = shade.to_rgba(sizes[name])
        ax.plot(run["flops"], run["loss"], color=colour, linewidth=1.3, linestyle="-" if done else ":")
        ax.plot(run["flops"].iloc[-1], run["loss"].iloc[-1], "o", color=colour, markersize=4)
    ax.set(xscale="log", yscale="log", xlabel="training compute (FLOP)", ylabel="held-out loss (nats per token)")
    plain_log(ax, "y")
    power_log(ax, "x")
    _common_error(table, ax)
    bar = ax.figure.colorbar(shade, ax=ax, pad=0.02)
    bar.set_label("parameters N")
    human_log(bar.ax, "y")
    return ax


def isoflop(table: pd.DataFrame, fit: IsoflopFit, ax: Axes | None = None) -> Axes:
    """Loss against N, a parabola per budget with its minimum and 95 % interval; refused ones are dashed."""
    ax = new_axes(ax)
    runs, vertices = _done(table), fit.vertices
    flops = runs["flops"] if "flops" in runs else 6 * runs["params"] * runs["tokens"]
    centres = np.log(vertices["flops"].to_numpy())
    nearest = np.abs(np.log(flops.to_numpy())[:, None] - centres).argmin(1)
    for g, vertex in vertices.iterrows():
        i = int(g)  # type: ignore[arg-type]
        colour, marker = _colour(i, len(vertices)), MARKERS[i % len(MARKERS)]
        mine = runs[nearest == i]
        label = f"C = {scientific(vertex.flops)}" + ("" if vertex.used else ", refused")
        ax.plot(mine["params"], mine["loss"], marker, color=colour, markersize=5, label=label)
        if curve := fit.curves[i]:
            centre, c2, c1, c0 = curve
            x = np.linspace(np.log(vertex.lowest_params), np.log(vertex.highest_params), 100)
            y = np.polyval([c2, c1, c0], x - centre)
            ax.plot(np.exp(x), y, color=colour, linewidth=1.3, linestyle="-" if vertex.used else "--")
        if vertex.used:
            ends = [[vertex.params - vertex.params_lower], [vertex.params_upper - vertex.params]]
            known = np.isfinite(ends).all()
            ax.errorbar(
                [vertex.params],
                [vertex.loss],
                xerr=np.maximum(ends, 0) if known else None,
                fmt="*",
                color=colour,
                markersize=13,
                markeredgecolor="black",
                markeredgewidth=0.7,
                ecolor="black",
                capsize=4,
                zorder=5,
            )
    ax.set(xscale="log", xlabel="parameters N", ylabel="held-out loss (nats per token)")
    human_log(ax, "x")
    _common_error(runs, ax)
    said = "★ minimum, 95 % interval"
    ax.set_title(f"{ax.get_title()}\n{said}" if ax.get_title() else said, fontsize="small", color=GREY)
    legend_above(ax, 3 if vertices["used"].to_numpy().all() else 2)  # "refused" takes room
    return ax


def surface(
    fit: Fit, table: pd.DataFrame | None = None, ax: Axes | None = None, flops_per_param_token: Any = 6.0
) -> Axes:
    """Contours of the fitted loss over N and D, the runs, and the compute-optimal frontier with its 95 % band."""
    ax = new_axes(ax)
    rows = fit.rows.columns
    runs = {k: rows[k] for k in ("params", "tokens", "loss")} if table is None else _done(table)
    N, D, loss = (np.asarray(runs[k], dtype=float) for k in ("params", "tokens", "loss"))
    x = np.geomspace(N.min() / 1.5, N.max() * 1.5, 80)
    y = np.geomspace(D.min() / 1.5, D.max() * 1.5, 80)
    grid = dict(zip(fit.law.inputs, (a.ravel() for a in np.meshgrid(x, y)), strict=True))
    z = fit.law.evaluate(fit.estimate[None], grid)[0].reshape(len(y), len(x))
    low, high = min(loss.min(), z.min()), max(loss.max(), np.quantile(z, 0.98))
    lines = ax.contour(x, y, z, levels=np.geomspace(low, high, 14), cmap="viridis_r", norm=LogNorm(low, high))
    ax.clabel(lines, fmt="%.3g", fontsize="x-small")
    ax.scatter(
        N,
        D,
        c=loss,
        cmap="viridis_r",
        norm=LogNorm(low, high),
        s=34 if len(N) < 60 else 14,
        edgecolors="black",
        linewidths=0.6 if len(N) < 60 else 0.4,
        zorder=4,
    )
    compute = fit.rows.compute
    budgets = np.geomspace(compute.min() / 3, compute.max() * 3, 20)
    best: Any = fit.optima(budgets, flops_per_param_token)
    ax.plot(best["params"], best["tokens"], color=COLOURS[1], linewidth=2, label="compute-optimal", zorder=3)
    if best["params_lower"].notna().all():
        edge_n = np.concatenate([best["params_lower"], best["params_upper"][::-1]])
        edge_d = np.concatenate([best["tokens_upper"], best["tokens_lower"][::-1]])
        ax.fill(edge_n, edge_d, color=COLOURS[1], alpha=0.2, linewidth=0, label="95 % interval", zorder=2)
    ax.set(xscale="log", yscale="log", xlim=x[[0, -1]], ylim=y[[0, -1]])
    ax.set(xlabel="parameters N", ylabel="training tokens D")
    human_log(ax, "x")
    human_log(ax, "y")
    ax.legend(fontsize="small", loc="upper left", framealpha=0.9)
    ax.set_title("points: measured loss; lines: fitted loss (same shades)", fontsize="small", color=GREY)
    return ax


def measured(fit: Fit, ax: Axes | None = None) -> Axes:
    """Measured minus fitted loss, in per cent, against N; the bars are the law's own 95 % interval at each run.

    A law of other things shows its target against its first input.
    """
    ax = new_axes(ax)
    rows, target = fit.rows.columns, fit.law.target
    role = "params" if "params" in fit.law.inputs else fit.law.inputs[0]
    fitted = fit.fittedvalues.to_numpy()
    low, high = fit.interval(fit.law.evaluate(fit.samples, rows))
    excess = 100 * (rows[target] / fitted - 1)
    if np.isfinite(low).all():
        ax.vlines(rows[role], 100 * (low / fitted - 1), 100 * (high / fitted - 1), color=GREY, alpha=0.35, lw=4)
    shade = _shades(fit.rows.compute) if fit.rows.has_compute else None
    colours: Any = COLOURS[0] if shade is None else shade.to_rgba(fit.rows.compute)
    ax.scatter(rows[role], excess, color=colours, edgecolors="black", lw=0.5, s=24, zorder=3)
    ax.axhline(0, color="black", linewidth=0.8)
    name = "parameters N" if role == "params" else role
    ax.set(xscale="log", xlabel=name, ylabel=f"measured above fitted {target} (%)")
    human_log(ax, "x")
    if shade is not None:
        ax.figure.colorbar(shade, ax=ax, pad=0.02).set_label("compute C (FLOP)")
    ax.set_title("grey bars: 95 % interval of the fitted law", fontsize="small", color=GREY)
    return ax


def allocation(
    fits: Mapping[str, Fit | IsoflopFit | EnvelopeFit],
    flops: Sequence[float],
    ax: Sequence[Axes] | None = None,
    flops_per_param_token: Any = 6.0,
) -> Sequence[Axes]:
    """N* and D* against C from `flops[0]` to `flops[-1]`, each fit a line with its 95 % band; IsoFLOP minima as points.

    Draws into two axes. `flops_per_param_token`: one for all fits, or name -> its own. Beyond the largest budget
    measured the background is shaded: extrapolation.
    """
    if ax is None:
        ax = list(new_figure((9.0, 3.9)).subplots(1, 2))
    for a in ax:
        new_axes(a)
    C = np.geomspace(min(flops), max(flops), 25)
    largest = 0.0
    for i, (name, fit) in enumerate(fits.items()):
        colour = COLOURS[i % len(COLOURS)]
        parabolas, direct = hasattr(fit, "vertices"), hasattr(fit, "optima")
        cost: Any = flops_per_param_token
        if isinstance(cost, Mapping):
            cost = cost.get(name, 6.0)
        best: Any = fit.optima(C, cost) if direct else fit.optimal(C)  # type: ignore[union-attr]
        for a, column in zip(ax, ("params", "tokens"), strict=True):
            if best[column].notna().any():
                a.plot(C, best[column], color=colour, linewidth=1.8, linestyle="-" if direct else "--", label=name)
                a.fill_between(
                    C, best[f"{column}_lower"], best[f"{column}_upper"], color=colour, alpha=0.18, linewidth=0
                )
            if parabolas:
                v = fit.vertices[fit.vertices["used"]]  # type: ignore[union-attr]
                ends = np.stack([v[column] - v[f"{column}_lower"], v[f"{column}_upper"] - v[column]])
                a.errorbar(
                    v["flops"],
                    v[column],
                    yerr=np.maximum(ends, 0) if np.isfinite(ends).all() else None,
                    fmt="*",
                    color=colour,
                    markersize=11,
                    markeredgecolor="black",
                    markeredgewidth=0.6,
                    ecolor="black",
                    elinewidth=1,
                    capsize=3,
                    zorder=5,
                    label="parabola minima",
                )
                largest = max(largest, float(fit.vertices["flops"].max()))  # type: ignore[union-attr]
            elif direct:
                largest = max(largest, float(fit.rows.compute.max()))  # type: ignore[union-attr]
            else:
                largest = max(largest, float(fit.envelope["flops"].max()))  # type: ignore[union-attr]
    for a, what in zip(ax, ("optimal parameters N*", "optimal tokens D*"), strict=True):
        if 0 < largest < C[-1]:
            a.axvspan(largest, C[-1], color="#999999", alpha=0.12, linewidth=0)
            a.text(largest, 0.02, " beyond the data", transform=a.get_xaxis_transform(), fontsize="small", color=GREY)
        a.set(xscale="log", yscale="log", xlim=(C[0], C[-1]), xlabel="training compute C (FLOP)", ylabel=what)
        human_log(a, "y")
        power_log(a, "x")
    ax[0].legend(
        fontsize="small", loc="upper left", title="bands: 95 % intervals", title_fontsize="small", frameon=False
    )
    return ax


def holdout(fit: Fit, ax: Axes | None = None) -> Axes:
    """The held-out runs: predicted against measured loss, the law with its 95 % band, and the trivial baselines."""
    ax = new_axes(ax)
    held = fit.holdout()
    if not held.ok:
        ax.text(0.5, 0.5, f"no hold-out: {held.reason}", ha="center", transform=ax.transAxes, wrap=True)
        ax.set_axis_off()
        return ax
    t, target = held.table, fit.law.target
    baselines = list(held.errors.index[1:])
    for name, colour, marker in zip(baselines, (COLOURS[4], COLOURS[2]), "^s", strict=True):
        label = f"{name}: {held.errors.loc[name, 'mean_abs']:.2%} off"
        ax.plot(t[target], t[name], marker, color=colour, markersize=6, alpha=0.8, label=label)
    ends = np.stack([t["predicted"] - t["lower"], t["upper"] - t["predicted"]])
    ax.errorbar(
        t[target],
        t["predicted"],
        yerr=np.maximum(ends, 0) if np.isfinite(ends).all() else None,
        fmt="o",
        color=COLOURS[0],
        capsize=3,
        label=f"{fit.law.name}: {held.error:.2%} off",
        zorder=4,
    )
    values = t[[target, "predicted", *baselines]].to_numpy()
    span = np.array([values.min(), values.max()])
    ax.plot(span, span, color="black", linewidth=0.8, label="perfect")
    ax.set(xlabel=f"measured {target}", ylabel=f"predicted {target}")
    ax.set_title(
        f"fitted to {held.fitted} runs, {held.held_out} predicted, {held.distance:.1f} decades of {held.called} on",
        fontsize="small",
        color=GREY,
    )
    legend_above(ax, 2)
    return ax


# ------------------------------------------------------------------------------------------------ helpers


def legend_above(ax: Axes, columns: int) -> None:
    """Between title and axes, in rows of so many: it covers no data."""
    said = ax.get_title()
    rows = -(-len(ax.get_legend_handles_labels()[0]) // columns)
    ax.set_title(said, fontsize="small", color=GREY, pad=4 + 14 * rows)
    ax.legend(
        fontsize="small", frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 0.985),
        borderpad=0.1, columnspacing=1.0, handletextpad=0.3, handlelength=1.3,
    )  # fmt: skip


def _common_error(table: pd.DataFrame, ax: Axes) -> None:
    """Says the standard error over held-out documents instead of drawing it: all runs are scored on the same ones, so
    it moves them together and blurs no difference between them."""
    error: Any = table["loss_se"].median() if "loss_se" in table else np.nan
    if np.isfinite(error):
        ax.set_title(f"s.e. of the held-out documents ±{error:.2g}, common to all runs", fontsize="small", color=GREY)


def _done(table: pd.DataFrame) -> Any:
    return table[table["status"] == "done"] if "status" in table else table


def _colour(i: int, n: int) -> Any:
    """A few categories get their own hue; many ordered ones get shades."""
    return COLOURS[i] if n <= len(COLOURS) else matplotlib.colormaps["viridis_r"](0.1 + 0.9 * i / (n - 1))


def _shades(values: Any) -> ScalarMappable:
    values = np.asarray(values, dtype=float)
    low, high = values.min(), values.max()
    if low == high:
        low, high = low / 2, high * 2
    colours = LinearSegmentedColormap.from_list("", matplotlib.colormaps["viridis_r"](np.linspace(0.08, 1, 256)))
    return ScalarMappable(LogNorm(low, high), colours)


def human_log(ax: Axes, which: str) -> None:
    """Log ticks written 200k, 1M: at 1, 2 and 5 where there is room for so many, else at 1."""
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    room = (
        ax.bbox.width / 0.55 if which == "x" else ax.bbox.height / 0.25
    ) / ax.figure.dpi  # labels that fit side by side, or one above another
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if 3 * np.log10(high / low) < room else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: human(v)))
    axis.set_minor_locator(NullLocator())


def power_log(ax: Axes, which: str) -> None:
    """Log ticks in powers of ten, at 1, 2, 5 or 1, 3 where there are few of them."""
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    if high / low > 300:
        axis.set_minor_formatter(NullFormatter())
        return
    subs = (1.0, 2.0, 5.0) if high / low < 15 else (1.0, 3.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: scientific(v)))
    axis.set_minor_locator(NullLocator())


def plain_log(ax: Axes, which: str) -> None:
    """A log axis with plain numbers, as long as they are short."""
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    if high / low > 100:
        small = low >= 1e-3 and high <= 1e4
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}") if small else LogFormatterSciNotation())
        return
    subs = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=15))
    if high / low < 2.2:  # over a factor of two a log axis is nearly an even one
        even = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
        axis.set_major_locator(FixedLocator([tick for tick in even if tick > 0]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
