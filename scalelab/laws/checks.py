"""What can be wrong with a fit, each with its code: the data, the solution, the bootstrap, the use made of it.

Codes and thresholds follow the checklist of published pitfalls (constant D/N, one diverged run, early stopping, ...).
`error`: the numbers must not be used. `warning`: they may mislead. `note`: good to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from scalelab.errors import BadInput
from scalelab.laws import context
from scalelab.laws.diagnose import information
from scalelab.laws.notices import Notice, name_rows

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit
    from scalelab.laws.law import Law
    from scalelab.laws.regression import Regression
    from scalelab.laws.table import Rows

SYMBOL = {"params": "N", "tokens": "D", "flops": "C"}


def levels(values: np.ndarray) -> int:
    """Distinct values, up to one part in a million."""
    logs = np.sort(np.log(values))
    return 1 + int((np.diff(logs) > 1e-6).sum())


def _distinct(rows: Rows, law: Law) -> int:
    return len(np.unique(np.stack([rows.columns[role] for role in law.inputs]), axis=1).T)


def enough_rows(rows: Rows, law: Law, free: int) -> None:
    """Raises `BadInput` where there are fewer rows, or fewer different inputs, than free parameters."""
    inputs = " and ".join(law.inputs)
    if len(rows) < free:
        raise BadInput("table", f"{len(rows)} rows", f"{law.name} has {free} parameters: needs at least that many rows")
    if _distinct(rows, law) < free:
        raise BadInput(
            "table",
            f"{_distinct(rows, law)} different {'pairs' if len(law.inputs) == 2 else 'values'} of {inputs}",
            f"{law.name} needs at least {free} of them",
        )


def of_solution(fit: Fit) -> Iterator[Notice]:
    """Every finding that needs no refit: of the design, the columns, the solution."""
    yield from _of_design(fit.rows, fit.law, fit.record["free"])
    yield from _of_columns(fit.rows, fit.law)
    yield from context.findings(fit.rows, fit.law)
    yield from _of_solution(fit, *fit.solved)
    yield from _of_priors(fit)
    yield from fit.law.findings(fit)


def of_studies(fit: Fit) -> Iterator[Notice]:
    """Every finding that needs refits."""
    from scalelab.laws import studies  # stands on the fits that this module checks

    if fit.converged:
        yield from studies.findings(fit)


def _of_priors(fit: Fit) -> Iterator[Notice]:
    """`prior-conflict`: what priors and rows must give way to each other, 2 (V - V without priors) / noise, would be
    chi-squared with a degree of freedom for each prior if both spoke of one law."""
    priors = fit.options.priors
    if not priors:
        return
    from scipy.special import gammaincc

    told = ", ".join(f"{name} = {mean:g} +- {sd:g}" for name, (mean, sd) in priors.items())
    alone = {name: fit.record["without_priors"][fit.names.index(name)] for name in priors}
    probability = float(gammaincc(len(priors) / 2, fit.record["prior_strain"] / 2))
    if probability < 0.01:
        yield Notice(
            "prior-conflict",
            "warning",
            f"the rows alone say {', '.join(f'{name} = {value:.4g}' for name, value in alone.items())}, the priors "
            f"{told}: so far apart in {probability:.2g} of cases if both were right.",
            "see whether the prior holds for these data, tokenizer and way of counting; show the fit without it.",
            {"without_priors": alone, "priors": priors, "probability": probability},
        )


# ------------------------------------------------------------------------------------------------ the data


def _of_design(rows: Rows, law: Law, need: int) -> Iterator[Notice]:
    n, distinct = len(rows), _distinct(rows, law)
    if n < 2 * need or distinct < need + 1:
        hopeless = n < need + 3 or distinct < need + 1
        yield Notice(
            "too-few-rows",
            "error" if hopeless else "warning",
            f"{n} rows ({distinct} different inputs) for {need} parameters.",
            f"train at least {2 * need} runs.",
            {"rows": n, "distinct": distinct, "parameters": need},
        )
    for role in ("params", "tokens", "flops"):
        if role not in law.inputs:
            continue
        values, symbol = rows.columns[role], SYMBOL.get(role, role)
        if (count := levels(values)) < 3:
            yield Notice(
                "too-few-levels",
                "error",
                f"{symbol} has {count} distinct values: its coefficient, its exponent and E cannot be told apart.",
                f"train runs at three or more values of {symbol}.",
                {"column": role, "levels": count},
            )
        if (factor := float(values.max() / values.min())) < 2:
            yield Notice(
                "constant-predictor",
                "error",
                f"{symbol} varies by a factor of {factor:.3g} only: its exponent is not identified.",
                f"vary {symbol} by a factor of 10 or more, or fit a law without it.",
                {"column": role, "factor": factor},
            )
    if {"params", "tokens"} <= set(law.inputs):
        x, y = (np.log(rows.columns[role]) for role in ("params", "tokens"))
        if x.std() > 0 and y.std() > 0 and abs(corr := float(np.corrcoef(x, y)[0, 1])) > 0.98:
            yield Notice(
                "collinear-ND",
                "error",
                f"ln N and ln D are correlated at {corr:.4f} (nearly one D/N): alpha and beta cannot be told apart.",
                "add runs off this line (IsoFLOP budgets), or fit a power law in C.",
                {"correlation": corr},
            )
    if rows.has_compute and (decades := float(np.log10(rows.compute.max() / rows.compute.min()))) < 1.5:
        yield Notice(
            "narrow-range",
            "warning",
            f"the runs span {decades:.2f} decades of compute.",
            "span 1.5 decades or more; distrust anything beyond the largest run.",
            {"decades": decades},
        )


def _of_columns(rows: Rows, law: Law) -> Iterator[Notice]:
    N, D = rows.columns.get("params"), rows.columns.get("tokens")
    flops = rows.columns.get("flops")
    if N is None or D is None:
        return
    if flops is not None and (known := np.isfinite(flops) & (flops > 0)).any():
        ratio = (flops / (6 * N * D))[known]
        x = np.log(N[known])
        trend = float(np.polyfit(x - x.mean(), np.log(ratio), 1)[0]) if np.ptp(x) > 0.1 else 0.0
        if ratio.max() > 1.1 or ratio.min() < 0.9 or abs(trend) > 0.03:
            yield Notice(
                "six-nd",
                "note",
                f"the recorded FLOPs are {ratio.min():.2f} to {ratio.max():.2f} times 6ND "
                f"(they go as 6ND times N^{trend:+.3f}).",
                "give optimal() the cost of this family: flops_per_param_token=laws.flops_per_token(...).",
                {"lowest": float(ratio.min()), "highest": float(ratio.max()), "trend": trend},
            )
    unique = None if "unique_tokens" in law.inputs else rows.columns.get("unique_tokens")
    if unique is not None and (again := unique * (1 + 1e-9) < D).any():
        names = [n for n, a in zip(rows.names, again, strict=True) if a]
        epochs = float((D / unique)[again].max())
        yield Notice(
            "repeated-data",
            "warning",
            f"{len(names)} rows saw more tokens than they have unique ones, up to {epochs:.2f} epochs: "
            f"{name_rows(names)}.",
            "the law holds for one pass; use more data, or a law with a repetition term.",
            {"rows": names, "epochs": epochs},
        )


# ------------------------------------------------------------------------------------------------ the solution


def free_names(fit: Fit) -> list[str]:
    """The parameters that were fitted, in the order of the solver's coordinates."""
    return [name for name in fit.names if name not in fit.options.fixed and name not in fit.options.tied]


