"""The envelope of training curves: at each compute the run with the lowest loss; N* ~ C^a and D* ~ C^b through them.

Hoffmann et al. 2022, approach 1. The curve of a run whose learning rate has not come to its end lies above the law:
either the schedule is flat where the curve is read, or runs of several lengths take part, each best near its own end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from scalelab.errors import BadInput
from scalelab.laws.allocation import NAMES, AllocationFit, power_laws
from scalelab.laws.notices import Notice, name_rows
from scalelab.laws.result import jsonable, provenance
from scalelab.laws.table import Rows, Table, prepare

POINTS = 1500  # of compute, log-spaced, at which the envelope is read, as in the source
ELEMENTS = 1 << 22  # draws x runs x points in memory at once
SIZES = 4  # distinct sizes on the envelope, below which its line rests on too few steps


def envelope(
    table: Table,
    *,
    columns: Mapping[str, str] | None = None,
    run: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    drop: bool = False,
) -> EnvelopeFit:
    """Compute-optimal parameters and tokens from the lower envelope of training curves.

    Args:
      table: rows along the curves, with `params`, `tokens` (seen so far), `loss`, and, where known, `flops` (spent so
        far; 6 N D otherwise), as `records.curves` gives them.
      columns: role -> column, as in `laws.fit`.
      run: the column that says which run a row is of; by default `run`, or `id`.
      bootstrap: draws of whole runs, with replacement.
      seed: of the bootstrap.
      drop: leave unusable rows out instead of raising.

    At each of 1,500 log-spaced amounts of compute, among the curves that reach over it (interpolated, never
    extrapolated), the one with the lowest loss gives N* and D*. Where that is the smallest or the largest of those
    sizes the minimum lies outside the sweep: these ends are dropped. Lines are least squares in logs. N* moves in steps
    from size to size; each step on the envelope is whole, which keeps the slope unbiased for evenly spaced sizes.
    """
    if not isinstance(bootstrap, int | np.integer) or isinstance(bootstrap, bool) or bootstrap < 0:
        raise BadInput("bootstrap", bootstrap, "must be a number of draws, 0 for none")
    rows = prepare(table, ("params", "tokens"), columns=columns, cluster="auto" if run is None else run, drop=drop)
    if rows.clusters is None:
        raise BadInput("table", list(rows.columns), "needs a column that says which run a row is of; name it: run=...")
    log_c, curves, names = _curves(rows)
    point, order = _envelope(curves, np.ones((1, len(names)), bool))
    estimate = _lines(log_c, point)[0]
    rng = np.random.default_rng(seed)
    drawn = np.zeros((bootstrap, len(names)), bool)
    drawn[np.arange(bootstrap)[:, None], rng.integers(len(names), size=drawn.shape)] = True
    samples = np.full((bootstrap, 4), np.nan)
    chunk = max(1, ELEMENTS // curves["loss"].size)
    for i in range(0, bootstrap, chunk):
        samples[i : i + chunk] = _lines(log_c, _envelope(curves, drawn[i : i + chunk])[0])
    order, used = order[0], np.isfinite(point[0][0])
    sizes = len(np.unique(point[0][0][used]))
    frame = pd.DataFrame(
        {
            "flops": np.exp(log_c),
            "params": np.exp(curves["log_n"][order]),
            "tokens": np.exp(curves["log_d"][order, np.arange(len(log_c))]),
            "loss": curves["loss"][order, np.arange(len(log_c))],
            "run": [names[i] for i in order],
            "used": used,
        }
    )
    record = {
        "law": "envelope",
        "objective": f"least squares of ln N* and ln D* on ln C at {POINTS} log-spaced C, censored ends dropped",
        "rows": len(rows),
        "rows_in_table": len(rows.position),
        "runs": len(names),
        "runs_on_envelope": len(set(frame["run"][used])),
        "sizes_on_envelope": sizes,
        "bootstrap": f"whole runs ({rows.cluster})",
        "draws": int(bootstrap),
        "draws_failed": int((~np.isfinite(samples).all(1)).sum()),
        "seed": int(seed),
        "columns": dict(columns or {}),
        "data_sha256": rows.digest(("params", "tokens", "loss")),
        **provenance(),
    }
    notices = [*rows.notices, *_findings(rows, sizes, int(used.sum()), samples)]
    return EnvelopeFit(NAMES, estimate, samples, notices, record, frame)


def _curves(rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Common ln C (g,); per run ln N (r,), and ln D and loss (r, g) there, infinite where it has no curve; names."""
    assert rows.clusters is not None
    N, D, L = (rows.columns[role] for role in ("params", "tokens", "loss"))
    log_flops = np.log(rows.compute)
    members = [np.flatnonzero(rows.clusters == c) for c in np.unique(rows.clusters)]
    names = [_label(rows, at[0]) for at in members]
    for name, at in zip(names, members, strict=True):
        if np.ptp(np.log(N[at])) > 1e-6:
            raise BadInput(f"run {name}", sorted(set(N[at]))[:3], "must have one number of parameters along its curve")
    log_c = np.linspace(log_flops.min(), log_flops.max(), POINTS)
    loss, log_d = np.full((len(members), POINTS), np.inf), np.full((len(members), POINTS), np.nan)
    for r, at in enumerate(members):
        at = at[np.argsort(log_flops[at], kind="stable")]
        x = log_flops[at]
        inside = (log_c >= x[0]) & (log_c <= x[-1])
        loss[r, inside] = np.exp(np.interp(log_c[inside], x, np.log(L[at])))
        log_d[r, inside] = np.interp(log_c[inside], x, np.log(D[at]))
    covered = np.isfinite(loss).any(0)
    log_n = np.array([np.log(N[at[0]]) for at in members])
    return log_c[covered], {"log_n": log_n, "log_d": log_d[:, covered], "loss": loss[:, covered]}, names


