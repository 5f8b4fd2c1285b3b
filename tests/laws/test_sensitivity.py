"""Sensitivity and trim-drift tables against separate fits and the pitfalls measured on the published points."""

import os
import pathlib
import time

import numpy as np
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput

EPOCH = {"tokens": "tokens_derived", "flops": "train_flop"}
TARGET = 5.76e23


@pytest.fixture(scope="module")
def epoch():
    folder = pathlib.Path(os.environ.get("SCALELAB_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "chinchilla_epoch" / "points.csv"
    if not path.is_file():
        pytest.skip(f"NOT CHECKED against published data: {path} is missing; set SCALELAB_DATA")
    table = laws.read_table(path)
    return {245: table, 240: table[table.outlier_top5_loss == 0]}


def runs(noise=0.004):
    return sweep(np.geomspace(1e18, 1e21, 6), 6, noise)


def test_each_row_is_the_fit_that_it_names():
    table = runs()
    frame = laws.fit("chinchilla", table, bootstrap=0).sensitivity(C=1e22)
    assert len(frame) == 4 * 5 * 2  # rows dropped x objectives x kinds of N
    assert set(frame.N) == {"params", "params_non_embedding"}
    highest = table.loss.sort_values(ascending=False).index
    named = {"huber on log": "huber", "squares on log": "log-squares", "squares on value": "squares"}
    for kind in ("params", "params_non_embedding"):
        for what, objective in named.items():
            part = frame[(kind == frame.N) & (frame.objective == what) & ~(frame.delta == 1e-2)]
            for row in part[part.dropped.isin([0, 5])].itertuples():
                left = table.drop(highest[: row.dropped]).assign(params=lambda t, k=kind: t[k])
                alone = laws.fit("chinchilla", left, bootstrap=0, objective=objective)
                assert row.rows == len(left)
                np.testing.assert_allclose(
                    [row.E, row.alpha, row.beta], alone.params[["E", "alpha", "beta"]], rtol=1e-4
                )
    best = laws.fit("chinchilla", table, bootstrap=0).optimal(1e22)
    first = frame.iloc[0]
    assert first["loss at C = 1e+22"] == pytest.approx(best.loss)
    assert first["D/N at C = 1e+22"] == pytest.approx(best.tokens / best.params)


def test_objectives_of_the_published_points(epoch):
    """fitting-practice, pitfall 7: beta and D/N at 5.76e23 FLOP on the 240 rows."""
    frame = laws.fit("chinchilla", epoch[240], columns=EPOCH, bootstrap=0).sensitivity(C=TARGET)
    frame = frame[frame.dropped == 0].set_index(["objective", "delta"])
    told = {("huber on log", 1e-3): (0.367, 17.9), ("huber on log", 1e-2): (0.382, 16.9)}
    ratio = f"D/N at C = {TARGET:.3g}"
    for key, (beta, per) in told.items():
        assert frame.loc[key, "beta"] == pytest.approx(beta, abs=6e-4)
        assert frame.loc[key, ratio] == pytest.approx(per, abs=0.06)
    for objective, beta, per in (("squares on log", 0.406, 14.3), ("squares on value", 0.428, 10.4)):
        row = frame.loc[objective].iloc[0]
        assert row["beta"] == pytest.approx(beta, abs=6e-4)
        assert row[ratio] == pytest.approx(per, abs=0.06)


def test_trims_of_the_published_points(epoch):
    """fitting-practice, pitfall 6: dropping 0, 3, 5, 10, 20 of 245 rows."""
    frame = laws.fit("chinchilla", epoch[245], columns=EPOCH, bootstrap=0).trim_drift(TARGET)
    assert frame.dropped.tolist() == [0, 3, 5, 10, 20]
    np.testing.assert_allclose(frame.beta, [0.453, 0.383, 0.367, 0.358, 0.327], atol=6e-4)
    np.testing.assert_allclose(frame[f"D/N at C = {TARGET:.3g}"], [6.8, 14.7, 17.9, 19.9, 31.1], atol=0.06)
    assert frame.z.iloc[0] == 0
    assert (frame.z.iloc[1:] > 5).all()


def test_twenty_fits_to_240_rows_take_half_a_second_at_most(epoch):
    fit = laws.fit("chinchilla", epoch[240], columns=EPOCH, bootstrap=0)
    times = []
    for _ in range(5):
        began = time.process_time()
        assert len(fit.sensitivity()) == 20
        times.append(time.process_time() - began)
    assert min(times) < 0.5, times


def test_trims_of_a_true_law_drift_by_chance_only():
    z = [laws.fit("chinchilla", sweep(np.geomspace(1e18, 1e21, 6), 6, 0.005, s), bootstrap=0).trim_drift().z.max()
         for s in range(12)]  # fmt: skip
    assert max(z) < 4
    assert max(z) > 0.5


def test_the_row_order_does_not_matter():
    table = runs()
    a, b = (laws.fit("chinchilla", t, bootstrap=0).sensitivity() for t in (table, table.sample(frac=1, random_state=1)))
    np.testing.assert_allclose(a[["E", "alpha", "beta"]], b[["E", "alpha", "beta"]], rtol=1e-5)


def test_a_law_without_allocation_shows_its_target():
    one = laws.define(
        "size", lambda p, x: p.E + p.A * x.params**-p.alpha, inputs=("params",),
        E=laws.positive(0.1, 10, linear=True), A=laws.positive(1, 1e5, linear=True), alpha=laws.free(0.05, 1),
    )  # fmt: skip
    table = runs(0.001).assign(loss=lambda t: 1.7 + 400 * t.params**-0.34)
    fit = one.fit(table, bootstrap=0)
    frame = fit.sensitivity()
    largest = table.params[table.flops.idxmax()]
    assert f"loss at params = {largest:.3g}" in frame
    with pytest.raises(BadInput, match="C = "):
        fit.sensitivity(C=1e20)


@pytest.mark.parametrize("drop", [[-1], [], [40]])
def test_bad_drops(drop):
    with pytest.raises(BadInput, match="drop"):
        laws.fit("chinchilla", runs(), bootstrap=0).sensitivity(drop=drop)


def test_bad_budgets():
    with pytest.raises(BadInput, match="C ="):
        laws.fit("chinchilla", runs(), bootstrap=0).sensitivity(C=-1.0)
