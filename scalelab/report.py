"""The report of a sweep: one self-contained HTML file, and the same answers as tables in the terminal."""

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
from scalelab import laws
from scalelab.paths import save

if TYPE_CHECKING:
    from rich.console import Console

    from scalelab.laws import Fit, IsoflopFit

FURTHER = 10.0  # the report looks this far beyond the largest budget

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
    isoflop: IsoflopFit | None = None,
    *,
    title: str = "Scaling-law report",
    command: str | None = None,
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Write the report, atomically, and return its path. The file needs no network and no other file.

    `table` is what `records.load` gives, `curves` what `records.curves` gives; `fits` maps names to law fits, the first
    of which answers the headline.
    """
    fits = dict(fits or {})
    cost = cost_of(table)
    style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=soft>scalelab {scalelab.__version__} · {len(table)} runs"
        + (f" · <code>{_text(command)}</code>" if command else "")
        + "</p>",
        "<section class=answer>" + "".join(f"<p>{line}</p>" for line in headline(table, fits, isoflop)) + "</section>",
        *(f"<p>{_text(note)}</p>" for note in notes),
        *_answers(table, fits, isoflop, cost),
        *_figures(table, curves, fits, isoflop, cost),
        *_holdouts(fits),
        *_notices(fits, isoflop),
        *_runs(table),
        *_how(fits, isoflop),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return save(path, page, "--out")


def cost_of(table: pd.DataFrame) -> Any:
    """FLOPs per token as a function of N where the finished runs' FLOPs are known, else 6 (for C = 6 N D)."""
    done = _done(table)
    if "flops" not in done or not len(done) or not (done["flops"] > 0).all():
        return 6.0
    return laws.flops_per_token(*(done[c].to_numpy(float) for c in ("params", "tokens", "flops")))


def headline(table: pd.DataFrame, fits: Mapping[str, Fit], isoflop: IsoflopFit | None) -> list[str]:
    """The answer in words, as HTML lines: what to train at the largest budget and beyond, and how sure that is."""
    if not fits:
        return ["No law was fitted."]
    name, fit = next(iter(fits.items()))
    lines = []
    largest = float(fit.rows.compute.max())
    if not fit.ok:
        codes = ", ".join(n.code for n in fit.warnings if n.severity == "error")
        lines.append(
            f"<b>No answer:</b> the {_text(name)} fit must not be used ({_text(codes)}); see the findings below."
        )
    else:
        best: Any = fit.optimal([largest, FURTHER * largest], cost_of(table))
        for (_, row), words in zip(
            best.iterrows(), ("At the largest budget", f"{FURTHER:g} times further"), strict=True
        ):
            lines.append(f"{words}, C = {_sci(row.flops)} FLOP: {_advice(row)}.")
        held = fit.holdout()
        lines.append(
            f"Fitted without the largest runs, the law predicts them to <b>{held.error:.1%}</b> "
            f"({held.distance:.1f} decades of compute further)."
            if held.ok
            else f"No run could be held out ({_text(held.reason)}): the extrapolation is unchecked."
        )
    if isoflop is not None:
        used, all_ = isoflop.record["budgets_used"], isoflop.record["budgets"]
        if isoflop.ok:
            at = isoflop.optimal(largest)
            lines.append(
                f"IsoFLOP parabolas ({used} of {all_} budgets) say N = {_range(at, 'params')} "
                f"on D = {_range(at, 'tokens')} tokens at C = {_sci(largest)} FLOP."
            )
        else:
            lines.append(f"IsoFLOP parabolas give no exponents: {used} of {all_} budgets show a minimum.")
    counts = {kind: sum(n.severity == kind for f in _all(fits, isoflop).values() for n in f.warnings) for kind in WORDS}
    told = " and ".join(f"{n} {WORDS[kind]}{'s' * (n > 1)}" for kind, n in counts.items() if n)
    if told:
        lines.append(f"Before you believe this: {told} under <a href='#findings'>Findings</a>.")
    if any(np.isfinite(f.conf_int().to_numpy()).any() for f in _all(fits, isoflop).values()):
        lines.append(
            "<span class=soft>In brackets: 95 % bootstrap intervals, which cover noise and not a wrong form.</span>"
        )
    return lines


def _advice(row: Any) -> str:
    if not np.isfinite(row.params):
        return "the law has no interior optimum here"
    n, d, loss = (_range(row, c) for c in ("params", "tokens", "loss"))
    return f"train <b>N = {n}</b> parameters on <b>D = {d}</b> tokens, for a loss of {loss}"