def _of_solution(fit: Fit, problem: Regression, theta: np.ndarray) -> Iterator[Notice]:
    record, names = fit.record, free_names(fit)
    specs = [fit.law.parameters[name] for name in names]
    if not record["converged"]:
        yield Notice(
            "not-converged",
            "error",
            f"the solver stopped after {record['iterations']} iterations short of an optimum.",
            "look for parameters that the data do not determine; report this table as a bug otherwise.",
            {"iterations": record["iterations"]},
        )
    if record["agreement"] < 0.5:
        yield Notice(
            "few-starts-agree",
            "error" if record["agreeing"] < 2 and record["starts"] > 1 else "warning",
            f"{record['agreeing']} of {record['starts']} starts reach the best objective.",
            "the optimum may be local: ask for more starts=, add runs, or widen delta.",
            {"agreement": record["agreement"]},
        )
    jacobian = problem.jacobian(theta)
    # d ln L / d ln A is the share of A's term, where the law is linear in A
    relative = jacobian if fit.options.objective.on == "log" else jacobian / fit.fittedvalues.to_numpy()[:, None]
    terms = {n: relative[:, i] for i, (n, s) in enumerate(zip(names, specs, strict=True)) if s.linear and s.sign}
    for i, name in enumerate(names):
        if (theta[i] <= problem.lower[i] and name not in terms) or theta[i] >= problem.upper[i]:
            bound = problem.lower[i] if theta[i] <= problem.lower[i] else problem.upper[i]
            yield Notice(
                "at-bound",
                "error",
                f"{name} sits on the solver's bound: that is a finding, not an estimate.",
                "look for a term that the data do not determine, or for a loss that another term explains.",
                {"parameter": name, "bound": float(bound)},
            )
    unmoved = [n for n, column in zip(names, jacobian.T, strict=True) if np.abs(column).max() < 1e-12]
    if unmoved:
        yield Notice(
            "at-start",
            "error",
            f"no row depends on {', '.join(unmoved)}: the value shown is where the search began.",
            "vary the input that it multiplies, or hold it: fixed={...}.",
            {"parameters": unmoved},
        )
    E = float(fit.estimate[fit.names.index("E")]) if "E" in fit.names else float("nan")
    lowest = float(fit.observed.min())
    if "E" in terms and np.abs(terms["E"]).max() < 1e-5:
        yield Notice(
            "E-below-zero",
            "warning",
            "the data would have an irreducible loss E of zero or less; E is held at zero.",
            "the runs are too small, or the law too stiff, to show a floor: do not extrapolate far.",
            {"E": E},
        )
    adds = "E" not in names or jacobian[:, names.index("E")].min() >= 0  # a form may subtract it
    if lowest <= E and adds:
        yield Notice(
            "E-above-min-loss",
            "warning",
            f"E = {E:.4g} is above the lowest measured loss, {lowest:.4g}.",
            "look at the lowest runs: the law does not hold for them.",
            {"E": E, "lowest": lowest},
        )
    for name, share in terms.items():
        if name != "E" and np.abs(share).max() < 0.01:
            yield Notice(
                "tiny-term",
                "warning",
                f"the term of {name} is below 1 % of the loss in every row ({np.abs(share).max():.2g} at most): "
                "its coefficient and exponent mean little.",
                "widen the sweep toward small values of that column, or fit a law without the term.",
                {"term": name, "largest_share": float(np.abs(share).max())},
            )

    value, vector = information(fit)
    # A full-rank design as wide as a real sweep gives 1e-4 to 1e-6; a line in (N, D) gives rounding.
    if value[0] < 1e-8:
        weak = [names[i] for i in np.argsort(-np.abs(vector[:, 0])) if abs(vector[i, 0]) > 0.25]
        yield Notice(
            "ill-conditioned",
            "error" if value[0] < 1e-12 else "warning",
            f"the data hardly determine the combination of {', '.join(weak)}.",
            "trust predictions inside the data rather than these parameters; widen the sweep.",
            {"eigenvalue": float(value[0]), "combination": dict(zip(names, vector[:, 0].tolist(), strict=True))},
        )


