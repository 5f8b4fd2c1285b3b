"""Arms against each other: compute multiplier, loss differences, who is better where, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scalelab.errors import BadInput
from scalelab.laws import contrast, frontier
from scalelab.laws.allocate import Cost, flops_per_token
from scalelab.laws.comparison import Comparison
from scalelab.laws.fit import Fit
from scalelab.laws.frontier import Arm
from scalelab.laws.law import Law
from scalelab.laws.notices import Notice
from scalelab.laws.objective import robust_scale
from scalelab.laws.paired import resamples, units
from scalelab.laws.result import provenance
from scalelab.laws.shared import ArmFit, SharedFit
from scalelab.laws.simulate import named
from scalelab.laws.table import Table

POWER = 2.8  # z(0.975) + z(0.8): a difference of 2.8 standard errors is found in 80 % of studies
POINTS = 13
LIKELY = 0.9  # below this probability of lying within the data a crossing is not to be relied on
KINDS = {"tokenizer": "mixed-evals", "eval_set": "mixed-evals", "params_kind": "mixed-N-kinds"}

Side = Fit | Table | tuple[str | Law, str | Mapping[str, float]]


def compare(
    arms: Mapping[str, Side] | SharedFit,
    C: Sequence[float] | np.ndarray | None = None,
    pair: str | Sequence[str] | None = None,
    *,
    law: str | Law | None = None,
    cost: Cost | Mapping[str, Cost] = 6.0,
    others: Mapping[str, Any] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    **options: Any,
) -> Comparison:
    """Compare arms (architectures, recipes, data sets) by their laws. The first arm is the reference.

    At a budget C, with L_k(C) arm k's loss at its own compute-optimal N and D:
      multiplier: what share of C the arm needs to reach the reference's L(C): C'/C with L_arm(C') = L_reference(C).
        Below 1 the arm is better. 0 or inf: more than four decades away, or under the arm's floor.
      difference: L_arm - L_reference at equal compute; at equal N and at equal D (the reference's optimal one, the
        whole budget spent on either side); in equal time, where tables have `seconds`. Negative: the arm is better.
      probability: share of draws in which the arm is better.
      verdict: the better arm where the interval of the *difference* excludes zero at `level`; else "no verdict".
    The crossing is the C at which L_arm = L_reference; its interval the budgets around it that have no verdict (the
    test of no difference, inverted: it covers as often as the test does); `probability_inside` the share of draws that
    cross within the data of both arms.

    Args:
      arms: name -> a `Fit`; or a table, fitted with `law` and `options` (as in `Law.fit`); or (law, constants), where
        constants are parameter -> value or a name in `Law.published`, taken as exact. Or a `SharedFit`.
      C: budgets in FLOPs; a tuple (low, high) is a range of 13. None: from the least compute in the data to ten times
        the most.
      pair: column (or columns) whose equal values mark runs of different arms as counterparts. The laws are then fitted
        to the same resampled runs. For a `Fit`: a column that it read, as params, tokens, seed, run, id.
        None: draws of different arms are independent, and the interval is the wide one.
      cost: k of C = k N D, or FLOPs per token as a function of N; one for all, or arm -> its own.
      others: values of a law's further inputs: role -> value, or arm -> {role: value}.
      bootstrap, seed: of the fits that are made here.

    Raises `BadInput` for what cannot be compared; what makes the result doubtful is in `Comparison.warnings`.
    """
    if not 0 < level < 1:
        raise BadInput("level", level, "must lie between 0 and 1")
    if isinstance(arms, SharedFit):
        arms = {name: arms.arm(name) for name in arms.arms}
    if len(arms) < 2:
        raise BadInput("arms", list(arms), "a comparison needs two or more")
    sides = [_side(name, given, law, pair, bootstrap, seed, options) for name, given in arms.items()]
    drawn = _draw(sides, pair, bootstrap, seed)
    built = _built(sides, cost, others)
    notices = [*_of_sides(sides), *([] if drawn != "independent" else [_unpaired(sides)])]
    inside = _inside(built)
    budgets = _budgets(C, built)
    grid = frontier.window(budgets, *([np.array(inside)] if inside else []))
    names = [arm.name for arm in built]
    seconds = [side.seconds for side in sides]
    reference = built[0]
    best = [arm.optimum(budgets) for arm in built]
    on_grid = [arm.optimum(np.exp(grid))[2] for arm in built]
    frames, crossed = [], {}
    for k, arm in enumerate(built[1:], start=1):
        rows = contrast.differences(names[0], arm.name, best[0][2], best[k][2], level)
        rows = pd.concat([rows, contrast.multipliers(best[0][2], grid, on_grid[k], budgets, level)], axis=1)
        parts = {"compute": rows}
        for at, pair_of_losses in _elsewhere(reference, arm, best[0], budgets, seconds[0], seconds[k]).items():
            parts[at] = contrast.differences(names[0], arm.name, *pair_of_losses, level)
        for at, part in parts.items():
            part.insert(0, "flops", budgets)
            part.insert(0, "at", at)
            part.insert(0, "arm", arm.name)
        frames += parts.values()
        found = contrast.crossing(on_grid[k] - on_grid[0], grid, inside, level)
        above = {-1: arm.name, 1: names[0], 0: ""}[found.pop("arm_above")]
        crossed[arm.name] = found | {"better_above": above}
    contrasts = pd.concat(frames, ignore_index=True)
    low, high = inside or (np.nan, np.nan)
    contrasts["inside"] = (contrasts["flops"] >= low * (1 - 1e-9)) & (contrasts["flops"] <= high * (1 + 1e-9))
    table = pd.DataFrame.from_dict(crossed, orient="index").rename_axis("arm")
    notices += [*_of_crossings(table, inside), *_of_gaps(contrasts, sides)]
    record = {
        "arms": names,
        "laws": ", ".join(f"{a.name}: {a.law.name}" for a in built),
        "level": level,
        "draws": int(min(len(a.samples) for a in built)),
        "drawn": drawn,
        "pair": pair if pair is None or isinstance(pair, str) else list(pair),
        "seed": seed,
        "inside": list(inside) if inside else None,
        "data_sha256": {s.name: None if s.fit is None else s.fit.record["data_sha256"] for s in sides},
        **provenance(),
    }
    return Comparison(contrasts, _curves(built, best, budgets, level), table, notices, record)


# ------------------------------------------------------------------------------------------------ the arms


@dataclasses.dataclass
class _Side:
    """An arm as it was given: a fit, or a law with constants."""

    name: str
    law: Law
    params: np.ndarray
    fit: Fit | None = None
    samples: np.ndarray | None = None
    keys: list[Any] | None = None  # of the rows of the fit, where arms are paired
    seconds: Any = None  # N -> seconds per token


def _side(name: str, given: Side, law: Any, pair: Any, bootstrap: int, seed: int, options: dict[str, Any]) -> _Side:
    if isinstance(given, tuple):
        form, constants = named(given[0]), given[1]
        if isinstance(constants, str):
            if constants not in form.published:
                raise BadInput(f"arm {name}", constants, f"must be one of {', '.join(form.published) or 'none'}")
            constants = form.published[constants]
        missing = [p for p in form.parameters if p not in constants]
        if missing:
            raise BadInput(f"arm {name}", list(constants), f"lack {', '.join(missing)}")
        return _Side(name, form, np.array([float(constants[p]) for p in form.parameters]))
    wanted = [] if pair is None else [pair] if isinstance(pair, str) else list(pair)
    if isinstance(given, Fit):
        fit, columns, where = given, given.rows.columns, np.arange(len(given.rows))
    else:
        if law is None:
            raise BadInput(f"arm {name}", "a table", "needs a law to be fitted: compare(..., law='chinchilla')")
        draws = 0 if pair is not None else bootstrap
        fit = named(law).fit(given, bootstrap=draws, seed=seed, **options)
        columns = {str(c): np.asarray(v) for c, v in pd.DataFrame(given).items()}
        where = np.array([np.flatnonzero(fit.rows.position == i)[0] for i in range(len(fit.rows))])
    lacking = [c for c in wanted if c not in columns]
    if lacking:
        raise BadInput("pair", lacking[0], f"no such column in arm {name}; it has {', '.join(columns)}")
    keys = list(zip(*(np.asarray(columns[c])[where].tolist() for c in wanted), strict=True)) if wanted else None
    side = _Side(name, fit.law, fit.estimate, fit, fit.samples, keys)
    if "seconds" in columns and {fit.law.paid, "tokens"} <= set(fit.rows.columns):
        N, D = fit.rows.columns[fit.law.paid], fit.rows.columns["tokens"]
        time = np.asarray(columns["seconds"], float)[where]
        if (np.isfinite(time) & (time > 0)).all():
            side.seconds = flops_per_token(N, D, time)
    return side


def _draw(sides: list[_Side], pair: Any, bootstrap: int, seed: int) -> str:
    """Brings the sides' samples into one number of draws that belong together; says how they do."""
    fits = [s.fit for s in sides if s.fit is not None]
    wholes = {id(f.whole) if isinstance(f, ArmFit) else None for f in fits}
    if len(wholes) == 1 and None not in wholes:
        whole = fits[0].whole  # type: ignore[attr-defined]
        how = "of one shared fit" + (f", paired by {whole.record['pair']}" if whole.record["pair"] else "")
    elif pair is not None:
        if len(fits) < len(sides) or any(isinstance(f, ArmFit) for f in fits):
            raise BadInput("pair", pair, "needs an arm's runs: tables or separate fits, no constants")
        label = pair if isinstance(pair, str) else ", ".join(pair)
        code = np.repeat(np.arange(len(fits)), [len(f.rows) for f in fits])
        keys = [k for s in sides for k in s.keys or ()]
        together = [v for f in fits for v in (f.rows.clusters if f.rows.clusters is not None else range(len(f.rows)))]
        drawn = units(code, keys, together)
        shares = resamples([f.rows for f in fits], drawn, label, bootstrap, seed, [f.record["free"] for f in fits])
        for side, fit, share in zip(sides, fits, shares, strict=True):
            about = {"columns": fit.record["columns"]}
            side.fit = fit.law.fit_rows(fit.rows, fit.options, share, about, near=fit.estimate)
            side.samples = side.fit.samples
        how = f"paired by {label} ({drawn.matched} matched of {int(drawn.unit.max()) + 1})"
    else:
        how = "independent"
        # Fits of one seed drew rows with the same random numbers: put them in different orders
        for k, side in enumerate(sides[1:], start=1):
            if side.fit is not None and side.samples is not None:
                side.samples = np.random.default_rng([seed, k]).permutation(side.samples)
    known = [len(s.samples) for s in sides if s.samples is not None]
    usable = all(f.ok for f in fits)
    draws = min(known, default=0) if usable else 0
    for side in sides:
        side.samples = np.tile(side.params, (draws, 1)) if side.samples is None else side.samples[:draws]
    return how


def _built(sides: list[_Side], cost: Any, others: Mapping[str, Any] | None) -> list[Arm]:
    names = [s.name for s in sides]
    if isinstance(cost, Mapping) and set(cost) != set(names):
        raise BadInput("cost", list(cost), f"must name every arm: {', '.join(names)}")
    arms = []
    for side in sides:
        mine = cost[side.name] if isinstance(cost, Mapping) else cost
        extra = dict(others or {})
        extra = dict(extra[side.name]) if side.name in extra else {k: v for k, v in extra.items() if k not in names}
        assert side.samples is not None
        rows = None if side.fit is None else side.fit.rows
        arm = Arm(side.name, side.law, side.params, side.samples, mine, extra, rows)
        frontier.check(arm)
        arms.append(arm)
    return arms


def _inside(arms: list[Arm]) -> tuple[float, float] | None:
    """The compute that the data of all arms span."""
    known = [a.rows.compute for a in arms if a.rows is not None and a.rows.has_compute]
    if not known:
        return None
    low, high = max(c.min() for c in known), min(c.max() for c in known)
    return (float(low), float(high)) if low < high else None


def _budgets(C: Any, arms: list[Arm]) -> np.ndarray:
    if C is None:
        known = [a.rows.compute for a in arms if a.rows is not None and a.rows.has_compute]
        if not known:
            raise BadInput("C", None, "arms without runs have no range of compute: name the budgets")
        C = (min(c.min() for c in known), 10 * max(c.max() for c in known))
    budgets = np.atleast_1d(np.asarray(C, float))
    if budgets.ndim != 1 or not len(budgets) or not (np.isfinite(budgets) & (budgets > 0)).all():
        raise BadInput("C", C, "must be positive FLOPs, one number or a list of them")
    return np.geomspace(budgets[0], budgets[1], POINTS) if isinstance(C, tuple) and len(budgets) == 2 else budgets


def _elsewhere(
    reference: Arm, arm: Arm, best: list[np.ndarray], budgets: np.ndarray, our_time: Any, their_time: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Losses of both arms where something else than compute is equal."""
    if not (reference.law.allocates and arm.law.allocates):
        return {}
    N, D = best[0][0], best[1][0]
    ours = reference.loss(N, D)
    out = {
        "params": (ours, arm.loss(N, arm.tokens(budgets, N))),
        "tokens": (ours, arm.loss(arm.size(budgets, D), D)),
    }
    if our_time is not None and their_time is not None:
        time = our_time(N) * D
        known = np.isfinite(time)
        losses = []
        for side, seconds in ((reference, our_time), (arm, their_time)):
            loss = np.full(ours.shape, np.nan)
            if known.any():  # in units in which a budget of time is a number like one of FLOPs
                unit = float(np.median(budgets[known] / time[known]))
                loss[:, known] = side.optimum(time[known] * unit, lambda n, s=seconds, u=unit: s(n) * u)[2]
            losses.append(loss)
        if np.isfinite(losses).any():
            out["seconds"] = (losses[0], losses[1])
    return out


def _curves(arms: list[Arm], best: list[list[np.ndarray]], budgets: np.ndarray, level: float) -> pd.DataFrame:
    frames = []
    for arm, values in zip(arms, best, strict=True):
        frame = pd.DataFrame({"arm": arm.name, "flops": budgets})
        for name, value in zip(("params", "tokens", "loss"), values, strict=True):
            frame[name] = value[0]
            frame[f"{name}_lower"], frame[f"{name}_upper"] = contrast.band(value[1:], level)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


# ------------------------------------------------------------------------------------------------ findings


def _of_sides(sides: list[_Side]) -> list[Notice]:
    found = []
    for side in sides:
        if side.fit is None:
            found.append(
                Notice(
                    "stale-compare",
                    "warning",
                    f"{side.name} is given by constants: they hold for their source's data, tokenizer and way of "
                    "counting parameters, and are taken as exact.",
                    "fit both arms to runs of your own.",
                    {"arm": side.name},
                )
            )
        elif not side.fit.ok:
            codes = [n.code for n in side.fit.notices if n.severity == "error"]
            found.append(
                Notice(
                    "arm-unusable",
                    "error",
                    f"the fit of {side.name} must not be used ({', '.join(codes)}): no interval, no verdict.",
                    "see that fit's own warnings.",
                    {"arm": side.name, "codes": codes},
                )
            )
    fits = [s.fit for s in sides if s.fit is not None]
    for role, code in KINDS.items():
        kinds = [sorted({str(v) for v in f.rows.columns[role]}) for f in fits if role in f.rows.columns]
        if any(k != kinds[0] for k in kinds):
            found.append(
                Notice(
                    code,
                    "warning",
                    f"arms differ in {role}: {'; '.join(', '.join(k) for k in kinds)}.",
                    "compare losses of one evaluation and N of one kind (bits per byte where tokenizers differ).",
                    {"column": role, "values": kinds},
                )
            )
    return found


def _unpaired(sides: list[_Side]) -> Notice:
    fits = [s.fit for s in sides if s.fit is not None]
    possible = []
    for role in ("run", "seed", "data_seed", "params", "tokens"):
        values = [f.rows.columns.get(role) for f in fits]
        if len(values) > 1 and all(v is not None for v in values):
            common = set.intersection(*(set(v.tolist()) for v in values))  # type: ignore[union-attr]
            if len(common) > 2:
                possible.append(role)
    hint = f"; {', '.join(possible)} have common values" if possible else ""
    return Notice(
        "unpaired",
        "note",
        f"the arms' draws are independent: what their runs have in common widens the intervals{hint}.",
        "give runs of both arms the same seeds, data order and (N, D), and name the column that matches them: pair=.",
        {"possible": possible},
    )


def _of_crossings(table: pd.DataFrame, inside: tuple[float, float] | None) -> list[Notice]:
    far = []
    for arm, row in table.iterrows():
        if np.isnan(row.flops):
            continue
        within = inside is not None and inside[0] <= row.flops <= inside[1]
        if not within or not row.probability_inside >= LIKELY:
            far.append((str(arm), float(row.flops), float(row.probability_inside)))
    if not far:
        return []
    said = ", ".join(f"{arm} at {c:.3g} FLOPs (P = {p:.2g})" for arm, c, p in far)
    return [
        Notice(
            "crossover-outside",
            "warning",
            f"a crossing lies outside the data, or within it with a probability under {LIKELY:.0%}: {said}.",
            "train both arms at that compute before relying on it.",
            {
                "arms": [a for a, _, _ in far],
                "flops": [c for _, c, _ in far],
                "probability_inside": [p for *_, p in far],
            },
        )
    ]


def _of_gaps(contrasts: pd.DataFrame, sides: list[_Side]) -> list[Notice]:
    """`small-gap`: below the scatter of one run, or below what this design finds in 80 % of studies."""
    fits = [s.fit for s in sides if s.fit is not None]
    rows: Any = contrasts[(contrasts["at"] == "compute") & contrasts["difference"].notna()]
    if not fits or rows.empty:
        return []
    scale = max(robust_scale(f.resid.to_numpy()) for f in fits)
    on_logs = all(f.options.objective.on == "log" for f in fits)
    flops, gap, lower, upper, loss = (
        rows[c].to_numpy(float) for c in ("flops", "difference", "lower", "upper", "loss_reference")
    )
    noise = scale * (loss if on_logs else np.ones_like(loss))
    detectable = POWER * (upper - lower) / (2 * 1.96)
    small = (np.abs(gap) < noise) | (np.abs(gap) < detectable)
    if not small.any():
        return []
    best = float(np.nanmin(detectable)) if np.isfinite(detectable).any() else float("nan")
    return [
        Notice(
            "small-gap",
            "warning",
            f"at {small.sum()} of {len(rows)} budgets the difference is below the scatter of a run ({noise.max():.2g}) "
            f"or below the smallest that these runs find with 80 % power ({best:.2g} at best).",
            "train more runs, or pair them; laws.detectable says how many.",
            {"flops": flops[small].tolist(), "noise": float(noise.max()), "detectable": best},
        )
    ]
