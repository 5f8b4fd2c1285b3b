"""Of the coordinate checks in sizes.csv: the table of the README and its figure.

    python experiments/2026-11-23-coordinates/analyse.py [folder with a table of each family]

sizes.csv holds what `scalelab bench coords --out` writes for each family, at the start and after the last step; given a
folder of such tables, it is written anew.
"""

import pathlib
import sys
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scalelab.bench import coords

HERE = pathlib.Path(__file__).parent
PLACES = ("half-way block", "last block", "logits")
AXIS = {"width": "width", "depth": "layers"}
UNDER = {"width": "mup", "depth": "completep"}  # what is to keep sizes flat along which
ORDER = ("transformer", "moe", "mamba", "mamba2", "xlstm", "mlstm_up", "slstm", "gla", "deltanet", "gated_deltanet",
         "lightning", "hybrid", "mor")  # fmt: skip


def main() -> None:
    if len(sys.argv) > 1:
        together(pathlib.Path(sys.argv[1])).to_csv(HERE / "sizes.csv", index=False, float_format="%.5g")
    table = pd.read_csv(HERE / "sizes.csv")
    print(slopes(table).to_string(index=False))
    draw(table).savefig(HERE / "coordinates.png", dpi=100)


def together(folder: pathlib.Path) -> pd.DataFrame:
    tables = []
    for family in ORDER:
        table = pd.read_csv(folder / f"{family}.csv")
        wanted = table["step"].isin((0, table["step"].max()))
        # Under muP the depth, and under CompleteP the width, say nothing that standard and muP do not.
        for along, other in (("depth", "mup"), ("width", "completep")):
            wanted &= ~((table["along"] == along) & (table["parametrization"] == other))
        tables.append(table[wanted].assign(family=family))
    return pd.concat(tables)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Of the changes after the steps, mean and standard error over the seeds."""
    rows = []
    for family in table["family"].unique():
        found = coords.slopes(table[table["family"] == family]).set_index(["along", "parametrization", "place"])
        row: dict[str, object] = {"family": family}
        for along, under in UNDER.items():
            row[f"{along}: standard"] = f"{found.loc[(along, 'standard', 'last block'), 'change_slope']:+.2f}"
            for place in PLACES:
                mine = found.loc[(along, under, place)]
                row[f"{under}, {place}"] = f"{mine['change_slope']:+.2f} ± {mine['change_error']:.2f}"
            row[f"{along}: ratio"] = f"{found.loc[(along, under, 'last block'), 'change_ratio']:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def points(table: pd.DataFrame, kind: str, along: str, place: str) -> pd.DataFrame:
    """Change at the last step, geometric means over the seeds; families in columns."""
    rows = table[(table["parametrization"] == kind) & (table["along"] == along) & (table["place"] == place)]
    rows = rows[rows["step"] == table["step"].max()]
    return rows.pivot_table(index=AXIS[along], columns="family", values="change", aggfunc=geometric)


def geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    families = list(table["family"].unique())
    for row, along in enumerate(("width", "depth")):
        for ax, place in zip(axes[row], PLACES, strict=True):
            for kind, style in (("standard", {"alpha": 0.3, "linewidth": 1}), (UNDER[along], {"linewidth": 1.6})):
                seen = points(table, kind, along, place)
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
        axes[row, 0].set_ylabel(f"change after {table['step'].max()} steps\nbold: {UNDER[along]}, faint: standard")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