# ------------------------------------------------------------------------------------------------ sections


def _answers(table: pd.DataFrame, fits: Mapping[str, Fit], isoflop: IsoflopFit | None, cost: Any) -> list[str]:
    parts = ["<h2>Fitted laws</h2>"] if fits or isoflop is not None else []
    for name, fit in fits.items():
        parts.append(
            f"<p><b>{_text(name)}</b>: {_text(fit.law.equation)} <span class=soft>({_text(fit.law.source)})</span></p>"
        )
        parts.append(_html_table(("", "estimate", "95 % interval"), parameters(fit)))
        if fit.ok:
            parts.append("<p>Compute-optimal, with this family's own FLOPs per token:</p>")
            parts.append(_html_table(("C (FLOP)", "N*", "D* (tokens)", "D*/N*", "loss"), optima(fit, cost)))
    if isoflop is not None:
        parts.append("<p><b>IsoFLOP</b>: N* ~ C^a, D* ~ C^b through the minima of parabolas in ln N</p>")
        parts.append(_html_table(("", "estimate", "95 % interval"), parameters(isoflop)))
        parts.append(_html_table(("C (FLOP)", "runs", "N*", "D* (tokens)", "loss", ""), vertex_rows(isoflop)))
    return parts


def _figures(table, curves, fits, isoflop, cost) -> list[str]:
    from scalelab import plots

    figures = []
    if curves is not None and len(curves):
        ax = plots.loss_curves(curves, table)
        figures.append(_figure(ax.figure, "Held-out loss as the runs train; a dotted run did not finish."))
    if isoflop is not None:
        ax = plots.isoflop(table, isoflop)
        figures.append(_figure(ax.figure, "IsoFLOP profiles: at each budget, loss against size."))
    for name, fit in fits.items():
        if not np.isfinite(fit.estimate).all():
            continue
        ax = plots.surface(fit, table, None, cost)
        figures.append(_figure(ax.figure, f"{name}: the fitted surface and its compute-optimal frontier."))
        figures.append(_figure(plots.measured(fit).figure, f"{name}: residuals of the runs."))
    wide = []
    both = {n: f for n, f in _all(fits, isoflop).items() if f.ok}
    if both:
        compute = [c for f in fits.values() for c in f.rows.compute]
        compute += [] if isoflop is None else isoflop.vertices["flops"].tolist()
        axes = plots.allocation(both, (min(compute) / 1.5, FURTHER * max(compute)), None, cost)
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
            f"<p>{_text(name)}: fitted to the {held.fitted} runs below C = {_sci(held.cut)} FLOP, "
            f"{held.held_out} larger ones predicted. Relative errors, beside what needs no law:</p>"
        )
        rows = [(str(n), f"{r.mean_abs:.2%}", f"{r.bias:+.2%}", f"{r.worst:.2%}") for n, r in held.errors.iterrows()]
        parts.append(_html_table(("", "mean", "bias", "worst"), rows))
    return parts


def _notices(fits: Mapping[str, Fit], isoflop: IsoflopFit | None) -> list[str]:
    items = []
    for name, fit in _all(fits, isoflop).items():
        for n in fit.warnings:
            items.append(
                f"<li class={n.severity}><b>{n.severity}: {_text(n.code)}</b> ({_text(name)}) {_text(n.message)} "
                f"<span class=soft>Remedy: {_text(n.remedy)}</span></li>"
            )
    found = f"<ul class=notices>{''.join(items)}</ul>" if items else "<p>None.</p>"
    return ['<h2 id="findings">Findings</h2>', found]


def _runs(table: pd.DataFrame) -> list[str]:
    shown = [c for c in SHOWN if c in table]
    ordered = table.sort_values([c for c in ("flops", "params") if c in table]) if len(table) else table
    rows = [[_cell(c, v) for c, v in zip(shown, row, strict=True)] for row in ordered[shown].itertuples(index=False)]
    return [
        f"<h2>Runs</h2><details open><summary>{len(table)} runs</summary>",
        _html_table([SHOWN[c] for c in shown], rows),
        "</details>",
    ]


def _how(fits: Mapping[str, Fit], isoflop: IsoflopFit | None) -> list[str]:
    parts = ["<h2>How it was fitted</h2>"]
    for name, fit in _all(fits, isoflop).items():
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


# ------------------------------------------------------------------------------------------------ the terminal


