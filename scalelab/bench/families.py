"""Training speed of the families at equal parameters, as ratios to the Transformer's in the same run.

    scalelab bench families [--params 1e5] [--families mamba,gla]

The rate is training FLOP/s: FLOPs of the step by the exact convention, over its seconds. All families are compiled
first; then they take turns, a few steps each, so that a machine whose speed drifts slows all alike. The ratio of a
round is a family's rate over the Transformer's mean rate just before and after; its median and its quartiles are
reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scalelab import config, data, flops, recipe, sharding, update

ROWS, SEQ_LEN, STEPS = 8, 128, 2  # of a batch, of a row, of a turn
BASELINE = "transformer"


class Turns:
    """A family's compiled step, and what its turns took."""

    def __init__(self, family: str, params: float):
        conf = config.override(
            config.base(),
            {**recipe.sized(family, params), "model.compute_dtype": "float32", "data.seq_len": SEQ_LEN,
             "data.batch_size": ROWS, "data.held_out_tokens": 4096},
        )  # fmt: skip
        corpus = data.open(conf.data)
        trainer = update.Trainer(conf, corpus)
        self.family, self.model = family, trainer.model
        self.step: Any = trainer.step
        self.state = trainer.initial_state()
        self.rows = sharding.put_rows(next(corpus.stream(1, 0)), trainer.mesh)
        began = time.perf_counter()
        self.run()
        self.compilation = time.perf_counter() - began

    def run(self) -> float:
        """A turn -> training FLOP/s."""
        began = time.perf_counter()
        for _ in range(STEPS):
            self.state, metrics = self.step(self.state, self.rows, np.float32(1e-3))
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - began) / STEPS
        return flops.per_token(self.model, SEQ_LEN).training * ROWS * SEQ_LEN / seconds


def main(params: float = 1e5, rounds: int = 20, families: Sequence[str] = ()) -> int:
    names = [name for name in families or recipe.FAMILIES if name != BASELINE]
    console = Console(stderr=True)
    baseline = Turns(BASELINE, params)
    others = [Turns(name, params) for name in track(names, "compiling", console=console, transient=True)]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    rates: list[float] = [baseline.run()]
    for _ in track(range(rounds), "measuring", console=console, transient=True):
        for other in others:
            rate = other.run()
            rates.append(baseline.run())
            ratios[other.family].append(2 * rate / (rates[-1] + rates[-2]))
    report(baseline, others, ratios, rates)
    return 0


def report(baseline: Turns, others: list[Turns], ratios: dict[str, list[float]], rates: list[float]) -> None:
    out = Console()
    table = Table(
        title=f"Training FLOP/s over the Transformer's {np.median(rates):.3g} ({ROWS} x {SEQ_LEN} tokens, float32, "
        f"{jax.devices()[0].device_kind})",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("family", no_wrap=True)
    columns = ("parameters", "ratio", "quartiles", "train FLOP/token", "decode FLOP/token", "state bytes", "compile s")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for turns in (baseline, *others):
        seen = ratios.get(turns.family, [1.0])
        low, median, high = np.quantile(seen, [0.25, 0.5, 0.75])
        counts = flops.counts(turns.model)
        table.add_row(
            turns.family,
            f"{counts.active - counts.embedding - counts.unembedding:,}",
            f"{median:.2f}",
            "" if turns is baseline else f"{low:.2f} - {high:.2f}",
            f"{flops.per_token(turns.model, SEQ_LEN).training:,.0f}",
            f"{flops.decode_per_token(turns.model, SEQ_LEN):,.0f}",
            f"{flops.state_bytes(turns.model, SEQ_LEN):,}",
            f"{turns.compilation:.1f}",
        )
    (out if out.is_terminal else Console(width=140)).print(table)
