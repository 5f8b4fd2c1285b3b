"""Findings about how the rows came about: schedules, families, learning rates, ways of counting."""

import numpy as np
import pandas as pd
import pytest
from checked import clean, codes, fit


def test_mixed_and_cut_schedules():
    table = clean()
    steps = np.full(len(table), 1000)
    cosine = table.assign(schedule="cosine", step=steps, steps=steps)
    assert fit(cosine).warnings == []
    cosine.loc[[3, 8], "step"] = 400
    assert codes(fit(cosine))["cut-cosine"].numbers["rows"] == table.id[[3, 8]].tolist()
    cosine.loc[[3, 8], "schedule"] = "constant"
    found = codes(fit(cosine))
    assert "cut-cosine" not in found
    assert found["mixed-schedules"].numbers["values"] == ["constant", "cosine"]


def test_families_in_one_law():
    table = clean()
    assert "mixed-families" not in codes(fit(table.assign(family="moe")))
    table["family"] = np.where(np.arange(len(table)) % 2, "moe", "mamba2")
    assert codes(fit(table))["mixed-families"].numbers["values"] == ["mamba2", "moe"]


def test_one_learning_rate_for_all_sizes():
    table = clean().drop(columns="parametrization")
    assert codes(fit(table))["untuned-lr"].numbers["kind"] == "constant"
    assert codes(fit(table.assign(parametrization="standard")))["untuned-lr"].numbers["lr"] == 3e-3
    assert "untuned-lr" not in codes(fit(table.assign(lr=3e-3 * (table.params / 1e8) ** -0.3)))


def test_learning_rates_on_the_edge_of_their_sweep():
    table = clean(noise=0.0)
    rule = table.assign(lr=3e-3 * (table.params / 1e8) ** -0.3)
    place = [0, 20, 45]
    extra = [
        rule.loc[place].assign(lr=lambda t, f=f: t.lr * f, loss=lambda t, f=f: t.loss * (1 - 0.01 * np.log(f)))
        for f in (2.0, 4.0)
    ]
    notice = codes(fit(pd.concat([rule, *extra])))["untuned-lr"]
    assert notice.numbers["kind"] == "edge"
    assert len(notice.numbers["rows"]) == 3
    inside = [rule.loc[[20]].assign(lr=lambda t, f=f: t.lr * f, loss=lambda t, f=f: t.loss * (1 + 0.002 * f))
              for f in (0.5, 2.0)]  # fmt: skip
    notice = codes(fit(pd.concat([rule, *inside])))["untuned-lr"]
    assert notice.numbers["kind"] == "one scale"


def test_mixed_ways_of_counting():
    table = clean()
    kinds = table.assign(params_kind=np.where(table.index % 2, "total", "non-embedding"))
    assert codes(fit(kinds))["mixed-N-kinds"].numbers["values"] == ["non-embedding", "total"]


@pytest.mark.parametrize(("column", "values"), [("tokenizer", "ab"), ("eval_set", "ab"), ("seq_len", (256, 512))])
def test_mixed_evaluations(column, values):
    table = clean()
    mixed = table.assign(**{column: np.where(table.index % 2, values[0], values[1])})
    assert set(codes(fit(mixed))["mixed-evals"].numbers["values"]) == {column}