# ------------------------------------------------------------------------------------------------ the use


def extrapolation(fit: Fit, columns: Mapping[str, np.ndarray], flops: np.ndarray | None = None) -> None:
    """Adds `far-extrapolation` where N, D, D/N or C lie outside the fitted range: beyond a decade it warns."""
    rows = fit.rows
    roles = [role for role in fit.law.inputs if role != fit.law.group and role not in fit.law.may_be_zero]
    known = {SYMBOL.get(role, role): rows.columns[role] for role in roles}
    wanted = {SYMBOL.get(role, role): columns[role] for role in roles if role in columns}
    if {"N", "D"} <= set(known) and {"N", "D"} <= set(wanted):
        known |= {"C": rows.compute, "D/N": known["D"] / known["N"]}
        wanted |= {"C": 6.0 * wanted["N"] * wanted["D"] if flops is None else flops, "D/N": wanted["D"] / wanted["N"]}
    distance = {}
    for name in sorted(known.keys() & wanted.keys()):
        have, ask = known[name], wanted[name]
        if not ((have > 0).all() and (ask > 0).all()):
            continue
        beyond = max(np.log10(ask.max() / have.max()), np.log10(have.min() / ask.min()))
        if beyond > 0.05:
            distance[name] = float(beyond)
    if not distance:
        return
    furthest = max(distance.values())
    if any(n.code == "far-extrapolation" and max(n.numbers["decades"].values()) >= furthest for n in fit.notices):
        return
    if rows.has_compute and distance.get("C", 0.0) > (span := float(np.log10(rows.compute.max() / rows.compute.min()))):
        fit.add(
            Notice(
                "narrow-range",
                "warning",
                f"asked {distance['C']:.2f} decades of compute beyond runs that span {span:.2f}.",
                "ask nearer, or train larger runs first.",
                {"decades": span, "distance": distance["C"]},
            )
        )
    held = fit.holdout()
    error = (
        f"held-out error at {held.distance:.2f} decades: {held.error:.2%}" if held.ok else "no held-out error is known"
    )
    fit.add(
        Notice(
            "far-extrapolation",
            "warning" if furthest > 1 else "note",
            f"asked beyond the data by {', '.join(f'{d:.2f} decades of {n}' for n, d in distance.items())} ({error}).",
            "train a run nearer to the target; an interval covers the noise, not a wrong form.",
            {"decades": distance, "holdout_error": held.error if held.ok else None},
        )
    )


