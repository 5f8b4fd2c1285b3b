"""Coordinate check: do activations, and what training changes of them, keep their size as a model widens or deepens?

    scalelab bench coords --family transformer --plot coords.png
    scalelab bench coords --family mamba2 --widths 64,128,256 --depths 4,8,16 --steps 4 --out coords.csv
    scalelab bench coords --family xlstm:mixer=slstm

Every model takes a few Adam steps at one learning rate, and is looked at on one batch before and after: the root mean
square of the residual stream behind the block half-way and the last one, and of the logits ("size"), and of their
difference from what they were at the start ("change"). Under muP the changes neither grow nor shrink with the width,
under CompleteP neither with the depth; under the standard parametrisation they grow (Yang et al. 2022, appendix D.1;
Dey et al. 2025). The slope is that of ln size over ln width or ln depth, 0 where flat.

Widths are compared at the least depth, depths at the least width; a shape grows by heads and inner widths alone
(`recipe.widened`). The models are those of the recipe but for what hides the rules at small sizes. The embedding is
normed (`embed_norm`), so that the residual stream starts at size 1. What writes to the stream, and the head, which is
not tied, start at an eighth of their size (`START`): a change passed on by random branches that are as large as the
stream has a part of 1 / sqrt(L), one answered by a random head a part of 1 / sqrt(m), and both are gone before the
changes themselves are what is seen (Yang et al. start such matrices at zero for that; but then nothing else has a
gradient at first). From the recipe's own start GLA's changes fall by the depth to the power -0.26 and sLSTM's -0.19,
logits of tied embeddings by the width to -0.4: no rule of the parametrisation is off. Layers before and behind the
repeated ones, whose number does not grow, are left out; recursions take every token, as a token that changes sides is
a jump. At the start, what the head makes of the stream falls as 1 / sqrt(D).
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scalelab import config, data, model_plots, models, recipe, sharding, update
from scalelab.errors import BadInput
from scalelab.parametrization import PARAMETRIZATIONS, Tensor
from scalelab.schema import Config, at_least, choice

ROWS, SEQ_LEN = 4, 64
LR = 1e-3  # small against what matrices start at, so that changes are in proportion to it
START = 1 / 8  # of the matrices that write to the stream, and of the head, against the recipe's
FLAT = 0.1  # slope: a factor 1.3 from width 64 to 1024 and from 2 layers to 32


def shape(family: str, kind: str, width: int, layers: int, base: tuple[int, int], lr: float = LR) -> Config:
    """The config of a family's model of some width and depth whose base model has (width, depth) `base`. The family may
    come with its options (`recipe.with_options`)."""
    family, options = recipe.with_options(family)
    base_width, base_layers = base
    smallest = recipe.shape(family, base_width, **options) | {"model.layers": base_layers}
    found = recipe.widened(family, width, base_width, **options) | {"model.layers": layers}
    fixed: dict[str, Any] = {
        "model.embed_norm": True, "model.tied_embeddings": False, "model.compute_dtype": "float32",
        "data.seq_len": SEQ_LEN, "data.batch_size": ROWS, "data.held_out_tokens": 4096, "optim.eps": 1e-12,
        "optim.lr": lr,
    }  # fmt: skip
    alike: dict[str, Any] = {"model.prefix": (), "model.suffix": ()}
    if recursions := found.get("model.recursion.count"):
        alike["model.recursion.capacities"] = (1.0,) * recursions
    return config.finish(config.base(), recipe.transferred(kind, found | alike, smallest | alike) | fixed)


def sizes(conf: Config, steps: int, seeds: int = 1) -> Iterator[dict[str, Any]]:
    """Of each seed, after 0, 1, ... steps, for every place: {"seed", "step", "place", "size", "change"}."""
    corpus = data.open(conf.data)
    trainer = update.Trainer(conf, corpus)
    graphdef, _ = models.abstract(trainer.model)

    @jax.jit
    def look(params: Any, tokens: Array) -> dict[str, Array]:
        seen = models.merge(graphdef, params).activations(tokens)
        half = (seen["blocks"].shape[0] - 1) // 2
        return {"half-way block": seen["blocks"][half], "last block": seen["blocks"][-1], "logits": seen["logits"]}

    for seed in range(seeds):
        stream = corpus.stream(seed, 0)
        first = jnp.asarray(next(stream))[:, :-1]
        state: Any = trainer._init(np.uint32(seed))
        state = state._replace(params=small_outputs(trainer.model, state.params))
        now = before = look(state.params, first)
        for step in range(steps + 1):
            if step:
                rows = sharding.put_rows(next(stream), trainer.mesh)
                state, _ = trainer.step(state, rows, np.float32(conf.optim.lr))
                now = look(state.params, first)
            where = {"seed": seed, "step": step}
            for place, value in now.items():
                yield where | {"place": place, "size": rms(value), "change": rms(value - before[place])}


def small_outputs(model: Any, params: Any) -> Any:
    """The parameters with what writes to the residual stream, and the head, at `START` of their size."""

    def smaller(tensor: Tensor, value: Array) -> Array:
        return START * value if tensor.residual or tensor.role == "unembedding" else value

    return jax.tree.map(smaller, models.tensors(model), params)


def rms(x: Float[Array, "..."]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def check(
    family: str, kinds: Sequence[str], widths: Sequence[int], depths: Sequence[int], steps: int, seeds: int = 1,
    progress: Callable[[Any], Any] = iter,
) -> pd.DataFrame:  # fmt: skip
    """A row for each parametrization, along ("width" | "depth"), width, layers, seed, step and place: size and
    change."""
    base = (min(widths), min(depths))
    points = [
        (kind, along, width, layers)
        for kind in kinds
        for along, shapes in (("width", [(w, base[1]) for w in widths]), ("depth", [(base[0], d) for d in depths]))
        for width, layers in shapes
        if len(widths if along == "width" else depths) > 1
    ]
    seen: dict[Any, list[dict[str, Any]]] = {}
    rows = []
    for kind, along, width, layers in progress(points):
        # At the base depth CompleteP is muP, and that at the base width standard, bit for bit.
        same = "mup" if kind == "completep" and layers == base[1] else kind
        same = "standard" if same == "mup" and (width, layers) == base else same
        key = (same, width, layers)
        if key not in seen:
            seen[key] = list(sizes(shape(family, same, width, layers, base), steps, seeds))
        where = {"parametrization": kind, "along": along, "width": width, "layers": layers}
        rows += [where | row for row in seen[key]]
    return pd.DataFrame(rows)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """For each parametrization, along and place: the slopes of ln size at the start and of ln change at the last step
    over ln width or ln depth, means over the seeds (`start_slope`, `change_slope`) with the standard error that the
    seeds give (`change_error`, nan of one), and the largest over the least of either (`start_ratio`, `change_ratio`),
    of geometric means over the seeds."""
    rows = []
    last = table["step"].max()
    key: Any
    part: Any
    for key, part in table.groupby(["parametrization", "along", "place"], sort=False):
        kind, along, place = key
        row: dict[str, Any] = {"parametrization": kind, "along": along, "place": place}
        for name, quantity, step in (("start", "size", 0), ("change", "change", last)):
            index = "width" if along == "width" else "layers"
            logs = np.log(part[part["step"] == step].pivot(index=index, columns="seed", values=quantity))
            found = np.polyfit(np.log(logs.index.to_numpy(float)), logs.to_numpy(), 1)[0]
            row[f"{name}_slope"] = float(np.mean(found))
            row[f"{name}_ratio"] = float(np.exp(np.ptp(logs.mean(axis=1))))
        row["change_error"] = float(np.std(found, ddof=1) / np.sqrt(len(found))) if len(found) > 1 else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def main(
    family: str = "transformer",
    kinds: Sequence[str] = PARAMETRIZATIONS,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    depths: Sequence[int] = (2, 4, 8, 16, 32),
    steps: int = 4,
    seeds: int = 3,
    out: str | None = None,
    plot: str | None = None,
) -> int:
    for kind in kinds:
        choice("--parametrizations", kind, PARAMETRIZATIONS)
    for name, values in (("--widths", widths), ("--depths", depths), ("--steps", (steps,)), ("--seeds", (seeds,))):
        for value in values:
            at_least(name, value, 1)
    if len(widths) < 2 and len(depths) < 2:
        raise BadInput("--widths", widths, "needs several widths, or several --depths, to compare")
    console = Console(stderr=True)
    table = check(
        family, kinds, sorted(widths), sorted(depths), steps, seeds,
        lambda points: track(points, f"{family}: {steps} steps each", console=console, transient=True),
    )  # fmt: skip
    report(table, family)
    for path, write in ((out, lambda p: table.to_csv(p, index=False)), (plot, lambda p: draw(table, family, p))):
        if path:
            try:
                pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
                write(path)
            except (OSError, ValueError) as error:
                raise BadInput("--plot" if path == plot else "--out", path, f"cannot be written ({error})") from None
            print(path)
    return 0


def draw(table: pd.DataFrame, family: str, path: str) -> None:
    from matplotlib.figure import Figure

    alongs = list(table["along"].unique())
    figure = Figure(figsize=(5.2 * len(alongs), 7.4), layout="constrained")
    axes = figure.subplots(2, len(alongs), squeeze=False)
    for column, along in enumerate(alongs):
        for row, quantity in enumerate(("size", "change")):
            model_plots.coordinates(table, along, quantity, axes[row, column], legend=(row, column) == (0, 0))
    title = f"{family}: coordinate check, {table['step'].max()} Adam steps"
    bands = ", bands: all seeds" if len(set(table["seed"])) > 1 else ""
    figure.suptitle(title + bands, fontsize="medium")
    figure.savefig(path, dpi=110)


def report(table: pd.DataFrame, family: str) -> None:
    out, last = Console(), table["step"].max()
    shown = Table(
        title=f"{family}: root mean squares at the start, and of their change after {last} steps, geometric means of "
        f"{table['seed'].nunique()} seeds; slopes over ln width or ln depth, flat within ±{FLAT}",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("parametrization", "along", "place"):
        shown.add_column(column, no_wrap=True)
    for column in ("start", "slope", "change", "slope", "±", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    row: Any
    for row in slopes(table).itertuples():
        part: Any = table.query(
            "parametrization == @row.parametrization and along == @row.along and place == @row.place"
        )
        start, change = (
            np.exp(np.log(part[part["step"] == step].set_index(["width", "layers"])[name]).groupby(level=[0, 1]).mean())
            for step, name in ((0, "size"), (last, "change"))
        )
        worst = max(row.start_slope, row.change_slope)
        verdict = "grows" if worst > FLAT else "falls" if row.change_slope < -FLAT else "flat"
        shown.add_row(
            row.parametrization, row.along, row.place, ends(start), f"{row.start_slope:+.2f}", ends(change),
            f"{row.change_slope:+.2f}", "" if np.isnan(row.change_error) else f"{row.change_error:.2f}", verdict,
        )  # fmt: skip
    (out if out.is_terminal else Console(width=140)).print(shown)


def ends(values: Any) -> str:
    """Of the smallest and the largest model."""
    return f"{values.iloc[0]:.3g} .. {values.iloc[-1]:.3g}"
