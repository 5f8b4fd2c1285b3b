"""Findings that need refits: rows, clusters, objectives or another method that would change the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from scalelab.laws import residuals
from scalelab.laws.checks import free_names
from scalelab.laws.intervals import curvature, refits
from scalelab.laws.notices import Notice, name_rows
from scalelab.laws.objective import LOG_SQUARES, SQUARES, Objective
from scalelab.laws.profiles import student_quantile
from scalelab.laws.sensitivity import _scaled, refit_weighted, trim_drift
from scalelab.laws.target import Target, target_of

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

CANDIDATES = 40  # rows whose influence is checked by a refit: those whose influence function is largest
DRIFT = 4.0  # standard errors of a drift, above what 40 planted sweeps ever showed (3.3)
# Half-widths that one row must move the answer by: without it the difference is noise of at most that interval, and a
# sweep of 16 has half a dozen rows of such leverage; one half-width would ring at every tenth clean sweep.
MOVES = 1.5
DRAWS = 400
# Under normal noise least absolute and least squares estimates differ by 0.76 standard errors of the latter: its 95 %
# interval is left by chance once in 100 times and quantities, 1.5 times that interval once in 10,000.
OWN_WIDTH = 1.5


def findings(fit: Fit) -> Iterator[Notice]:
    """Every finding that needs refits or tests of the residuals."""
    yield from _of_rows(fit)
    yield from _of_bootstrap(fit)
    if fit.ok:  # the residuals of an unusable fit say nothing of the form
        yield from residuals.findings(fit)
    if fit.ok and len(fit.rows) > 2 * fit.record["free"]:
        yield from _influence(fit)
        yield from _trimmed(fit)
        yield from _objectives(fit)
        yield from _isoflop(fit)


def spread_draws(fit: Fit) -> Float[np.ndarray, "R P"]:
    """The bootstrap draws; without (enough of) them, draws of a t distribution with the sandwich covariance."""
    good = fit.samples[np.isfinite(fit.samples).all(1)]
    if len(good) >= 100:
        return good
    problem, theta = fit.solved
    shape = curvature(fit)
    value, vector = np.linalg.eigh(shape.covariance())
    root = vector * np.sqrt(np.maximum(value, 0))
    rng = np.random.default_rng(fit.options.seed)
    freedom = shape.freedom  # Student's t: with few rows the scale is uncertain too
    drawn = rng.standard_normal((DRAWS, len(theta))) * np.sqrt(freedom / rng.chisquare(freedom, size=(DRAWS, 1)))
    with np.errstate(over="ignore"):
        return problem.natural(np.clip(theta + drawn @ root.T, problem.lower, problem.upper))


def answers(fit: Fit, target: Target, params: Float[np.ndarray, "R P"]) -> dict[str, np.ndarray]:
    """What studies watch: the target's value, and ln D/N* where the law allocates."""
    out = target.quantities(params)
    with np.errstate(all="ignore"):
        return {
            ("ln D/N*" if k == "D/N" else k): np.log(v) if k == "D/N" else v for k, v in out.items() if k != "params"
        }


def half_widths(fit: Fit, target: Target) -> dict[str, tuple[float, float, float]]:
    """(estimate, lower, upper) at 95 % of what studies watch."""
    drawn = answers(fit, target, spread_draws(fit))
    point = answers(fit, target, fit.estimate[None])
    out = {}
    for name, values in drawn.items():
        if np.isfinite(values).sum() < 0.5 * len(values) or not np.isfinite(point[name][0]):
            continue  # no answer there: `no-interior-optimum` says so where it is asked for
        low, high = np.nanquantile(values, [0.025, 0.975])
        out[name] = (float(point[name][0]), float(low), float(high))
    return out


# ------------------------------------------------------------------------------------------------ rows


