"""What the residuals of a fit still know: trends, dependence within groups, a spread that changes.

Tests are judged against permutations or Student's t at thresholds far out (|z| > 4, about 1 in 16,000 under normal
noise): a fit asks a dozen such questions, and an alarm at 5 % each would ring at every second sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from scalelab.laws.intervals import curvature, groups
from scalelab.laws.notices import Notice
from scalelab.laws.objective import robust_scale
from scalelab.laws.profiles import student_quantile
from scalelab.laws.validate import budgets

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

STRONG = 4.0  # standard errors
STRONG_LEVEL = 0.99994  # the same as a share of Student's t, for few rows
UNEVEN = 3.5  # of rank correlations, two a fit and with a factor 2 in the spread besides
SEEN = 0.5  # robust scales of the residuals that a trend must span to matter
SHUFFLES = 400
SAME_SIZE = 0.02  # ln N within which two runs have the same model
SYMBOL = {"params": "N", "tokens": "D", "flops": "C"}


def orders(fit: Fit) -> dict[str, np.ndarray]:
    """Logs of what residuals may trend with: C, D/N, and each positive input."""
    rows, law = fit.rows, fit.law
    values = {"C": rows.compute} if rows.has_compute else {}
    # inputs that a law computes for itself, a whole schedule's, are no order that a reader knows
    for role in law.inputs if set(law.inputs) <= set(law.needs) else law.scale:
        if role != law.group and (rows.columns[role] > 0).all():
            values[SYMBOL.get(role, role)] = rows.columns[role]
    if {"N", "D"} <= set(values):
        values["D/N"] = values["D"] / values["N"]
    return {name: np.log(v) for name, v in values.items() if np.ptp(np.log(v)) > 1e-6}


def clipped(fit: Fit) -> tuple[np.ndarray, float]:
    """Residuals about their median, no further than three robust scales, and that scale: no outlier decides."""
    r = fit.resid.to_numpy()
    r = r - np.median(r)
    scale = max(robust_scale(r), 1e-12)
    return np.clip(r, -3 * scale, 3 * scale), scale


def scale_of_residuals(fit: Fit) -> tuple[float, float]:
    """Centre and robust scale of the residuals, the P smallest left out: a robust fit goes through P rows exactly,
    which with few rows would make the others look far off."""
    r = fit.resid.to_numpy()
    centre = float(np.median(r))
    apart = np.sort(np.abs(r - centre))[min(fit.record["free"], len(r) - 1) :]
    rounding = 1e-9 if fit.options.objective.on == "log" else 1e-9 * float(np.abs(fit.observed).max())
    return centre, max(1.4826 * float(np.median(apart)), rounding)


def runs_test(residual: Float[np.ndarray, " n"]) -> float:
    """z of the number of runs of one sign (Wald & Wolfowitz 1940); far below 0: neighbours share their sign."""
    up = residual > 0
    a, b = int(up.sum()), int((~up).sum())
    if min(a, b) < 4:
        return 0.0
    n = a + b
    mean = 2 * a * b / n + 1
    variance = (mean - 1) * (mean - 2) / (n - 1)
    return float((1 + (up[1:] != up[:-1]).sum() - mean) / np.sqrt(max(variance, 1e-12)))


def trends(fit: Fit) -> dict[str, tuple[float, float, float]]:
    """Per order: t of slope and of curvature, net of what the law's own parameters could take up, and the span of the
    fitted trend in robust scales."""
    problem, theta = fit.solved
    r, scale = clipped(fit)
    weight = np.sqrt(fit.rows.weights / fit.rows.weights.mean())
    jacobian = problem.jacobian(theta) * weight[:, None]
    basis, size, _ = np.linalg.svd(jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300), full_matrices=False)
    basis = basis[:, size > 1e-7]
    y = weight * r
    y = y - basis @ (basis.T @ y)
    out = {}
    for name, x in orders(fit).items():
        x = (x - x.mean()) / x.std()
        t, parts = [], np.zeros(len(x))
        for z in (x, x**2):
            z = weight * z
            free = z - basis @ (basis.T @ z)
            length = float(free @ free)
            if length < 1e-4 * float(z @ z):  # the law's parameters take up this trend whole
                t.append(0.0)
                continue
            slope = float(free @ y) / length
            left = y - slope * free
            spread = np.sqrt(float(left @ left) / max(1, len(x) - basis.shape[1] - 1))
            t.append(slope * float(np.sqrt(length)) / max(float(spread), 1e-300))
            parts = np.where(abs(t[-1]) >= max(map(abs, t)), slope * free / weight, parts)
        out[name] = (t[0], t[1], float(np.ptp(parts)) / scale)
    return out


def dependence(fit: Fit) -> dict[str, tuple[float, float, float]]:
    """Per grouping (run, model size, budget): the residuals' correlation within groups, its z among permutations, and
    the factor by which errors summed within groups are larger for the worst parameter."""
    r, scale = clipped(fit)
    if scale <= 1e-12:
        return {}
    r = r - r.mean()
    shape = curvature(fit)
    plain = np.sqrt(np.maximum(np.diag(shape.covariance(np.arange(len(r)))), 1e-300))
    rng = np.random.default_rng(0)
    out = {}
    for name, label in groupings(fit).items():
        count = np.bincount(label)
        if len(count) < 5 or (count > 1).sum() < 3:
            continue
        shuffled = np.stack([r, *(rng.permutation(r) for _ in range(SHUFFLES))])
        sums = np.stack([np.bincount(label, row, minlength=len(count)) for row in shuffled])
        pairs = float((count * (count - 1)).sum())
        correlation = ((sums**2).sum(1) - (r**2).sum()) / pairs / (r**2).mean()
        z = (correlation[0] - correlation[1:].mean()) / max(float(correlation[1:].std()), 1e-300)
        wider = np.sqrt(np.maximum(np.diag(shape.covariance(label)), 0)) / plain
        out[name] = (float(correlation[0]), float(z), float(wider.max()))
    return out


def groupings(fit: Fit) -> dict[str, np.ndarray]:
    """Ways in which rows may hang together that the fit's own clusters do not cover already."""
    rows, law = fit.rows, fit.law
    out = {}
    for role in ("run", "id"):
        if role in rows.columns and role != rows.cluster:
            out[role] = groups(fit, role)[0]
    if "params" in rows.columns and (rows.columns["params"] > 0).all() and rows.cluster != "params":
        order = np.argsort(rows.columns["params"], kind="stable")
        label = np.empty(len(order), int)
        steps = np.diff(np.log(rows.columns["params"][order])) > SAME_SIZE
        label[order] = np.concatenate([[0], np.cumsum(steps)])
        out["params"] = label
    if rows.has_compute and rows.cluster not in ("flops", "budget"):
        out["budget"] = budgets(rows.compute)
    return {name: label for name, label in out.items() if law.group != name and label.max() + 1 < len(rows)}