def _label(rows: Rows, row: int) -> str:
    column = rows.columns.get(rows.cluster or "")
    return str(rows.clusters[row] if column is None else column[row])  # type: ignore[index]


def _envelope(
    curves: dict[str, np.ndarray], drawn: Bool[np.ndarray, "R runs"]
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """((ln N*, ln D*), the lowest run), each (R, g), of the runs drawn; NaN where the end is censored."""
    log_n, loss = curves["log_n"], curves["loss"]
    here = drawn[:, :, None] & np.isfinite(loss)  # (R, runs, g)
    lowest = np.where(here, loss, np.inf).argmin(1)
    smallest = np.where(here, log_n[:, None], np.inf).min(1)
    largest = np.where(here, log_n[:, None], -np.inf).max(1)
    best = log_n[lowest]
    inside = (best > smallest + 1e-6) & (best < largest - 1e-6)
    at = np.take_along_axis(np.broadcast_to(curves["log_d"], here.shape), lowest[:, None], 1)[:, 0]
    return (np.where(inside, best, np.nan), np.where(inside, at, np.nan)), lowest


def _lines(log_c: np.ndarray, point: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "R 4"]:
    """The power laws of each envelope; NaN where it has a single size, which is flat in C for no reason of its own."""
    known = np.isfinite(point[0])
    sizes = np.where(known, point[0], -np.inf).max(1) - np.where(known, point[0], np.inf).min(1)
    return np.where((sizes > 1e-6)[:, None], power_laws(log_c, *point), np.nan)


def _findings(rows: Rows, sizes: int, used: int, samples: np.ndarray) -> list[Notice]:
    out = []
    if sizes < SIZES:
        out.append(
            Notice(
                "too-few-sizes",
                "error" if sizes < 2 else "warning",
                f"{sizes} sizes lie on the envelope between its censored ends.",
                "train more sizes, or smaller and larger ones over the same compute.",
                {"sizes": sizes, "points": used},
            )
        )
    lost = int((~np.isfinite(samples).all(1)).sum())
    if lost > 0.05 * max(1, len(samples)):
        out.append(
            Notice(
                "bootstrap-degenerate",
                "warning",
                f"{lost} of {len(samples)} draws of runs have no envelope between censored ends.",
                "the intervals are rough: add sizes.",
                {"draws": lost},
            )
        )
    schedule = rows.columns.get("schedule")
    if schedule is not None and rows.clusters is not None:
        last = np.zeros(rows.clusters.max() + 1)
        np.maximum.at(last, rows.clusters, rows.columns["tokens"])
        cut = (schedule.astype(str) == "cosine") & (rows.columns["tokens"] < last[rows.clusters] * (1 - 1e-9))
        if cut.any():
            out.append(
                Notice(
                    "cut-cosine",
                    "warning",
                    f"{int(cut.sum())} of {len(rows)} rows lie before the end of a cosine schedule, where the loss is "
                    f"above the law's: {name_rows(n for n, c in zip(rows.names, cut, strict=True) if c)}.",
                    "take part with runs of several lengths at each size, or use a schedule that is flat.",
                    {"rows": int(cut.sum())},
                )
            )
    return out


class EnvelopeFit(AllocationFit):
    """`params`: a, b of N* = N_coef C^a and D* = D_coef C^b. `envelope`: a row per compute at which it was read, with
    flops, params, tokens, loss, the run that is lowest, and whether it was used (False at censored ends)."""

    kind = "envelope"

    def __init__(self, names, estimate, samples, notices, record, frame: pd.DataFrame):
        super().__init__(names, estimate, samples, notices, record)
        self.envelope = frame

    def summary(self) -> str:
        r, used = self.record, self.envelope[self.envelope["used"]]
        span = f"C = {used.flops.min():.3g} to {used.flops.max():.3g}" if len(used) else "nowhere"
        lines = [
            f"Envelope: {r['rows']} rows of {r['runs']} runs; {r['runs_on_envelope']} runs of "
            f"{r['sizes_on_envelope']} sizes are lowest, {span}",
            "",
            *self.parameter_lines(),
            "",
            *self.notice_lines(),
        ]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        return super().document() | {"envelope": jsonable(self.envelope.to_dict("list"))}

    @classmethod
    def restore(cls, names, estimate, samples, notices, record, document: dict[str, Any]) -> EnvelopeFit:
        return cls(names, estimate, samples, notices, record, pd.DataFrame(document["envelope"]))
