"""Best learning rate and batch by local quadratics: planted optima, refusals, the law through them."""

import numpy as np
import pytest
from test_rules import COLUMNS, grids, steplaw  # noqa: F401  the published grids are a fixture

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.hyperparameters import excess_loss
from scalelab.laws.optimum import lr_optimum

CELLS = tuple((N, D) for N in (1e8, 2e8, 5e8, 1e9) for D in (5e9, 2e10, 8e10))


def codes(found):
    return {n.code for n in found.warnings}


def test_planted_optima_without_noise():
    found = lr_optimum(grids(cells=CELLS), bootstrap=0)
    cells = found.cells
    assert cells.used.all()
    N, D = cells.params_non_embedding, cells.tokens
    np.testing.assert_allclose(cells.lr, 1.5 * N**-0.7 * D**0.3, rtol=1e-8)
    np.testing.assert_allclose(cells.batch_tokens, 1.2 * D**0.55, rtol=1e-8)
    np.testing.assert_allclose(cells.loss, 2 + 300 * N**-0.35 + 500 * D**-0.35, rtol=1e-8)
    np.testing.assert_allclose(found.params[["a", "b", "beta"]], [-0.7, 0.3, 0.55], rtol=1e-7)
    np.testing.assert_allclose(found.rule(3e9, 1e11), [1.5 * 3e9**-0.7 * 1e11**0.3, 1.2 * 1e11**0.55], rtol=1e-7)
    assert not codes(found)
    assert found.conf_int().isna().all(axis=None)


def test_intervals_hold_the_truth():
    hits, near = [], []
    for seed in range(30):
        found = lr_optimum(grids(noise=5e-4, seed=seed, cells=CELLS), bootstrap=200, seed=seed)
        interval = found.conf_int()
        hits.append([interval.lower[p] < v < interval.upper[p] for p, v in (("a", -0.7), ("b", 0.3), ("beta", 0.55))])
        best = 1.5 * found.cells.params_non_embedding**-0.7 * found.cells.tokens**0.3
        near.append((found.cells.lr_lower < best) & (best < found.cells.lr_upper))
    assert (np.mean(hits, axis=0) >= 0.85).all()
    assert 0.88 <= np.mean(near) <= 0.99


def test_prediction_and_file(tmp_path):
    found = lr_optimum(grids(noise=5e-4, cells=CELLS), bootstrap=200)
    new = {"params_non_embedding": [3e9], "tokens": [1e11]}
    frame = found.predict(new)
    assert frame.lr_lower[0] < frame.lr[0] < frame.lr_upper[0]
    np.testing.assert_allclose([frame.lr[0], frame.batch_tokens[0]], found.rule(3e9, 1e11))
    again = laws.load(found.save(tmp_path / "optimum.json"))
    assert again.summary() == found.summary()
    assert again.predict(new).equals(frame)
    assert "12 of 12 cells" in found.summary()


def test_the_answer_does_not_depend_on_the_order_of_rows():
    table = grids(noise=5e-4, cells=CELLS)
    a, b = (lr_optimum(t, bootstrap=50) for t in (table, table.sample(frac=1, random_state=0)))
    np.testing.assert_allclose(a.estimate, b.estimate, rtol=1e-9)
    np.testing.assert_allclose(a.samples, b.samples, rtol=1e-6)


def one_cell_changed(change):
    table = grids(cells=CELLS)
    cell = (table.params_non_embedding == 1e8) & (table.tokens == 5e9)
    return change(table, cell)


def test_refusals():
    best = 1.5 * 1e8**-0.7 * 5e9**0.3

    def cut(table, cell):
        return table[~cell | (table.lr < best / 1.5)]

    def saddle(table, cell):
        x, y = np.log(table.lr / best), np.log(table.batch_tokens / (1.2 * 5e9**0.55))
        return table.assign(loss=table.loss.where(~cell, 3 * np.exp(0.0005 * (x**2 - 2 * y**2))))

    def few(table, cell):
        return table[~cell | (np.arange(len(table)) % 20 == 0)]

    for change, code in ((cut, "lr-unbracketed"), (saddle, "lr-concave"), (few, "lr-too-few-runs")):
        found = lr_optimum(one_cell_changed(change), bootstrap=20)
        assert code in codes(found)
        first = found.cells.iloc[0]
        assert not first.used
        assert np.isnan(first.lr)
        assert first.reason
        assert found.record["cells_used"] == 11
        np.testing.assert_allclose(found.params.a, -0.7, rtol=1e-6)  # it does not touch the law
        assert "refused" in found.summary()


def test_curvature_is_warned_of():
    table = grids(noise=2e-4, cells=CELLS)
    bend = 0.2 * np.log(table.params_non_embedding / 3e8) ** 2
    bent = table.assign(lr=table.lr * np.exp(bend))
    straight = lr_optimum(bent)
    assert "lr-curvature" in codes(straight)
    assert "lr-curvature" not in codes(lr_optimum(table))
    curved = lr_optimum(bent, curvature=True)
    interval = curved.conf_int()
    assert interval.lower.k < 0.2 < interval.upper.k
    best = 1.5 * 3e9**-0.7 * 1e11**0.3 * np.exp(0.2 * np.log(10) ** 2)
    assert abs(np.log(curved.rule(3e9, 1e11)[0] / best)) < 0.3
    assert abs(np.log(straight.rule(3e9, 1e11)[0] / best)) > 0.4


def test_too_few_cells_give_no_law():
    found = lr_optimum(grids(cells=CELLS[:3]), bootstrap=10)  # one N
    assert "too-few-cells" in codes(found)
    assert not found.ok
    assert found.params.isna().all()
    assert found.cells.used.all()
    exact = lr_optimum(grids(cells=((1e8, 5e9), (1e8, 5e10), (1e9, 5e9))), bootstrap=10)
    assert "no-spare-cells" in codes(exact)
    assert exact.conf_int().loc["a"].isna().all()
    for bad in ({"within": 0.0}, {"bootstrap": -1}, {"bootstrap": True}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            lr_optimum(grids(), **bad)


def test_published_grids(steplaw):  # noqa: F811
    table = steplaw[0]
    found = lr_optimum(table, columns=COLUMNS)
    assert found.cells.used.all()
    interval = found.conf_int()
    assert interval.lower.a < -0.713 < interval.upper.a  # the published rule's exponents
    assert interval.lower.b < 0.307 < interval.upper.b
    assert interval.lower.beta < 0.571 < interval.upper.beta
    unseen = []
    for _, cell in table.groupby(["N", "D"]):
        rule = lr_optimum(table.drop(cell.index), columns=COLUMNS, bootstrap=0).rule
        unseen.append(excess_loss(rule, cell, COLUMNS).excess.iloc[0])
    assert np.mean(unseen) < 0.0015
