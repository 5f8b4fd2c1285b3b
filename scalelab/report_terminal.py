"""The report's answers as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scalelab.report_rows import ALLOCATED, COMPARED, MINIMA, compared, optima, parabolas_of, parameters, vertex_rows

if TYPE_CHECKING:
    from scalelab.laws import Comparison, Fit, IsoflopFit


def terminal(
    fits: Mapping[str, Fit],
    isoflop: IsoflopFit | Mapping[str, IsoflopFit] | None = None,
    console: Console | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Print parameters, minima, optima, hold-out, comparison and findings as tables."""
    console = console or Console()
    parabolas = parabolas_of(isoflop)

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
            show("Compute-optimal", ALLOCATED, optima(fit))
        console.print(escape(fit.holdout().summary()), highlight=False)
    for name, parabola in parabolas.items():
        show(f"{name} minima", MINIMA, vertex_rows(parabola))
        show(f"{name}: N* ~ C^a, D* ~ C^b", ("", "estimate", "95 % interval"), parameters(parabola))
    found: dict[str, Any] = dict(fits) | parabolas
    if comparison is not None:
        show(f"Against {comparison.reference}, at each family's optimum", COMPARED, compared(comparison))
        for arm in comparison.arms:
            console.print(escape(f"{arm}: {comparison.crossing_line(arm)}"), highlight=False)
        found["comparison"] = comparison
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for name, fit in found.items():
        for n in fit.warnings:
            console.print(
                f"[{colours[n.severity]}]{n.severity} {escape('[' + n.code + ']')}[/] ({escape(name)}) "
                f"{escape(n.message)} [dim]Remedy: {escape(n.remedy)}[/]",
                highlight=False,
            )
