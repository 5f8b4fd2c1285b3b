"""Tables drawn from a planted Chinchilla law, with the columns of RunRecord."""

from __future__ import annotations

import numpy as np
import pandas as pd

TRUTH = {"E": 1.7, "A": 400.0, "B": 1200.0, "alpha": 0.34, "beta": 0.37}


def law(N, D, truth=TRUTH):
    return truth["E"] + truth["A"] / N ** truth["alpha"] + truth["B"] / D ** truth["beta"]


def best_size(C, truth=TRUTH):
    ratio = truth["alpha"] * truth["A"] / (truth["beta"] * truth["B"])
    total = truth["alpha"] + truth["beta"]
    return ratio ** (1 / total) * (C / 6) ** (truth["beta"] / total)


def sweep(budgets=(1e18, 1e19, 1e20), sizes=6, noise=0.0, seed=0, spread=4.0, truth=TRUTH, per_token=None):
    """An IsoFLOP sweep around each budget's optimum; `per_token` maps N to FLOPs per token (6 N by default)."""
    rng = np.random.default_rng(seed)
    rows = []
    for budget in budgets:
        for factor in np.geomspace(1 / spread, spread, sizes):
            N = best_size(budget, truth) * factor
            cost = 6 * N if per_token is None else per_token(N)
            D = budget / cost
            rows.append({"params": N, "tokens": D, "flops": budget, "flops_6n": 6 * N * D})
    table = pd.DataFrame(rows)
    table["loss"] = law(table.params, table.tokens, truth) * np.exp(noise * rng.standard_normal(len(table)))
    return as_records(table)


def as_records(table):
    """The remaining columns of RunRecord."""
    n = len(table)
    filled = table.assign(
        id=[f"{i:012x}" for i in range(n)],
        family="transformer",
        status="done",
        params_non_embedding=table.params * 0.8,
        unique_tokens=table.tokens,
        batch_tokens=4096,
        seq_len=256,
        lr=3e-3,
        parametrization="mup",  # under which one learning rate serves all sizes
        loss_se=0.002 * table.loss,
        bpb=table.loss / np.log(2),
        seconds=30.0,
        width=128,
        layers=4,
        seed=0,
    )
    return filled


def curves(table, points=12, truth=TRUTH):
    """Intermediate evaluations of the runs of a table."""
    parts = []
    for run in table.itertuples():
        share = np.linspace(0.1, 1, points)
        loss = law(run.params, run.tokens * share, truth)
        loss = loss + (run.loss - loss[-1])
        step = (share * 1000).astype(int)
        parts.append(
            pd.DataFrame(
                {
                    "id": run.id,
                    "step": step,
                    "tokens": run.tokens * share,
                    "flops": run.flops * share,
                    "loss": loss,
                    "loss_se": 0.002 * loss,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
