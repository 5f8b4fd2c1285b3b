"""Figures of studies: what refits, simulations and comparisons of forms found. Conventions as in `plots`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from scalelab.errors import BadInput
from scalelab.plots import (
    COLOURS,
    GREY,
    MARKERS,
    SIZE,
    human,
    human_log,
    legend_above,
    new_axes,
    plain_log,
    power_log,
)  # fmt: skip

if TYPE_CHECKING:
    from scalelab.laws import Fit, Plan, Ranking
    from scalelab.laws.calibrate import Calibration
    from scalelab.laws.profiles import Plane, Profile
    from scalelab.laws.table import Table

SHADE = 0.18
LABELS = {
    "params": "parameters N", "params_active": "active parameters", "tokens": "training tokens D", "loss": "loss",
    "flops": "training compute C (FLOP)", "params_non_embedding": "parameters without embeddings",
}  # fmt: skip


def profile(found: Profile, fit: Fit, ax: Axes | None = None) -> Axes:
    """The profile's rise above its minimum, the level at which the interval ends, and the bootstrap's interval."""
    ax = new_axes(ax)
    table, quantile = found.table, found.quantile
    rise = table["t"].to_numpy() ** 2
    near = rise <= 2.5 * quantile**2
    ends = np.array([found.lower, found.upper])
    x = table[found.name].to_numpy()
    inside = np.array([max(ends[0], x.min()), min(ends[1], x.max())])
    ax.axvspan(*inside, color=COLOURS[0], alpha=SHADE, linewidth=0)
    ax.plot(x[near], rise[near], "o-", color=COLOURS[0], markersize=3, linewidth=1.3)
    ax.axhline(quantile**2, color=GREY, linewidth=0.9, linestyle="--")
    percent = f"{100 * found.level:g} %"
    lines = [f"{percent} profile: {found.lower:.4g} to {found.upper:.4g}"]
    drawn: Any = fit.conf_int(found.level).loc[found.name]
    if np.isfinite(drawn).all():
        ax.plot(drawn, [-0.12 * quantile**2] * 2, "|-", color=COLOURS[1], linewidth=2.5, markersize=9)
        lines.append(f"bootstrap: {drawn.lower:.4g} to {drawn.upper:.4g}")
    known = x[near] if near.any() else x
    if known.min() > 0 and known.max() > 4 * known.min():
        ax.set_xscale("log")
        human_log(ax, "x")
    ax.set(xlabel=found.name, ylabel="2 ΔV / scale", ylim=(-0.25 * quantile**2, 2.5 * quantile**2))
    _title(ax, *lines)
    return ax


def plane(found: Plane, fit: Fit, ax: Axes | None = None) -> Axes:
    """The joint region of two parameters by the objective's profile, over the bootstrap's draws."""
    ax = new_axes(ax)
    x, y, t2 = found.grid()
    names = [fit.names.index(name) for name in found.names]
    drawn = fit.samples[:, names]
    drawn = drawn[np.isfinite(drawn).all(1)]
    half, whole = found.threshold(0.5), found.threshold(found.level)
    inside = t2 <= 2.5 * whole
    left, right = x[inside.any(0)][[0, -1]]
    low, high = y[inside.any(1)][[0, -1]]
    ax.contourf(x, y, t2, levels=[0, half, whole], colors=[COLOURS[0]] * 2, alpha=SHADE)
    ax.contour(x, y, t2, levels=[half, whole], colors=[COLOURS[0]], linewidths=[0.9, 1.4])
    ax.plot(drawn[:, 0], drawn[:, 1], ".", color=COLOURS[1], markersize=2, alpha=0.5, zorder=1)
    ax.plot(*fit.estimate[names], marker="*", color="black", markersize=9)
    for axis, name, ends in (("x", found.names[0], (left, right)), ("y", found.names[1], (low, high))):
        if fit.law.parameters[name].sign and ends[1] > 4 * ends[0] > 0:
            getattr(ax, f"set_{axis}scale")("log")
            human_log(ax, axis)
    ax.set(xlabel=found.names[0], ylabel=found.names[1], xlim=(left, right), ylim=(low, high))
    lines = [f"profile regions, 50 and {100 * found.level:g} %" + (", cut by the grid" if found.cut else "")]
    _title(ax, *lines, *(["dots: bootstrap draws"] if len(drawn) else []))
    return ax


def sensitivity(fit: Fit, C: float | None = None, ax: Axes | None = None) -> Axes:
    """D/N* (of laws that allocate; else the target) under each objective, number of rows dropped and kind of N."""
    ax = new_axes(ax)
    table: Any = fit.sensitivity(C)
    column = next((c for c in table if c.startswith("D/N at ")), None) or next(c for c in table if " at " in c)
    name, at = column.split(" at ", 1)
    delta = table["delta"].map(lambda d: "" if np.isnan(d) else f", δ = {d:.1g}")
    label = table["objective"].str.replace(" on log", "").str.replace(" on value", ", values") + delta
    order = list(dict.fromkeys(label))
    height = label.map(order.index).to_numpy(float)
    drops = sorted(set(table["dropped"]))
    kinds = list(dict.fromkeys(table["N"])) if "N" in table else [""]
    for j, kind in enumerate(kinds):
        for i, k in enumerate(drops):
            mine = (table["dropped"] == k).to_numpy()
            if "N" in table:
                mine = mine & (table["N"] == kind).to_numpy()
            shift = 0.5 * (i - (len(drops) - 1) / 2) / len(drops)
            said = ("drop 0" if k == 0 else str(k)) if j == 0 else None
            face = COLOURS[i] if j == 0 else "white"
            ax.plot(
                table[column][mine], height[mine] + shift, MARKERS[i], color=COLOURS[i], markersize=4.5,
                markerfacecolor=face, label=said,
            )  # fmt: skip
    own = _interval_of(fit, name, C)
    if np.isfinite(own).all():
        ax.axvspan(*own, color=GREY, alpha=SHADE, linewidth=0)
    values = table[column].dropna()
    if len(values) and values.min() > 0 and values.max() > 8 * values.min():
        ax.set_xscale("log")
        human_log(ax, "x")
    ax.set_yticks(range(len(order)), order)
    ax.set(ylim=(len(order) - 0.5, -0.5), xlabel=f"{name.replace('D/N', 'D*/N*')} at {at}")
    said = ["grey: 95 % interval of this fit"] * bool(np.isfinite(own).all())
    _title(ax, *said, *["hollow: N without embeddings"] * (len(kinds) > 1))
    legend_above(ax, len(drops))
    return ax


def _interval_of(fit: Fit, name: str, C: float | None) -> np.ndarray:
    from scalelab.laws.target import target_of

    if not len(fit.samples):
        return np.full(2, np.nan)
    return np.ravel(fit.interval(target_of(fit, C).quantities(fit.samples)[name]))


def trim_drift(fit: Fit, ax: Axes | None = None) -> Axes:
    """Each parameter as more of the highest losses are dropped, in half-widths of its 95 % interval."""
    ax = new_axes(ax)
    table = fit.trim_drift()
    half, what = fit.conf_int().diff(axis=1)["upper"] / 2, "95 % bootstrap interval"
    if not np.isfinite(half).any():
        half, what = 1.96 * fit.standard_errors, "95 % interval (standard errors)"
    ax.axhspan(-1, 1, color=GREY, alpha=SHADE, linewidth=0)
    widths: Any = half
    held = {**fit.options.fixed, **fit.options.tied}
    free = [n for n in fit.names if n not in held and widths[n] > 0]
    for i, name in enumerate(free):
        drift = (table[name] - table[name].iloc[0]) / half[name]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        line = "-" if i < len(COLOURS) else "--"
        ax.plot(table["dropped"], drift, line, marker=marker, color=colour, markersize=4, linewidth=1.3, label=name)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="highest losses dropped", ylabel="drift (half-widths)")
    ax.set_xticks(table["dropped"])
    _title(ax, f"grey: {what} of the full fit")
    legend_above(ax, min(5, len(free)))
    return ax


def expanding(fits: Mapping[str, Fit], ax: Axes | None = None, cuts: Sequence[float] | None = None) -> Axes:
    """Mean held-out error against the distance from the largest run fitted, in decades, over many cuts; the baselines
    are the first fit's. Bins hold the predictions of all cuts up to that distance and beyond the one before; of one fit
    alone each prediction is a point."""
    ax = new_axes(ax)
    windows = {name: fit.expanding(cuts) for name, fit in fits.items()}
    if whys := [f"{name}: {window.reason}" for name, window in windows.items() if not window.ok]:
        return _nothing(ax, "no hold-out\n" + "\n".join(whys))
    for i, (name, window) in enumerate(windows.items()):
        error: Any = window.by_distance["law"]
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(error.index, 100 * _finite(error), MARKERS[i % len(MARKERS)] + "-", color=colour, label=name, zorder=3)
    first = next(iter(windows.values()))
    if len(fits) == 1:
        ax.scatter(first.table["decades"], 100 * _finite(first.table["law"].abs()), s=4, color=COLOURS[0], alpha=0.3)
    for name, style in zip(first.by_distance.columns[2:], (":", "--"), strict=True):
        ax.plot(first.by_distance.index, 100 * _finite(first.by_distance[name]), style, color=GREY, label=name)
    decades = "compute" if first.called == "C" else first.called
    ax.set(yscale="log", xlabel=f"decades of {decades} beyond the fit, up to", ylabel="mean held-out error (%)")
    ax.set_xticks(first.by_distance.index)
    means = 100 * _finite(np.concatenate([w.by_distance.to_numpy(float)[:, 1:].ravel() for w in windows.values()]))
    ax.set_ylim(0.2 * means.min(), min(5 * means.max(), 1e4))  # room for the legend
    plain_log(ax, "y")
    ax.legend(fontsize="small", frameon=False, ncols=2, loc="upper left")
    return ax


def leave_group_out(fit: Fit, group: str, ax: Axes | None = None) -> Axes:
    """Mean error on each group, predicted by a fit to the others, beside baselines; against compute for budgets."""
    found: Any = fit.leave_group_out(group)
    numbers = all(isinstance(v, int | float) and v > 0 for v in found.index) and len(found) > 3
    ax = new_axes(ax, SIZE if numbers else _tall(len(found)))
    known = found[found["law"].notna()] if "law" in found else found.iloc[:0]
    if known.empty:
        return _nothing(ax, f"no {group} can be left out: {found['reason'].iloc[0]}")
    methods = [c for c in known if c not in ("held_out", "bias", "worst", "reason")]
    place = known.index.to_numpy(float) if numbers else np.arange(len(known))
    for name, colour, marker in zip(methods, (COLOURS[0], COLOURS[4], COLOURS[2]), ("o", "^", "s"), strict=True):
        label = fit.law.name if name == "law" else name
        across = (place, _finite(known[name])) if numbers else (_finite(known[name]), place)
        ax.plot(*across, marker, color=colour, markersize=5, label=label, linestyle="-" if numbers else "none")
    if numbers:
        what = "compute of the budget (FLOP)" if group == "budget" else LABELS.get(group, group)
        ax.set(xscale="log", yscale="log", xlabel=f"{what} left out", ylabel="relative error")
        (power_log if group == "budget" else human_log)(ax, "x")
        _percent(ax)
    else:
        ax.set_yticks(place, [str(v) for v in known.index])
        ax.set(xscale="log", xlabel="relative error", ylim=(len(known) - 0.5, -0.5))
        _percent(ax, "x")
    lost = len(found) - len(known)
    _title(ax, f"each {group} by a fit to the others" + (f"; {lost} cannot be left out" if lost else ""))
    legend_above(ax, 3)
    return ax


def coverage(found: Calibration, ax: Axes | None = None) -> Axes:
    """Share of simulations whose interval held the truth, with two binomial errors, beside the nominal level."""
    ax = new_axes(ax)
    table: Any = found.table
    place, share = np.arange(len(table)), table["coverage"].to_numpy()
    ends = np.clip([share - 2 * table["error"], share + 2 * table["error"]], 0, 1)
    ends = np.maximum(np.abs(ends - share), 0) if np.isfinite(share).all() else None
    ax.axvline(found.level, color="black", linewidth=0.9, linestyle="--")
    ax.errorbar(share, place, xerr=ends, fmt="o", color=COLOURS[0], markersize=5, capsize=3)
    ax.set_yticks(place, [f"{table.index[-1]}*" if i == len(table) - 1 else str(n) for i, n in enumerate(table.index)])
    low = np.nanmin(np.append(share - 0.02 if ends is None else share - ends[0], found.level)) - 0.02
    ax.set(ylim=(len(table) - 0.5, -0.5), xlim=(max(0.0, low), 1.005), xlabel="coverage")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _title(
        ax, f"{found.simulations - found.withheld} simulations of this design; dashed: nominal", f"*at {found.target}"
    )
    return ax


def ranking(found: Ranking, ax: Axes | None = None) -> Axes:
    """Forms and baselines by held-out error, the in-sample error beside it, and what a perfect law would err by."""
    ax = new_axes(ax, _tall(len(found.table)))
    table: Any = found.table[found.table["held_out"].notna()]
    colours = {"best": COLOURS[0], "tied": COLOURS[5], "worse": COLOURS[1], "baseline": GREY}
    place = np.arange(len(table))
    for verdict, colour in colours.items():
        mine = (table["verdict"] == verdict).to_numpy()
        if mine.any():
            ax.plot(table["held_out"][mine], place[mine], "o", color=colour, markersize=5.5, label=verdict)
    inside = table["inside"].notna().to_numpy()
    ax.plot(table["inside"][inside], place[inside], "|", color="black", markersize=8, label="in sample")
    ax.axvspan(1e-9, found.floor, color=GREY, alpha=SHADE, linewidth=0)
    values = table[["held_out", "inside"]].to_numpy(float)
    ax.set(xscale="log", xlabel="mean relative error", ylim=(len(table) - 0.5, -0.5))
    ax.set_xlim(0.6 * np.nanmin(np.append(values, found.floor)), 1.4 * np.nanmax(values))
    ax.set_yticks(place, [str(name) for name in table.index])
    _percent(ax, "x")
    _title(ax, f"{found.held_out} runs of {found.called} ≥ {found.cut:.2g} held out", "grey: below the noise of a run")
    legend_above(ax, 5)
    return ax


def prediction(fit: Fit, table: Table | None = None, x: str | None = None, ax: Axes | None = None) -> Axes:
    """The law with the 95 % interval of its curve, and the wider one of a new run, along one input; the runs as points.

    Without a table: along the compute-optimal line to ten times the largest run, for a law that allocates, else along
    input `x` (the law's first) with the others at their middle value.
    """
    from scalelab.laws.prediction import Prediction

    ax = new_axes(ax)
    given = table is not None
    inputs, role, said = _given(fit, table, x) if given else _along(fit, x)
    try:
        frame: Any = Prediction(copy.copy(fit), inputs).summary_frame()  # a copy: a figure adds no warnings
    except BadInput as error:
        if given:
            raise
        raise BadInput(
            "table", None, f"name inputs to draw {fit.law.name} along ({error.field} {error.remedy})"
        ) from None
    along = np.asarray(inputs[role], float)
    order = np.argsort(along)
    at, rows = along[order], frame.iloc[order]
    target = fit.law.target
    if rows["mean_ci_lower"].notna().any():
        light, dark = {"alpha": 0.15, "linewidth": 0}, {"alpha": 0.4, "linewidth": 0}
        ax.fill_between(
            at, rows["obs_ci_lower"], rows["obs_ci_upper"], color=COLOURS[0], label="a new run, 95 %", **light
        )
        ax.fill_between(
            at, rows["mean_ci_lower"], rows["mean_ci_upper"], color=COLOURS[0], label="the curve, 95 %", **dark
        )
    ax.plot(at, rows["mean"], color=COLOURS[0], linewidth=1.4, label=fit.law.name)
    seen = fit.rows.compute if role == "flops" and "flops" not in fit.law.inputs else fit.rows.columns[role]
    ax.plot(seen, fit.observed, "o", color=GREY, markersize=2.5, alpha=0.5, label="runs", zorder=0.8)
    values = rows["mean"].to_numpy()
    if at.min() > 0 and at.max() > 4 * at.min():
        ax.set_xscale("log")
    if values.min() > 0 and values.max() > 30 * values.min():
        ax.set_yscale("log")
    ax.set(xlabel=LABELS.get(role, role), ylabel=LABELS.get(target, target))
    ax.margins(x=0.02)
    ends = ax.get_xlim()
    if seen.max() < at.max():
        ax.axvspan(seen.max(), ends[1], color="#999999", alpha=0.12, linewidth=0, zorder=0)
        said = (*said, "grey: beyond the data")
    ax.set_xlim(ends)
    if ax.get_xscale() == "log":
        (power_log if role == "flops" else human_log)(ax, "x")
    _title(ax, "; ".join(said))
    ax.legend(fontsize="small", frameon=False)
    return ax


def _given(fit: Fit, table: Any, x: str | None) -> tuple[Any, str, tuple[str, ...]]:
    """The caller's table by roles, and the input that varies most in it."""
    columns = {c: r for r, c in fit.record["columns"].items() if c in table and r not in table}
    table = {columns.get(c, c): np.asarray(v) for c, v in dict(table).items()}
    if x is None:
        varied = [r for r in fit.law.inputs if r != fit.law.group]
        x = max(varied, key=lambda r: float(np.ptp(np.log(np.maximum(np.abs(np.asarray(table[r], float)), 1e-300)))))
    if x not in table:
        raise BadInput("x", x, f"must be one of {', '.join(table)}")
    return table, x, ()


def _along(fit: Fit, x: str | None) -> tuple[Any, str, tuple[str, ...]]:
    """Inputs along which to draw the law, by roles, what varies, and what is held, in words."""
    from scalelab.laws.target import _middle

    law, rows = fit.law, fit.rows
    optimal = law.allocates and rows.has_compute and "flops" not in law.inputs
    inputs = [role for role in law.inputs if role != law.group]
    if x is not None and x not in (*inputs, *(["flops"] if optimal else [])):
        raise BadInput("x", x, f"must be one of {', '.join([*inputs, *(['flops'] if optimal else [])])}")
    middle = {role: _middle(rows.columns[role]) for role in law.inputs}
    if optimal and x in (None, "flops"):
        C = np.geomspace(rows.compute.min(), 10 * rows.compute.max(), 60)
        held = {role: v for role, v in middle.items() if role not in (law.paid, "tokens")}
        N, D, _ = (v[0] for v in law.optimum(fit.estimate[None], C, 6.0, **held))
        known = np.isfinite(N)
        if known.any():
            table: dict[str, Any] = {law.paid: N[known], "tokens": D[known], "flops": C[known]}
            table |= {role: np.full(known.sum(), v) for role, v in held.items()}
            return table | _group(fit, int(known.sum())), "flops", ("at its compute-optimal N, D", *_held(held))
    role = x if x in inputs else inputs[0]
    values = rows.columns[role]
    low, high = values.min(), values.max()
    limit = law.ranges.get(role, (-np.inf, np.inf))[1]
    even = low <= 0 or role in law.may_be_zero or np.isfinite(limit)
    grid = np.linspace(low, high, 60) if even else np.geomspace(low, 10 * high, 60)
    held = {r: v for r, v in middle.items() if r != role}
    table = {role: grid} | {r: np.full(60, v) for r, v in held.items()}
    return table | _group(fit, 60), role, _held({r: v for r, v in held.items() if r != law.group})


def _group(fit: Fit, n: int) -> dict[str, Any]:
    """The label of the first group, for a law that has groups."""
    group = fit.law.group
    return {} if group is None else {group: np.full(n, fit.rows.labels[0], dtype=object)}


def _held(held: dict[str, float]) -> tuple[str, ...]:
    return (", ".join(f"{role} = {human(v)}" for role, v in held.items()),) if 0 < len(held) <= 3 else ()


def beside_isoflop(fit: Fit, ax: Axes | None = None) -> Axes:
    """N* of the law and of IsoFLOP parabolas at each budget, with 95 % intervals, before and after the parabola's own
    bias is taken out."""
    ax = new_axes(ax)
    table = fit.beside_isoflop()
    C = table["flops"].to_numpy()
    for shift, name, colour, marker in ((0.94, "law", COLOURS[0], "o"), (1.06, "isoflop", COLOURS[1], "s")):
        value = table[name].to_numpy()
        ends = np.abs([table[f"{name}_lower"] - value, table[f"{name}_upper"] - value])
        label = fit.law.name if name == "law" else "parabolas"
        ax.errorbar(C * shift, value, yerr=ends, fmt=marker, color=colour, markersize=4.5, capsize=2.5, label=label)
    ax.plot(C * 1.06, table["isoflop"] / table["bias"], "s", markerfacecolor="white", color=COLOURS[1], markersize=4.5,
            label="less their bias")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)", ylabel="optimal parameters N*")
    human_log(ax, "y")
    power_log(ax, "x")
    _title(ax, f"intervals: 95 %; they overlap at {table['overlap'].to_numpy().sum()} of {len(table)} budgets")
    ax.legend(fontsize="small", frameon=False)
    return ax


