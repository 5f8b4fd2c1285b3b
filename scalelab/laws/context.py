"""How the runs were trained and evaluated, as far as the table says: what one law should not mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scalelab.laws.notices import Notice, name_rows

if TYPE_CHECKING:
    from scalelab.laws.law import Law
    from scalelab.laws.table import Rows

DECAYING = ("cosine", "linear", "wsd", "trapezoid", "decay", "inverse", "cooldown")  # parts of schedules' names
TRANSFERS = ("mup", "completep", "µp")  # parametrizations under which one learning rate serves every width
KINDS = {
    "schedule": ("mixed-schedules", "the learning-rate schedule",
                 "fit each schedule by itself: the same run ends at another loss under another schedule."),
    "family": ("mixed-families", "the architecture",
               "fit each family by itself and compare (laws.compare), or share parameters (laws.fit_shared)."),
    "params_kind": ("mixed-N-kinds", "the way of counting N",
                    "count N one way in all rows; fit again under the other to see what it changes."),
}  # fmt: skip
EVALS = ("eval_set", "tokenizer", "seq_len", "vocab_size")


def findings(rows: Rows, law: Law) -> Iterator[Notice]:
    """mixed-schedules, mixed-families, mixed-N-kinds, cut-cosine, untuned-lr, mixed-evals."""
    for role, (code, what, remedy) in KINDS.items():
        values = _labels(rows, role)
        if role not in (*law.needs, law.group) and len(values) > 1:
            yield Notice(
                code, "warning", f"{what} differs among rows: {', '.join(values)}.", remedy, {"values": values}
            )
    yield from _cut(rows, law)
    yield from _evals(rows, law)
    yield from _rates(rows, law)


def _labels(rows: Rows, role: str) -> list[str]:
    """Different known values of a column, in order; none where it is not there."""
    if role not in rows.columns:
        return []
    return sorted({str(v) for v in rows.columns[role] if not pd.isna(v) and str(v)})


def _cut(rows: Rows, law: Law) -> Iterator[Notice]:
    step, total = rows.columns.get("step"), rows.columns.get("steps")
    if step is None or total is None or "schedule" not in rows.columns or "step" in law.needs:
        return
    decaying = np.array([any(part in str(s).lower() for part in DECAYING) for s in rows.columns["schedule"]])
    cut = decaying & (step < 0.999 * total)  # the last evaluation may be a step short
    if cut.any():
        names = [n for n, c in zip(rows.names, cut, strict=True) if c]
        yield Notice(
            "cut-cosine",
            "warning",
            f"{len(names)} rows stop before their decaying schedule ends: {name_rows(names)}; their learning rate is "
            "still high.",
            "use final points only, or a law of whole loss curves.",
            {"rows": names, "share_done": (step / total)[cut].tolist()},
        )


def _evals(rows: Rows, law: Law) -> Iterator[Notice]:
    mixed = {role: _labels(rows, role) for role in EVALS if role not in law.inputs}
    per_byte = law.target in ("bpb", "error", "accuracy")  # comparable whatever the tokens are
    mixed = {k: v for k, v in mixed.items() if len(v) > 1 and not (per_byte and k in ("tokenizer", "vocab_size"))}
    if mixed:
        what = "; ".join(f"{k}: {', '.join(v[:4])}{', ...' * (len(v) > 4)}" for k, v in mixed.items())
        yield Notice(
            "mixed-evals",
            "warning",
            f"rows differ in how their loss was measured ({what}).",
            "evaluate all runs alike; across tokenizers compare bits per byte (target bpb), not loss per token.",
            {"values": mixed},
        )


def _rates(rows: Rows, law: Law) -> Iterator[Notice]:
    rate, N = rows.columns.get("lr"), rows.columns.get("params")
    if rate is None or N is None or "lr" in law.needs:
        return
    known = np.isfinite(rate) & (rate > 0) & np.isfinite(N) & (N > 0)
    if known.sum() < 4:
        return
    rate, N, loss = rate[known], N[known], rows.columns[law.target][known]
    names = [n for n, k in zip(rows.names, known, strict=True) if k]
    transfers = _labels(rows, "parametrization")
    wide = N.max() >= 10 * N.min()
    constant = rate.max() < 1.01 * rate.min()
    if constant and wide and not (transfers and all(any(t in s.lower() for t in TRANSFERS) for s in transfers)):
        yield Notice(
            "untuned-lr",
            "warning",
            f"one learning rate ({rate[0]:.3g}) for models of {N.min():.3g} to {N.max():.3g} parameters: it "
            "is tuned at one size at most, which tilts the law.",
            "tune it at three sizes and interpolate, use a rule for it, or a parametrization under which it transfers.",
            {"lr": float(rate[0]), "kind": "constant"},
        )
        return
    # rows that differ in nothing but the learning rate are a sweep of it
    key = np.stack([rows.columns[role][known] for role in law.inputs])
    _, group = np.unique(key, axis=1, return_inverse=True)
    group = group.reshape(-1)
    edge, swept = [], []
    for g in np.unique(group):
        mine = np.flatnonzero(group == g)
        if len(np.unique(rate[mine])) < 3:
            continue
        swept.append(float(N[mine[0]]))
        best = mine[np.argmin(loss[mine])]
        if rate[best] in (rate[mine].min(), rate[mine].max()):
            edge.append(names[best])
    if edge:
        yield Notice(
            "untuned-lr",
            "warning",
            f"the best learning rate lies on the edge of its sweep in {len(edge)} of {len(swept)} places: "
            f"{name_rows(edge)}.",
            "widen these sweeps until the best rate lies inside.",
            {"rows": edge, "kind": "edge"},
        )
    elif len(set(swept)) == 1 and wide:
        yield Notice(
            "untuned-lr",
            "warning",
            f"the learning rate was swept at one size only (N = {swept[0]:.3g}).",
            "sweep it at two more sizes: the optimum moves with N and D.",
            {"params": swept[0], "kind": "one scale"},
        )
