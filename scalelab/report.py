"""The report of a sweep: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import scalelab
from scalelab.paths import save
from scalelab.report_rows import (
    ALLOCATED,
    COMPARED,
    FURTHER,
    MINIMA,
    between,
    compared,
    cost_of,
    count,
    number,
    optima,
    parabolas_of,
    parameters,
    sci,
    vertex_rows,
)

if TYPE_CHECKING:
    from scalelab.laws import Comparison, Fit, IsoflopFit

# Columns of the table of runs: RunRecord's name -> heading and unit.
SHOWN = {
    "id": "run",
    "family": "family",
    "status": "status",
    "width": "width",
    "layers": "layers",
    "params": "N",
    "params_non_embedding": "N without embeddings",
    "tokens": "D (tokens)",
    "flops": "C (FLOP)",
    "batch_tokens": "batch (tokens)",
    "lr": "peak LR",
    "loss": "loss (nats/token)",
    "loss_se": "± s.e.",
    "bpb": "bits/byte",
    "seconds": "seconds",
    "seed": "seed",
}
WORDS = {"error": "error", "warning": "warning"}
INTEGERS = ("width", "layers", "seed")


# ------------------------------------------------------------------------------------------------ the file


def write(
    path: str | os.PathLike[str],
    table: pd.DataFrame,
    curves: pd.DataFrame | None = None,
    fits: Mapping[str, Fit] | None = None,
    isoflop: IsoflopFit | Mapping[str, IsoflopFit] | None = None,
    *,
    comparison: Comparison | None = None,
    title: str = "Scaling-law report",
    command: str | None = None,
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Write the report, atomically, and return its path. The file needs no network and no other file.

    `table` is what `records.load` gives, `curves` what `records.curves` gives; `fits` maps names to law fits, the first
    of which answers the headline. With a `comparison` of families, `fits` and `isoflop` have one for each, by its name.
    """
    fits = dict(fits or {})
    parabolas = parabolas_of(isoflop)
    both = fits | parabolas
    style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=soft>scalelab {scalelab.__version__} · {len(table)} runs"
        + (f" · <code>{_text(command)}</code>" if command else "")
        + "</p>",
        "<section class=answer>"
        + "".join(f"<p>{line}</p>" for line in headline(fits, isoflop, comparison))
        + "</section>",
        *(f"<p>{_text(note)}</p>" for note in notes),
        *_families(comparison),
        *_answers(fits, parabolas),
        *_figures(table, curves, fits, parabolas, comparison),
        *_holdouts(fits),
        *_notices(both | ({} if comparison is None else {"comparison": comparison})),
        *_runs(table),
        *_how(both),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return save(path, page, "--out")


def headline(
    fits: Mapping[str, Fit],
    isoflop: IsoflopFit | Mapping[str, IsoflopFit] | None = None,
    comparison: Comparison | None = None,
) -> list[str]:
    """The answer in words, as HTML lines: what to train at the largest budget and beyond, and how sure that is."""
    if not fits:
        return ["No law was fitted."]
    parabolas = parabolas_of(isoflop)
    lines = [] if comparison is None else [_verdict(comparison, arm) for arm in comparison.arms]
    for name, fit in list(fits.items())[: None if comparison is not None else 1]:
        lines += _of_fit(name, fit, "" if comparison is None else f"<b>{_text(name)}.</b> ")
    largest = max(float(fit.rows.compute.max()) for fit in fits.values())
    for name, parabola in parabolas.items():
        used, all_ = parabola.record["budgets_used"], parabola.record["budgets"]
        family = name.removeprefix("IsoFLOP").replace(", ", " of ")
        if parabola.ok:
            at = parabola.optimal(largest)
            lines.append(
                f"IsoFLOP parabolas{_text(family)} ({used} of {all_} budgets) say N = {between(at, 'params')} "
                f"on D = {between(at, 'tokens')} tokens at C = {sci(largest)} FLOP."
            )
        else:
            lines.append(
                f"IsoFLOP parabolas{_text(family)} give no exponents: {used} of {all_} budgets show a minimum."
            )
    both = [*fits.values(), *parabolas.values()]
    found = [*both, *([] if comparison is None else [comparison])]
    counts = {kind: sum(n.severity == kind for f in found for n in f.warnings) for kind in WORDS}
    told = " and ".join(f"{n} {WORDS[kind]}{'s' * (n > 1)}" for kind, n in counts.items() if n)
    if told:
        lines.append(f"Before you believe this: {told} under <a href='#findings'>Findings</a>.")
    if any(np.isfinite(f.conf_int().to_numpy()).any() for f in both):
        lines.append(
            "<span class=soft>In brackets: 95 % bootstrap intervals, which cover noise and not a wrong form.</span>"
        )
    return lines