def _of_rows(fit: Fit) -> Iterator[Notice]:
    residual = fit.resid.to_numpy()
    centre, scale = residuals.scale_of_residuals(fit)
    far = np.abs(residual - centre) / scale
    if not (far > 8).any() or (far <= 8).sum() <= fit.record["free"]:
        return
    inputs = np.stack([fit.rows.columns[role] for role in fit.law.inputs])[:, far <= 8]
    without = np.full(len(fit.names), np.nan)
    if len(np.unique(inputs, axis=1).T) >= fit.record["free"]:
        without = fit.refit(fit.rows.take(far <= 8)).estimate
    moved = ", ".join(f"{n} {v:.4g}" for n, v in zip(fit.names, without, strict=True))
    # A run that ends 30 % above the law has not merely noise: it diverged, or is of another kind.
    above = np.log(1.3) if fit.options.objective.on == "log" else 0.3 * np.abs(fit.fittedvalues.to_numpy())
    for code, which in (
        ("diverged-run", (far > 8) & (residual > above)),
        ("outlier-row", (far > 8) & (residual <= above)),
    ):
        if which.any():
            names = [n for n, w in zip(fit.rows.names, which, strict=True) if w]
            off = np.abs(fit.observed / fit.fittedvalues.to_numpy() - 1)[which].max()
            yield Notice(
                code,
                "warning",
                f"{name_rows(names)}: {far[which].max():.0f} robust scales off the law "
                f"({off:.1%} of {fit.law.target}). Without rows beyond 8 scales: {moved}.",
                "look at these runs' curves; leave them out with a reason, or say that they stayed in.",
                {
                    "rows": names,
                    "scales": far[which].tolist(),
                    "params_without": dict(zip(fit.names, without.tolist(), strict=True)),
                },
            )


def _influence(fit: Fit) -> Iterator[Notice]:
    """Against the interval of the fit without the row: the row itself widens its own."""
    target, rows = target_of(fit), fit.rows
    shape = curvature(fit)
    n = len(rows)
    error = np.sqrt(np.maximum(np.diag(shape.covariance(np.arange(n))), 1e-300))
    rank = np.argsort(-np.abs(shape.influence / error).max(1))[:CANDIDATES]
    lanes, names = [np.arange(n) != i for i in rank], [rows.names[i] for i in rank]
    if rows.clusters is not None:
        members = [np.flatnonzero(rows.clusters == g) for g in range(int(rows.clusters.max()) + 1)]
        members = sorted(members, key=lambda m: -np.abs(shape.influence[m].sum(0) / error).max())[:CANDIDATES]
        lanes += [~np.isin(np.arange(n), m) for m in members]
        names += [f"the cluster of {rows.names[m[0]]}" for m in members]
    weights = rows.weights * np.array(lanes)
    params, _ = refits(fit, weights, cold=False)
    moved = answers(fit, target, params)
    point, slope = _slopes(fit, target)
    # residuals of rounding have an influence of rounding, and intervals of nothing
    if float(np.std(fit.resid)) < 1e-9 * (1.0 if fit.options.objective.on == "log" else np.abs(fit.observed).max()):
        return
    found = []
    for i, name in enumerate(names):
        if not np.isfinite(params[i]).all():
            continue
        without = curvature(fit, fit.solved[0].internal(params[[i]])[0], weights[i])
        t = student_quantile(0.95, without.freedom)
        for what, g in slope.items():
            half = t * float(np.sqrt(max(g @ without.covariance() @ g, 0.0)))
            share = abs(float(moved[what][i]) - point[what]) / max(half, 1e-300)
            if share > MOVES:
                found.append((share, name, what, float(moved[what][i])))
    if found:
        found.sort(key=lambda f: -f[0])
        share, name, what, value = found[0]
        show = np.exp if what.startswith("ln ") else float
        all_names = list(dict.fromkeys(f[1] for f in found))
        yield Notice(
            "influence",
            "warning",
            f"without {name}, {what.removeprefix('ln ')} at {target} goes from {show(point[what]):.4g} to "
            f"{show(value):.4g}, {share:.1f} half-widths of its interval then"
            + (f"; as much hangs on {name_rows(all_names[1:])}." if all_names[1:] else "."),
            "look at that run; replicate it, or add runs beside it: the answer hangs on it.",
            {"rows": all_names, "half_widths": [f[0] for f in found], "of": [f[2] for f in found]},
        )


def _slopes(fit: Fit, target: Target) -> tuple[dict[str, float], dict[str, Float[np.ndarray, " P"]]]:
    """What studies watch at the fit, and its slope in solver coordinates by central differences."""
    problem, theta = fit.solved
    step = 1e-4 * np.maximum(np.abs(theta), 1e-2)
    around = np.concatenate([theta[None], theta + np.diag(step), theta - np.diag(step)])
    values = answers(fit, target, problem.natural(around))
    P = len(theta)
    slopes = {k: (v[1 : P + 1] - v[P + 1 :]) / (2 * step) for k, v in values.items()}
    known = {k: s for k, s in slopes.items() if np.isfinite(s).all()}
    return {k: float(values[k][0]) for k in known}, known


