"""Fits of tables whose faults are known, and what is found in them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from planted import TRUTH, as_records, law, sweep

from scalelab import laws


def codes(fit):
    return {n.code: n for n in fit.warnings}


def fit(table, **options):
    return laws.fit("chinchilla", table, **({"bootstrap": 0} | options))


def grid(N, D, noise=0.002, truth=TRUTH):
    table = pd.DataFrame([(n, d) for n in N for d in D], columns=["params", "tokens"])
    loss = law(table.params, table.tokens, truth) * np.exp(noise * np.random.default_rng(0).standard_normal(len(table)))
    return as_records(table.assign(flops=6 * table.params * table.tokens, loss=loss))


NS, DS = np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)


def clean(seed=0, noise=0.004):
    return sweep(np.geomspace(1e18, 1e21, 7), 7, noise, seed)
