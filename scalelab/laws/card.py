"""The reproducibility list of a fit, filled in from what the fit knows (after Li, Kudugunta & Zettlemoyer 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scalelab.laws.noise import seed_noise
from scalelab.laws.solver import TOLERANCE
from scalelab.laws.validate import scale_of

if TYPE_CHECKING:
    from scalelab.laws.fit import Fit

UNKNOWN = "not in the table"


class Card(dict[str, str]):
    """Question -> answer; as text, a Markdown list."""

    def __str__(self) -> str:
        return "\n".join(f"- **{question}**: {answer}" for question, answer in self.items())

    def _repr_markdown_(self) -> str:
        return str(self)


def of(fit: Fit) -> Card:
    """See `Fit.card`. Runs the hold-out and the sensitivity table where they have not run yet."""
    r, rows, law, options = fit.record, fit.rows, fit.law, fit.options
    size, called = scale_of(fit)
    known: Any = fit.conf_int()
    shown = [
        f"{name} = {value:.6g}"
        + (f" [{known.lower[name]:.4g}, {known.upper[name]:.4g}]" if np.isfinite(known.lower[name]) else "")
        for name, value in fit.params.items()
    ]
    held = (
        [f"{k} = {v:g} held" for k, v in options.fixed.items()]
        + [f"{k} = {v} tied" for k, v in options.tied.items()]
        + [f"{k} = {mean:g} +- {sd:g} as prior" for k, (mean, sd) in options.priors.items()]
    )
    dropped = [
        n for n in fit.notices if n.code in ("run-not-done", "nonfinite-row", "nonpositive-row", "duplicate-rows")
    ]
    purpose = f"predict {law.target}" + (", and choose N and D for a budget" if law.allocates else "")
    return Card({
        "law": f"{law.name}: {law.equation} ({law.source})",
        "purpose": purpose,
        "parameters": ", ".join(shown + held),
        "runs": f"{r['rows']} of {r['rows_in_table']} rows; " + ", ".join(_ranges(fit)),
        "rows left out, and why": " ".join(n.message for n in dropped) or "none",
        "columns": ", ".join(f"{role} = {column}" for role, column in r["columns"].items()) or "named by roles",
        "N counts": _said(fit, "params_kind") if "params" in law.inputs else "not used",
        "D": _unique(fit),
        "FLOPs": _flops(fit),
        "architecture": _said(fit, "family"),
        "tokenizer, context, vocabulary": "; ".join(_said(fit, k) for k in ("tokenizer", "seq_len", "vocab_size")),
        "training recipe": "; ".join(
            _said(fit, k) for k in ("lr", "batch_tokens", "schedule", "parametrization")),
        "seeds": _said(fit, "seed"),
        "seed noise": str(seed_noise(rows, law.inputs, law.target)),
        "loss measured on": _said(fit, "eval_set"),
        "objective": f"{r['objective']} = {r['value']:.12g}; weights: {r['weights']}",
        "optimizer": f"damped Newton with exact derivatives, until its quadratic model promises under {TOLERANCE:g} of "
        f"the objective; {'converged' if r['converged'] else 'NOT CONVERGED'} in {r['iterations']} iterations; "
        f"{r['agreement']:.0%} of {r['starts']} starts agree",
        "intervals": _intervals(fit),
        "hold-out": fit.holdout().summary().removeprefix("hold-out: "),
        "sensitivity": _sensitivity(fit),
        "findings": "; ".join(f"{n.severity} {n.code}" for n in fit.warnings) or "none",
        "ordered by": f"{called} from {size.min():.3g} to {size.max():.3g}",
        "data": f"SHA-256 {r['data_sha256']} of inputs, target and weights",
        "versions": ", ".join(f"{k} {v}" for k, v in r["versions"].items()) + f"; {r['time']}",
    })  # fmt: skip


def _ranges(fit: Fit) -> list[str]:
    out = []
    for role in (*fit.law.inputs, fit.law.target):
        if role == fit.law.group:
            out.append(f"{role}: {', '.join(fit.rows.labels)}")
        else:
            values = fit.rows.columns[role]
            out.append(f"{role} {values.min():.4g} to {values.max():.4g}")
    return out


def _said(fit: Fit, role: str) -> str:
    """A column's values, few by name and numbers by range; that it is not known, where the table does not have it."""
    values: Any = fit.rows.columns.get(role)
    if values is None:
        return f"{role} {UNKNOWN}"
    known: Any = pd.Series(values).dropna()
    if not len(known):
        return f"{role} {UNKNOWN}"
    different = sorted(set(known.tolist()), key=str)
    if len(different) <= 5:
        return f"{role} {', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in different)}"
    if np.issubdtype(known.dtype, np.number):
        return f"{role} {known.min():.4g} to {known.max():.4g} ({len(different)} values)"
    return f"{role}: {len(different)} different"


def _unique(fit: Fit) -> str:
    D, unique = fit.rows.columns.get("tokens"), fit.rows.columns.get("unique_tokens")
    if D is None:
        return "not used"
    if unique is None or not np.isfinite(unique).any():
        return "whether tokens repeat is " + UNKNOWN
    epochs = float(np.nanmax(D / unique))
    return "every token seen once" if epochs < 1.0001 else f"up to {epochs:.2f} epochs"


def _flops(fit: Fit) -> str:
    rows = fit.rows
    if not rows.has_compute:
        return "not known"
    flops = rows.columns.get("flops")
    if flops is None or not (np.isfinite(flops) & (flops > 0)).any():
        return "6 N D"
    if "params" not in rows.columns or "tokens" not in rows.columns:
        return "the table's"
    ratio = rows.compute / (6 * rows.columns["params"] * rows.columns["tokens"])
    return f"the table's, {ratio.min():.3g} to {ratio.max():.3g} times 6 N D"


def _intervals(fit: Fit) -> str:
    r = fit.record
    if not r["draws"]:
        return "none (no bootstrap)"
    failed = f", {r['draws_failed']} failed, {r['draws_at_boundary']} on a bound"
    told = f"percentiles of {r['draws']} bootstrap draws ({r['bootstrap']}), seed {r['seed']}{failed}"
    return told if fit.ok else f"withheld: the fit is not to be used ({told})"


def _sensitivity(fit: Fit) -> str:
    if not fit.converged:
        return "not run: the fit has not converged"
    table: Any = fit.sensitivity()
    kind = f" x {table['N'].nunique()} ways of counting N" if "N" in table and table["N"].nunique() > 1 else ""
    names = [n for n in table.columns if " at " in n] + [
        n for n in fit.names if n in table and n not in fit.options.fixed
    ]
    spans = [f"{n} {table[n].min():.4g} to {table[n].max():.4g}" for n in names if table[n].notna().any()]
    return (
        f"{len(table)} fits ({table['dropped'].nunique()} numbers of highest losses dropped x "
        f"{table[['objective', 'delta']].drop_duplicates().shape[0]} objectives{kind}): {', '.join(spans)}"
    )