def _trimmed(fit: Fit) -> Iterator[Notice]:
    if len(fit.rows) < 4 * fit.record["free"]:  # trims of a twelfth are then a row or two: `influence` speaks of these
        return
    table = trim_drift(fit)
    names = [n for n in fit.names if n not in fit.options.fixed]
    values = table[names].to_numpy()
    if len(table) < 3 or not np.isfinite(values).all() or not table["z"].iloc[-2:].max() > DRIFT:
        return
    steps = np.diff(values, axis=0)
    total = values[-1] - values[0]
    along = (steps * np.sign(total) > 0).mean(0) >= 0.75  # of the steps go the way of the whole
    draws = spread_draws(fit)[:, [fit.names.index(n) for n in names]]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    far = along & (np.abs(total) > 0.5 * (high - low))
    if far.any():
        shown = [n for n, f in zip(names, far, strict=True) if f]
        moves = "; ".join(f"{n} {', '.join(f'{v:.4g}' for v in table[n])}" for n in shown)
        yield Notice(
            "trim-drift",
            "warning",
            f"parameters drift as the {', '.join(map(str, table['dropped']))} highest losses are dropped: {moves} "
            f"({table['z'].iloc[-2:].max():.1f} standard errors).",
            "the form fails among the smallest runs: leave that corner out with a reason, or rank other forms.",
            {"dropped": table["dropped"].tolist(), "z": table["z"].tolist(),
             "params": {n: table[n].tolist() for n in shown}},
        )  # fmt: skip


def _objectives(fit: Fit) -> Iterator[Notice]:
    """Robust, least squares and a heavy-tailed likelihood on the same kind of residual as the fit's own."""
    if fit.options.objective.kind == "lower-edge":  # another estimand, which should differ
        return
    own = fit.options.objective
    target = target_of(fit)
    watched = half_widths(fit, target)
    plain = [n for n in fit.names if not fit.law.parameters[n].sign and n not in fit.options.fixed]
    low, high = np.quantile(spread_draws(fit), [0.025, 0.975], axis=0)
    unit = 1.0 if own.on == "log" else float(np.median(np.abs(fit.observed)))
    wanted = [
        LOG_SQUARES if own.on == "log" else SQUARES,
        Objective("huber", own.on, 1e-3 * unit),
        Objective("student", own.on, None),
    ]
    others, moved = {}, {}
    for goal in wanted:
        goal = _scaled(fit, goal)
        if goal == own:
            continue
        params = refit_weighted(fit, fit.rows, goal, fit.rows.weights[None])
        if not np.isfinite(params).all():
            continue
        label = goal.kind
        found = {k: (v[0], *watched[k]) for k, v in answers(fit, target, params).items() if k in watched}
        found |= {n: (params[0, i], fit.estimate[i], low[i], high[i]) for n in plain for i in [fit.names.index(n)]}
        out = {k: v for k, v in found.items() if _outside(*v, OWN_WIDTH if own.kind == "squares" else 1.0)}
        if out:
            others[label] = {k: float(v[0]) for k, v in out.items()}
            moved |= {k: (v[1], v[2], v[3]) for k, v in out.items()}
    if others:
        ends = {k: f"interval {v[1]:.4g} to {v[2]:.4g}" for k, v in moved.items()}
        said = "; ".join(
            f"{label}: {', '.join(f'{k} {v:.4g} ({ends[k]})' for k, v in o.items())}" for label, o in others.items()
        )
        yield Notice(
            "objective-dependent",
            "warning",
            f"another objective leaves this one's interval ({own.kind}): {said}.",
            "show fit.sensitivity(); outlying rows or a wrong form pull the objectives apart.",
            {"objective": own.kind, "others": others},
        )


def _outside(value: float, point: float, low: float, high: float, factor: float) -> bool:
    """Whether a value leaves an interval stretched about its point; never, where that is as narrow as rounding, or
    where there is no value."""
    if not np.isfinite(value) or high - low <= 1e-9 * abs(point):
        return False
    return not point - factor * (point - low) <= value <= point + factor * (high - point)


def _isoflop(fit: Fit) -> Iterator[Notice]:
    frame = beside_isoflop(fit)
    if frame is None or not len(frame):
        return
    last = frame.iloc[-1]
    if not last["overlap"]:
        yield Notice(
            "isoflop-law-disagree",
            "warning",
            f"at C = {last['flops']:.3g} the law's N* is {last['law']:.3g} ({last['law_lower']:.3g} to "
            f"{last['law_upper']:.3g}), the parabola's {last['isoflop']:.3g} ({last['isoflop_lower']:.3g} to "
            f"{last['isoflop_upper']:.3g}, of which a factor {last['bias']:.2f} is the parabola's own bias).",
            "trust neither beyond the data: the form fails along the budgets, or the sweep is lopsided.",
            {k: float(last[k]) for k in frame.columns if k != "overlap"},
        )