def spread(fit: Fit) -> dict[str, tuple[float, float]]:
    """Per order (the fitted target, C): rank correlation of |residual| as z, and the ratio of spreads, top third to
    bottom third."""
    r = fit.resid.to_numpy()
    size = np.abs(r - np.median(r))
    values = {fit.law.target: fit.fittedvalues.to_numpy()}
    if fit.rows.has_compute:
        values["C"] = fit.rows.compute
    out = {}
    n = len(r)
    for name, x in values.items():
        if n < 12 or np.ptp(x) == 0:
            continue
        a, b = (np.argsort(np.argsort(v, kind="stable")) for v in (x, size))
        z = float(np.corrcoef(a, b)[0, 1] * np.sqrt(n - 1))
        third = max(4, n // 3)
        order = np.argsort(x, kind="stable")
        low, high = (float(np.median(size[part])) for part in (order[:third], order[-third:]))
        out[name] = (z, high / max(low, 1e-300))
    return out


# ------------------------------------------------------------------------------------------------ findings


def findings(fit: Fit) -> Iterator[Notice]:
    """residual-trend, dependent-rows, heteroscedastic."""
    n = len(fit.rows)
    r, scale = clipped(fit)
    if n < 2 * fit.record["free"] or scale < 1e-9:  # residuals of rounding have every pattern
        return
    strong = student_quantile(STRONG_LEVEL, n - fit.record["free"] - 1)
    bent = {name: v for name, v in trends(fit).items() if max(abs(v[0]), abs(v[1])) > strong and v[2] > SEEN}
    runs = {name: runs_test(r[np.argsort(x, kind="stable")]) for name, x in orders(fit).items()}
    few = {name: z for name, z in runs.items() if z < -STRONG}
    if bent or few:
        parts = [f"ln {k}: {'slope' if abs(a) > abs(b) else 'curvature'} {max(a, b, key=abs):+.1f} standard errors, "
                 f"{s:.1f} scales high" for k, (a, b, s) in bent.items()]  # fmt: skip
        parts += [f"too few changes of sign along {k} (z = {z:.1f})" for k, z in few.items()]
        yield Notice(
            "residual-trend",
            "warning",
            f"the residuals follow {'; '.join(parts)}: the form does not hold everywhere.",
            "look at fit.plot.residuals(), leave the corner out where it fails, or rank other forms: laws.rank.",
            {"t": {k: [v[0], v[1]] for k, v in bent.items()}, "runs_z": few},
        )
    tied = {k: v for k, v in dependence(fit).items() if v[1] > STRONG and v[0] > 0.05}
    if tied:
        name, (_, _, wider) = max(tied.items(), key=lambda kv: kv[1][2])
        yield Notice(
            "dependent-rows",
            "warning",
            f"residuals correlate within {', '.join(f'{k} ({v[0]:.2f})' for k, v in tied.items())}: intervals by "
            f"{fit.record['cluster'] or 'row'} are too narrow, by {name} up to {wider:.1f} times wider.",
            f"fit again with cluster={name!r} (a column that names each run's group).",
            {"correlation": {k: v[0] for k, v in tied.items()}, "z": {k: v[1] for k, v in tied.items()},
             "wider": {k: v[2] for k, v in tied.items()}, "cluster": name},
        )  # fmt: skip
    uneven = {k: v for k, v in spread(fit).items() if abs(v[0]) > UNEVEN and max(v[1], 1 / v[1]) > 2}
    if uneven:
        name, (z, ratio) = max(uneven.items(), key=lambda kv: abs(kv[1][0]))
        yield Notice(
            "heteroscedastic",
            "warning",
            f"residuals spread {max(ratio, 1 / ratio):.1f} times wider at "
            f"{'high' if ratio > 1 else 'low'} {name} than at the other end (rank z = {z:+.1f}).",
            "weights= that fall with the noise's square, or the bootstrap's intervals rather than cov from curvature.",
            {"order": name, "z": z, "ratio": ratio},
        )
