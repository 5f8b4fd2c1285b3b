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


# where the middle of the search makes no sense together
GIVEN = {"m4": {"E": 0.1, "L0": 0.9, "alpha": 1.5, "B": 50.0, "c": 0.3}, "speculative": {"l0": 5.0}}


def case(form, rows=6):
    """Constants of any law, a vector per row (published ones, else the middle of the search, each a little off), and
    inputs of a sensible size."""
    rng = np.random.default_rng(0)
    specs = list(form.parameters.values())
    known = GIVEN.get(form.name) or (next(iter(form.published.values()), {}) if form.published else {})
    middle = [float(known.get(n, s.to_p(np.mean(s.search)))) for n, s in form.parameters.items()]
    params = np.array(middle) * (1 + 0.01 * rng.standard_normal((rows, len(specs))))
    columns = {}
    for role in (*form.inputs, *form.measured):
        low, high = form.ranges.get(role, (np.nan, np.nan))
        if role == form.group:
            columns[role] = np.zeros(rows)
        elif np.isfinite([low, high]).all():
            columns[role] = rng.uniform(low + 0.05 * (high - low), high - 0.05 * (high - low), rows)
        elif role in ("params", "params_active", "params_non_embedding", "tokens", "unique_tokens", "flops"):
            columns[role] = np.exp(rng.uniform(np.log(1e8), np.log(1e10), rows))
        else:
            columns[role] = rng.uniform(1.5, 6, rows)
    for role in columns:
        if role.startswith("unique_tokens") and "tokens" in columns:
            columns[role] = columns["tokens"] / rng.uniform(1.5, 6, rows)
    shares = [role for role in columns if role.startswith("r_")]
    total = np.sum([columns[role] for role in shares], axis=0)
    columns |= {role: columns[role] / total for role in shares}
    return params, columns


def constants_of(law):
    """A sensible value of each parameter of any law."""
    middle = {name: float(spec.to_p(np.mean(spec.search))) for name, spec in law.parameters.items()}
    return middle if "lr_sum" in law.inputs else dict(zip(law.parameters, case(law)[0][0].tolist(), strict=True))


def rows_of(law, rows=24, noise=0.001):
    """A table of any law's inputs (a learning-rate schedule for laws of curves) and its target with noise."""
    if "lr_sum" in law.inputs:
        step = np.arange(0, 1001, 20)
        shapes = {"cosine": 0.55 + 0.45 * np.cos(np.pi * step / 1000), "constant": np.ones(len(step))}
        table = pd.concat([pd.DataFrame({"schedule": k, "step": step, "lr": 1e-3 * v}) for k, v in shapes.items()])
        table = table[table.step > 0].reset_index(drop=True)
    else:
        table = pd.DataFrame(case(law, rows)[1])
    value = law.predict(constants_of(law), table).to_numpy()
    spread = noise * np.random.default_rng(1).standard_normal(len(value))
    value = np.clip(value * np.exp(spread), *law.ranges.get(law.target, (-np.inf, np.inf)))
    return table.assign(**{law.target: value})