def plan(found: Plan, ax: Axes | None = None) -> Axes:
    """Expected width of the interval of the loss at the target under each design, with Monte-Carlo error."""
    ax = new_axes(ax)
    table = found.table
    place = np.arange(len(table))
    for i, (name, row) in enumerate(table.iterrows()):
        chosen = name == found.recommended
        ax.errorbar(
            row.loss_width, i, xerr=2 * row.loss_width_mc, fmt="*" if chosen else "o", markersize=10 if chosen else 5,
            color=COLOURS[1] if chosen else COLOURS[0], capsize=2.5, zorder=3,
        )  # fmt: skip
    plain = float(table.loc["compute-optimal", "loss_width"])  # type: ignore[arg-type]
    ax.axvline(plain, color=GREY, linewidth=0.9, linestyle="--")
    ax.set_yticks(place, [str(name) for name in table.index])
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=f"width of the {100 * found.level:g} % interval of the loss")
    _title(ax, f"{found.budget:.2g} FLOP to know {found.target:.2g}; ★ recommended", "bars: two Monte-Carlo errors")
    return ax


# ------------------------------------------------------------------------------------------------ helpers


def _title(ax: Axes, *lines: str) -> None:
    ax.set_title("\n".join(line for line in lines if line), fontsize="small", color=GREY)


def _tall(lines: int) -> tuple[float, float]:
    """The size of a figure with so many lines of words."""
    return SIZE[0], max(2.2, 0.9 + 0.26 * lines)


def _finite(errors: Any) -> np.ndarray:
    """Errors as a log axis can take them: of a law that ran away, far beyond it."""
    return np.clip(np.asarray(errors, float), 1e-12, 1e6)


def _percent(ax: Axes, which: str = "y") -> None:
    """A log axis of shares, written 1 %, 0.5 %."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%"))
    axis.set_minor_locator(NullLocator())


def _nothing(ax: Axes, why: str) -> Axes:
    ax.text(0.5, 0.5, why, ha="center", va="center", transform=ax.transAxes, wrap=True)
    ax.set_axis_off()
    return ax