def terminal(
    table: pd.DataFrame, fits: Mapping[str, Fit], isoflop: IsoflopFit | None = None, console: Console | None = None
) -> None:
    """Print parameters, minima, optima, hold-out and findings as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    cost = cost_of(table)

    def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
        for i, head in enumerate(heads):
            grid.add_column(head, justify="left" if i == 0 or not head else "right")
        for row in rows:
            grid.add_row(*(escape(cell) for cell in row))
        console.print(grid)

    for name, fit in fits.items():
        show(f"{name}: {fit.law.equation}", ("", "estimate", "95 % interval"), parameters(fit))
        if fit.ok:
            show("Compute-optimal", ("C (FLOP)", "N*", "D* (tokens)", "D*/N*", "loss"), optima(fit, cost))
        console.print(escape(fit.holdout().summary()), highlight=False)
    if isoflop is not None:
        show("IsoFLOP minima", ("C (FLOP)", "runs", "N*", "D* (tokens)", "loss", ""), vertex_rows(isoflop))
        show("IsoFLOP: N* ~ C^a, D* ~ C^b", ("", "estimate", "95 % interval"), parameters(isoflop))
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for name, fit in _all(fits, isoflop).items():
        for n in fit.warnings:
            console.print(
                f"[{colours[n.severity]}]{n.severity} {escape('[' + n.code + ']')}[/] ({escape(name)}) "
                f"{escape(n.message)} [dim]Remedy: {escape(n.remedy)}[/]",
                highlight=False,
            )


# ------------------------------------------------------------------------------------------------ rows shared by both


def parameters(fit: Fit | IsoflopFit) -> list[tuple[str, str, str]]:
    """(name, estimate, interval) of a fit's parameters and, for laws, of the allocation exponents."""
    frame = fit.conf_int().assign(estimate=fit.params)
    law = hasattr(fit, "allocation")
    frame = pd.concat([frame, fit.allocation()]) if law else frame.loc[["a", "b"]]  # type: ignore[union-attr]
    return [
        (
            str(name),
            _number(row.estimate),
            f"{_number(row.lower)} to {_number(row.upper)}" if np.isfinite(row.lower) else "—",
        )
        for name, row in frame.iterrows()
    ]


def optima(fit: Fit, cost: Any) -> list[tuple[str, ...]]:
    """What to train at the largest budget and `FURTHER` times beyond, with intervals."""
    largest = float(fit.rows.compute.max())
    rows = []
    best: Any = fit.optimal([largest, FURTHER * largest], cost)
    for _, row in best.iterrows():
        if np.isfinite(row.params):
            shown = (
                _range(row, "params"),
                _range(row, "tokens"),
                f"{row.tokens / row.params:.3g}",
                _range(row, "loss"),
            )
        else:
            shown = ("no interior optimum", "—", "—", "—")
        rows.append((_sci(row.flops), *shown))
    return rows


def vertex_rows(isoflop: IsoflopFit) -> list[tuple[str, ...]]:
    """A row per budget: its minimum with intervals, or why it is refused."""
    rows = []
    for _, v in isoflop.vertices.iterrows():
        shown = tuple(_range(v, c) for c in ("params", "tokens", "loss")) if v.used else ("—",) * 3
        rows.append((_sci(v.flops), f"{v.used_runs} of {v.runs}", *shown, "" if v.used else f"refused: {v.reason}"))
    return rows


# ------------------------------------------------------------------------------------------------ formats


def _all(fits: Mapping[str, Fit], isoflop: IsoflopFit | None) -> dict[str, Any]:
    return dict(fits) | ({} if isoflop is None else {"IsoFLOP": isoflop})


def _done(table: pd.DataFrame) -> Any:
    return table[table["status"] == "done"] if "status" in table else table


def _number(value: float) -> str:
    """Four significant digits; powers of ten only where plain digits would not do."""
    if not np.isfinite(value):
        return "—"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def _count(value: float) -> str:
    from scalelab.plots import human

    return human(value)


def _sci(value: float) -> str:
    return f"{value:.3g}"


def _range(row: Any, column: str) -> str:
    """`1.2M [1.1M, 1.4M]`, or the number alone where there is no interval."""
    show = _number if column == "loss" else _count
    value, low, high = (getattr(row, f"{column}{end}", float("nan")) for end in ("", "_lower", "_upper"))
    return f"{show(value)} [{show(low)}, {show(high)}]" if np.isfinite(low) else show(value)


def _cell(column: str, value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return "—"
    if column in ("params", "params_non_embedding", "tokens", "batch_tokens"):
        return _count(float(value))
    if column in INTEGERS:
        return str(int(value))
    if column == "flops":
        return _sci(float(value))
    return _number(float(value)) if isinstance(value, int | float | np.number) else str(value)


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
