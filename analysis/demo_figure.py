"""The README's picture, from the demo's records.

python analysis/demo_figure.py demo/sweeps/demo.json docs/demo.png
"""

import sys

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scalelab import laws, plots, records


def main(sweep: str, out: str) -> None:
    table = records.load(sweep)
    families = {str(name): rows for name, rows in table.groupby("family", sort=False)}
    first = "transformer"
    families = {first: families.pop(first), **families}
    cost = {
        name: laws.flops_per_token(rows["params"], rows["tokens"], rows["flops"]) for name, rows in families.items()
    }
    found = laws.compare(families, law="chinchilla", cost=cost)
    figure = Figure(figsize=(4 * (len(families) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    *isoflops, last = figure.subplots(1, len(families) + 1)
    for ax, (name, rows) in zip(isoflops, families.items(), strict=True):
        plots.isoflop(rows, laws.isoflop(rows), ax)
        ax.set_title(name, pad=36)
        ax.set_ylabel(ax.get_ylabel() if ax is isoflops[0] else "")
    low, high = table["loss"].min(), table["loss"].max()
    for ax in isoflops:
        ax.set_ylim(low - 0.08 * (high - low), high + 0.05 * (high - low))
    found.plot.multiplier(last)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