def no_optimum(fit: Fit, budgets: np.ndarray, N: np.ndarray) -> None:
    missing = budgets[~np.isfinite(N)]
    if len(missing):
        fit.add(
            Notice(
                "no-interior-optimum",
                "warning",
                f"no interior optimum under this cost at C = {name_rows(f'{c:.3g}' for c in missing)} FLOPs.",
                "check the cost function and the exponents' signs.",
                {"flops": missing.tolist()},
            )
        )


def floor(fit: Fit, values: np.ndarray, where: str) -> None:
    """Adds `floor-dominates` where a predicted loss lies within 5 % of E."""
    E = float(fit.estimate[fit.names.index("E")]) if "E" in fit.names else float("nan")
    near = np.isfinite(values) & (values < 1.05 * E)
    if near.any():
        fit.add(
            Notice(
                "floor-dominates",
                "note",
                f"{where}, the loss {values[near].min():.4g} is {values[near].min() / E - 1:.1%} above E = {E:.4g}, "
                "which decides it: the exponents hardly matter.",
                "judge by the interval of E; larger runs pin it down.",
                {"loss": values[near].tolist(), "E": E},
            )
        )


def stale(fit: Fit, names: list[str]) -> None:
    """Adds `stale-compare` where constants of other papers are used beside this fit."""
    kind = ", ".join(sorted({str(v) for v in fit.rows.columns.get("params_kind", ["params"])}))
    fit.add(
        Notice(
            "stale-compare",
            "note",
            f"constants of {', '.join(names)} hold for their data, tokenizer and way of counting N, not for these runs "
            f"(N: {kind}).",
            "compare exponents and optima, not losses; fit their published runs the same way where they exist.",
            {"published": names},
        )
    )