def beside_isoflop(fit: Fit) -> pd.DataFrame | None:
    """See `Fit.beside_isoflop`; None where the rows are no IsoFLOP sweep or the law allocates nothing.

    `bias` is N* of a parabola through the law's own values at the same runs over the law's N*: what the method would
    give were the law true. Intervals overlap or not after the parabola's is divided by it.
    """
    from scalelab.errors import BadInput
    from scalelab.laws.isoflop import isoflop
    from scalelab.laws.validate import budgets

    law, rows = fit.law, fit.rows
    if set(law.inputs) != {"params", "tokens"} or not rows.has_compute or law.target != "loss":
        return None
    label = budgets(rows.compute)
    if np.bincount(label).min() < 4 or label.max() < 1:
        return None
    table = pd.DataFrame({r: rows.columns[r] for r in ("params", "tokens", "loss")} | {"flops": rows.compute})
    draws = min(400, max(fit.record["draws"], 200))
    try:
        seen = isoflop(table, bootstrap=draws, seed=fit.options.seed)
        ideal = isoflop(table.assign(loss=fit.fittedvalues.to_numpy()), bootstrap=0)
    except BadInput:  # budgets that run into each other, duplicates in another order: no IsoFLOP sweep
        return None
    both: list[Any] = [seen.vertices, ideal.vertices]
    use = both[0]["used"].to_numpy() & both[1]["used"].to_numpy()
    v, own = both[0][use], both[1][use]
    C = v["flops"].to_numpy()
    N = law.optimum(fit.estimate[None], C, 6.0)[0][0]
    drawn = law.optimum(spread_draws(fit), C, 6.0)[0]
    with np.errstate(all="ignore"):
        known = np.isfinite(N) & (np.isfinite(drawn).mean(0) > 0.5)
        lower, upper = np.nanquantile(np.where(known, drawn, 1.0), [0.025, 0.975], axis=0)
    out: Any = pd.DataFrame({"flops": C, "law": N, "law_lower": lower, "law_upper": upper})
    for name, column in (("isoflop", "params"), ("isoflop_lower", "params_lower"), ("isoflop_upper", "params_upper")):
        out[name] = v[column].to_numpy()
    out["bias"] = own["params"].to_numpy() / N
    out = out[known & np.isfinite(out["isoflop_lower"])].reset_index(drop=True)
    out["overlap"] = (out["isoflop_lower"] / out["bias"] <= out["law_upper"]) & (
        out["isoflop_upper"] / out["bias"] >= out["law_lower"]
    )
    return out


# ------------------------------------------------------------------------------------------------ bootstrap


def _of_bootstrap(fit: Fit) -> Iterator[Notice]:
    draws = fit.record["draws"]
    if not draws:
        return
    bad = fit.record["draws_failed"] + fit.record["draws_at_boundary"]
    numbers: dict[str, Any] = {k: fit.record[f"draws_{k}"] for k in ("failed", "at_boundary", "redrawn")}
    if bad > 0.05 * draws:
        yield Notice(
            "bootstrap-degenerate",
            "warning",
            f"{numbers['failed']} of {draws} refits failed and {numbers['at_boundary']} ended on a bound.",
            "the intervals are rough: add runs.",
            numbers,
        )
        return
    good = fit.samples[np.isfinite(fit.samples).all(1)]
    if len(good) < 20 or fit.options.objective.kind == "lower-edge":
        return
    # of exponents and the like, in the solver's coordinates, which a form may choose as it likes
    plain = [i for i, n in enumerate(free_names(fit)) if not fit.law.parameters[n].sign]
    names = [free_names(fit)[i] for i in plain]
    error = np.sqrt(np.diag(curvature(fit).covariance()))[plain]
    width = np.subtract(*np.quantile(fit.solved[0].internal(good)[:, plain], [0.975, 0.025], axis=0)) / (2 * 1.96)
    # where the rows hardly determine a parameter its curvature knows nothing of how far it can go
    known = error < 0.5 * np.array([np.ptp(fit.law.parameters[name].search) for name in names])
    if (known & (width < 0.2 * error)).any():
        yield Notice(
            "bootstrap-degenerate",
            "warning",
            "the bootstrap intervals are under a fifth of the curvature's standard errors: refits that stop early, or "
            "draws that are no resamples.",
            "check the draws given; report this table as a bug otherwise.",
            numbers | {"bootstrap": width.tolist(), "hessian": error.tolist()},
        )