def _of_fit(name: str, fit: Fit, prefix: str) -> list[str]:
    """What one law says to train, and how well it has foretold."""
    if not fit.ok:
        codes = ", ".join(n.code for n in fit.warnings if n.severity == "error")
        return [
            f"{prefix}<b>No answer:</b> the {_text(name)} fit must not be used ({_text(codes)}); see "
            "the findings below."
        ]
    lines = []
    largest = float(fit.rows.compute.max())
    best: Any = fit.optimal([largest, FURTHER * largest], cost_of(fit))
    for (_, row), words in zip(best.iterrows(), ("At the largest budget", f"{FURTHER:g} times further"), strict=True):
        lines.append(f"{prefix}{words}, C = {sci(row.flops)} FLOP: {_advice(row)}.")
    held = fit.holdout()
    lines.append(
        f"{prefix}Fitted without the largest runs, the law predicts them to <b>{held.error:.1%}</b> "
        f"({held.distance:.1f} decades of compute further)."
        if held.ok
        else f"{prefix}No run could be held out ({_text(held.reason)}): the extrapolation is unchecked."
    )
    return lines


def _verdict(comparison: Comparison, arm: str) -> str:
    """Which of two families is better, at the largest budget that both were trained at."""
    table = comparison.table(arm=arm)
    inside = table[table["inside"]]
    row: Any = (inside if len(inside) else table).iloc[-1]
    low, high = (row.get(f"multiplier_{end}", np.nan) for end in ("lower", "upper"))
    interval = "" if np.isnan(low) or np.isnan(high) else f" [{low:.3g}, {high:.3g}]"
    words = "no verdict" if row.verdict == "no verdict" else f"<b>{_text(row.verdict)}</b> is better"
    return (
        f"At C = {sci(row.flops)} FLOP <b>{_text(arm)}</b> needs {row.get('multiplier', np.nan):.3g}{interval} times "
        f"the compute of {_text(comparison.reference)} for the same loss: {words}; "
        f"{_text(comparison.crossing_line(arm))}."
    )


def _advice(row: Any) -> str:
    if not np.isfinite(row.params):
        return "the law has no interior optimum here"
    n, d, loss = (between(row, c) for c in ("params", "tokens", "loss"))
    return f"train <b>N = {n}</b> parameters on <b>D = {d}</b> tokens, for a loss of {loss}"


# ------------------------------------------------------------------------------------------------ sections


def _families(comparison: Comparison | None) -> list[str]:
    """Families against each other: the multiplier as a curve in C, and as a table."""
    if comparison is None:
        return []
    r = comparison.record
    told = (
        f"<p>Each arm by its own law ({_text(r['laws'])}), at the optimum of its own FLOPs per token, against "
        f"{_text(comparison.reference)}: what share of C it needs for the loss of {_text(comparison.reference)} (below "
        f"1 it is better). {r['draws']} draws, {_text(r['drawn'])}; a verdict where the {100 * r['level']:g} % "
        "interval of the loss difference excludes 0.</p>"
    )
    crossings = "".join(f"<p>{_text(arm)}: {_text(comparison.crossing_line(arm))}.</p>" for arm in comparison.arms)
    figures = [
        _figure(comparison.plot.multiplier().figure, "Compute that gives the loss of the reference, as a share."),
        _figure(comparison.plot.difference().figure, "The difference in loss at equal compute."),
    ]
    return [
        "<h2>Families compared</h2>", told, '<div class="pair">', *figures, "</div>",
        _html_table(COMPARED, compared(comparison)), crossings,
    ]  # fmt: skip


def _answers(fits: Mapping[str, Fit], parabolas: Mapping[str, IsoflopFit]) -> list[str]:
    parts = ["<h2>Fitted laws</h2>"] if fits or parabolas else []
    for name, fit in fits.items():
        parts.append(
            f"<p><b>{_text(name)}</b>: {_text(fit.law.equation)} <span class=soft>({_text(fit.law.source)})</span></p>"
        )
        parts.append(_html_table(("", "estimate", "95 % interval"), parameters(fit)))
        if fit.ok:
            parts.append("<p>Compute-optimal, with this family's own FLOPs per token:</p>")
            parts.append(_html_table(ALLOCATED, optima(fit)))
    for name, parabola in parabolas.items():
        parts.append(f"<p><b>{_text(name)}</b>: N* ~ C^a, D* ~ C^b through the minima of parabolas in ln N</p>")
        parts.append(_html_table(("", "estimate", "95 % interval"), parameters(parabola)))
        parts.append(_html_table(MINIMA, vertex_rows(parabola)))
    return parts


