"""Of the coordinate checks in sizes.csv: the table of the README and its figure.

    python experiments/2026-11-23-coordinates/analyse.py

sizes.csv is what `scalelab bench coords --out` writes for each family, at the start and after the last step.
"""

import pathlib
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
PLACES = ("half-way block", "last block", "logits")
AXIS = {"width": "width", "depth": "layers"}
UNDER = {"width": "mup", "depth": "completep"}  # what is to keep sizes flat along which


def main() -> None:
    table = pd.read_csv(HERE / "sizes.csv")
    print(slopes(table).to_string(float_format="%+.2f", index=False))
    draw(table).savefig(HERE / "coordinates.png", dpi=100)


def points(table: pd.DataFrame, kind: str, along: str, place: str, quantity: str) -> pd.DataFrame:
    """Size at the start, or change at the last step; families in columns."""
    step = table["step"].max() if quantity == "change" else 0
    rows = table[(table["parametrization"] == kind) & (table["along"] == along) & (table["place"] == place)]
    return rows[rows["step"] == step].pivot(index=AXIS[along], columns="family", values=quantity)


def slope(values: pd.Series, least: float = 0) -> float:
    values = values[values.index >= least].dropna()
    return float(np.polyfit(np.log(values.index.to_numpy(float)), np.log(values.to_numpy()), 1)[0])


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Of the last block's change after the steps, and of the logits': over all points, and over the larger ones."""
    rows = []
    for family in table["family"].unique():
        row: dict[str, object] = {"family": family}
        for along, least in (("width", 256), ("depth", 8)):
            for kind in ("standard", UNDER[along]):
                row[f"{along}, {kind}"] = slope(points(table, kind, along, "last block", "change")[family])
            row[f"from {least}"] = slope(points(table, UNDER[along], along, "last block", "change")[family], least)
        row["logits, width, mup"] = slope(points(table, "mup", "width", "logits", "change")[family])
        row["from 256 "] = slope(points(table, "mup", "width", "logits", "change")[family], 256)
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    families = list(table["family"].unique())
    for row, along in enumerate(("width", "depth")):
        for ax, place in zip(axes[row], PLACES, strict=True):
            for kind, style in (("standard", {"alpha": 0.3, "linewidth": 1}), (UNDER[along], {"linewidth": 1.6})):
                seen = points(table, kind, along, place, "change")
                for number, family in enumerate(families):
                    values = seen[family].dropna()
                    label = family if kind != "standard" else None
                    marks: dict[str, Any] = {"marker": "o" if number < 10 else "s", "markersize": 3}
                    ax.plot(values.index, values, color=f"C{number}", label=label, **marks, **style)
            ax.set(xscale="log", yscale="log", title=f"{place}, over {along}", xlabel=AXIS[along])
            ticks = sorted(table.loc[table["along"] == along, AXIS[along]].unique())
            ax.set_xticks(ticks, [str(t) for t in ticks], minor=False)
            ax.tick_params(which="minor", labelbottom=False)
            ax.grid(alpha=0.3)
        axes[row, 0].set_ylabel(f"change after 4 steps\nbold: {UNDER[along]}, faint: standard")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
