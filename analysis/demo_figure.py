"""The README's picture, from the demo's records.

python analysis/demo_figure.py demo/sweeps/demo.json docs/demo.png
"""

import sys

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scalelab import laws, plots, records


def main(sweep: str, out: str) -> None:
    table = records.load(sweep)
    fit, parabolas = laws.fit("chinchilla", table), laws.isoflop(table)
    cost = laws.flops_per_token(table["params"], table["tokens"], table["flops"])
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    plots.isoflop(table, parabolas, left)
    compute = np.geomspace(0.7 * table["flops"].min(), 10 * table["flops"].max(), 50)
    fits = {"Chinchilla surface": fit, "IsoFLOP parabolas": parabolas}
    plots.allocation(fits, compute, [middle, right], flops_per_param_token=cost)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