def _figures(table, curves, fits, parabolas, comparison) -> list[str]:
    from scalelab import plots

    figures = []
    if curves is not None and len(curves):
        ax = plots.loss_curves(curves, table)
        figures.append(_figure(ax.figure, "Held-out loss as the runs train; a dotted run did not finish."))
    for name, parabola in parabolas.items():
        family = name.removeprefix("IsoFLOP, ")
        ax = plots.isoflop(table if family == name else table[table["family"].astype(str) == family], parabola)
        figures.append(_figure(ax.figure, f"{name} profiles: at each budget, loss against size."))
    for name, fit in fits.items():
        if not np.isfinite(fit.estimate).all():
            continue
        ax = plots.surface(fit, None, None, cost_of(fit))
        figures.append(_figure(ax.figure, f"{name}: the fitted surface and its compute-optimal frontier."))
        figures.append(_figure(plots.measured(fit).figure, f"{name}: residuals of the runs."))
    wide = []
    drawn = {n: f for n, f in (fits if comparison is not None else fits | parabolas).items() if f.ok}
    if drawn:
        compute = [c for f in fits.values() for c in f.rows.compute]
        compute += [c for f in parabolas.values() for c in f.vertices["flops"]]
        costs = {n: cost_of(f) for n, f in drawn.items() if n in fits}
        axes = plots.allocation(drawn, (min(compute) / 1.5, FURTHER * max(compute)), None, costs)
        wide.append(_figure(axes[0].figure, "Compute-optimal parameters and tokens against compute."))
    for name, fit in fits.items():
        if fit.holdout().ok:
            figures.append(_figure(plots.holdout(fit).figure, f"{name}: runs that the fit had not seen."))
    if not figures and not wide:
        return []
    return ["<h2>Figures</h2>", *wide, '<div class="pair">', *figures, "</div>"]


def _holdouts(fits: Mapping[str, Fit]) -> list[str]:
    parts = ["<h2>Hold-out check</h2>"] if fits else []
    for name, fit in fits.items():
        held = fit.holdout()
        if not held.ok:
            parts.append(f"<p>{_text(name)}: none ({_text(held.reason)}).</p>")
            continue
        parts.append(
            f"<p>{_text(name)}: fitted to the {held.fitted} runs below C = {sci(held.cut)} FLOP, "
            f"{held.held_out} larger ones predicted. Relative errors, beside what needs no law:</p>"
        )
        rows = [(str(n), f"{r.mean_abs:.2%}", f"{r.bias:+.2%}", f"{r.worst:.2%}") for n, r in held.errors.iterrows()]
        parts.append(_html_table(("", "mean", "bias", "worst"), rows))
    return parts


def _notices(found: Mapping[str, Any]) -> list[str]:
    items = []
    for name, fit in found.items():
        for n in fit.warnings:
            items.append(
                f"<li class={n.severity}><b>{n.severity}: {_text(n.code)}</b> ({_text(name)}) {_text(n.message)} "
                f"<span class=soft>Remedy: {_text(n.remedy)}</span></li>"
            )
    told = f"<ul class=notices>{''.join(items)}</ul>" if items else "<p>None.</p>"
    return ['<h2 id="findings">Findings</h2>', told]


def _runs(table: pd.DataFrame) -> list[str]:
    shown = [c for c in SHOWN if c in table]
    ordered = table.sort_values([c for c in ("flops", "params") if c in table]) if len(table) else table
    rows = [[_cell(c, v) for c, v in zip(shown, row, strict=True)] for row in ordered[shown].itertuples(index=False)]
    return [
        f"<h2>Runs</h2><details open><summary>{len(table)} runs</summary>",
        _html_table([SHOWN[c] for c in shown], rows),
        "</details>",
    ]


def _how(found: Mapping[str, Any]) -> list[str]:
    parts = ["<h2>How it was fitted</h2>"]
    for name, fit in found.items():
        facts = fit.card() if hasattr(fit, "card") else _facts(fit)
        listed = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
        parts.append(f"<p><b>{_text(name)}</b></p><dl>{listed}</dl>")
    return parts


def _facts(fit: Any) -> dict[str, str]:
    """What a fit without a card (parabolas) has to say."""
    r = fit.record
    failed = f"{r['draws_failed']} failed"
    return {
        "rows": f"{r['rows']} of {r['rows_in_table']}",
        "objective": r["objective"],
        "intervals": f"percentiles of {r['draws']} bootstrap draws ({r['bootstrap']}), seed {r['seed']}, {failed}",
        "data SHA-256": r["data_sha256"],
        "versions": ", ".join(f"{k} {v}" for k, v in r["versions"].items()),
        "time": r["time"],
    }


# ------------------------------------------------------------------------------------------------ HTML


def _cell(column: str, value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "—"
    if column in ("params", "params_non_embedding", "tokens", "batch_tokens"):
        return count(float(value))
    if column in INTEGERS:
        return str(int(value))
    if column == "flops":
        return sci(float(value))
    return number(float(value)) if isinstance(value, int | float | np.number) else str(value)


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=words' if len(c) > 40 else ''}>{_text(c)}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(figure: Any, caption: str) -> str:
    """The figure as an SVG image inside the page; as an image, its ids cannot clash with another figure's."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "scalelab"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    data = base64.b64encode(out.getvalue()).decode()
    words = _text(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
