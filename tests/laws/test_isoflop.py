"""IsoFLOP parabolas: planted exponents, refusals that are said, bootstrap, disk."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, best_size, sweep

from scalelab import laws
from scalelab.errors import BadInput

A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


def codes(fit):
    return {n.code: n for n in fit.warnings}


def test_planted_exponents_are_exact_without_noise():
    """Sizes centred on each optimum: the parabola's bias is the same factor at every budget."""
    fit = laws.isoflop(sweep(spread=3), bootstrap=0)
    assert fit.params.a == pytest.approx(A, rel=1e-6)
    assert fit.params.b == pytest.approx(1 - A, rel=1e-6)
    vertices = fit.vertices
    np.testing.assert_allclose(vertices.params, [best_size(c) for c in vertices.flops], rtol=0.05)
    np.testing.assert_allclose(vertices.tokens * vertices.params * 6, vertices.flops, rtol=1e-6)
    assert fit.conf_int().isna().all().all()  # no draws, no interval
    assert fit.ok


def test_intervals_hold_the_truth_under_noise():
    inside = []
    for seed in range(8):
        fit = laws.isoflop(sweep(np.geomspace(1e17, 1e20, 4), 9, 0.002, seed, spread=3), bootstrap=300)
        interval = fit.conf_int()
        inside.append(interval.lower.a <= A <= interval.upper.a)
        assert interval.lower.a < fit.params.a < interval.upper.a
        v = fit.vertices
        assert ((v.params_lower < v.params) & (v.params < v.params_upper)).all()
        assert ((v.tokens_lower < v.tokens) & (v.tokens < v.tokens_upper)).all()
    assert np.mean(inside) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [4, 6])
def test_coverage(sizes):
    """Four sizes a budget leave one spare row each: the intervals must be as wide as that."""
    inside = []
    for seed in range(150):
        fit = laws.isoflop(sweep(sizes=sizes, noise=0.003, seed=seed), bootstrap=300)
        if fit.ok:
            interval = fit.conf_int()
            inside.append(interval.lower.a <= A <= interval.upper.a)
    assert len(inside) > 140
    assert 0.9 <= np.mean(inside) <= 0.995


def test_three_sizes_a_budget_have_no_intervals():
    fit = laws.isoflop(sweep(sizes=3), bootstrap=50)
    assert "no-spare-sizes" in codes(fit)
    assert fit.params.notna().all()
    assert fit.conf_int().isna().all().all()


def test_optimum_of_the_power_laws():
    fit = laws.isoflop(sweep(noise=0.002, spread=3), bootstrap=200)
    best = fit.optimal([1e18, 1e19])
    np.testing.assert_allclose(best.params, [best_size(1e18), best_size(1e19)], rtol=0.2)
    assert (best.params_lower < best.params).all()
    assert fit.optimal(1e18).tokens == best.tokens[0]


def test_tokens_follow_the_family_s_own_cost():
    def cost(N):
        return 6 * N + 4e4 * N ** (2 / 3)

    fit = laws.isoflop(sweep(spread=3, per_token=cost), bootstrap=0)
    v = fit.vertices
    np.testing.assert_allclose(v.tokens, v.flops / cost(v.params), rtol=0.01)
    assert fit.params.a + fit.params.b > 1.001


def test_a_minimum_outside_the_sizes_is_refused():
    table = sweep(budgets=(1e18, 1e19, 1e20), sizes=8)
    table = table[~((table.flops == 1e20) & (table.params > 0.7 * best_size(1e20)))]
    fit = laws.isoflop(table, bootstrap=50)
    notice = codes(fit)["isoflop-unbracketed"]
    assert notice.numbers["flops"] == pytest.approx([1e20])
    assert "above the sizes" in notice.message
    assert fit.vertices.used.tolist() == [True, True, False]
    assert "above" in fit.vertices.reason[2]
    assert np.isnan(fit.vertices.params[2])
    assert "refused" in fit.summary()
    two = laws.isoflop(table[table.flops < 1e20], bootstrap=0)
    assert fit.params.a == pytest.approx(two.params.a, rel=1e-3)


def test_a_parabola_that_opens_downward_is_refused():
    table = sweep(sizes=6)
    bad = table.flops == 1e18
    table.loc[bad, "loss"] = 3 - 0.05 * np.log(table.params[bad] / best_size(1e18)) ** 2
    fit = laws.isoflop(table, bootstrap=20)
    assert codes(fit)["isoflop-concave"].numbers["flops"] == pytest.approx([1e18])
    assert fit.vertices.used.tolist() == [False, True, True]


def test_fewer_than_two_budgets_give_no_exponents():
    fit = laws.isoflop(sweep(budgets=(1e19,)), bootstrap=20)
    assert "too-few-budgets" in codes(fit)
    assert not fit.ok
    assert fit.params.isna().all()
    assert np.isnan(fit.optimal(1e19).params)
    assert "no intervals" in fit.summary()
    assert fit.vertices.used.all()  # the one minimum is still there to see


def test_fewer_than_three_sizes_are_refused():
    fit = laws.isoflop(sweep(sizes=6).groupby("flops").head(2), bootstrap=20)
    assert fit.vertices.reason.tolist() == ["fewer than three sizes"] * 3
    assert codes(fit)["isoflop-unbracketed"].numbers["flops"] == pytest.approx([1e18, 1e19, 1e20])


def test_nearly_equal_sizes_are_one_size():
    table = sweep(budgets=(1e18, 1e19), sizes=3)
    middle = table.groupby("flops").params.transform("median")
    near = table.assign(params=np.where(table.params < middle, middle * (1 - 1e-9), table.params))
    assert not laws.isoflop(near, bootstrap=5).vertices.used.any()


def test_budgets_by_column_or_by_nearness():
    table = sweep(noise=0.001)
    jitter = table.assign(flops=table.flops * np.exp(0.03 * np.random.default_rng(0).standard_normal(len(table))))
    assert laws.isoflop(jitter, bootstrap=0).record["budgets"] == 3
    named = table.assign(sweep=np.repeat(["small", "middle", "large"], 6))
    np.testing.assert_allclose(
        laws.isoflop(named, budget="sweep", bootstrap=0).params, laws.isoflop(table, bootstrap=0).params
    )
    spread = table.assign(flops=np.geomspace(1e18, 1e19, len(table)))
    with pytest.raises(BadInput, match="budget="):
        laws.isoflop(spread)


def test_unfinished_runs_are_left_out_and_row_order_is_irrelevant():
    table = sweep(noise=0.002)
    table.loc[3, ["status", "loss"]] = ["diverged", np.nan]
    fit = laws.isoflop(table, bootstrap=50)
    assert "run-not-done" in codes(fit)
    mixed = laws.isoflop(table.sample(frac=1, random_state=1), bootstrap=50)
    np.testing.assert_allclose(mixed.params, fit.params, rtol=1e-9)
    np.testing.assert_allclose(mixed.samples, fit.samples, rtol=1e-6)


def test_noise_that_hides_minima_is_said():
    fit = laws.isoflop(sweep(noise=0.02, seed=4, spread=2), bootstrap=200)
    assert {"bootstrap-degenerate", "isoflop-unbracketed", "isoflop-concave"} & set(codes(fit))


def test_disk_round_trip(tmp_path):
    table = sweep(noise=0.003)
    table = table[~((table.flops == 1e20) & (table.params > best_size(1e20)))]
    fit = laws.isoflop(table, bootstrap=50)
    again = laws.load(fit.save(tmp_path / "isoflop.json"))
    pd.testing.assert_frame_equal(again.vertices, fit.vertices)
    pd.testing.assert_frame_equal(again.draws, fit.draws)
    assert again.summary() == fit.summary()
    assert again.curves == fit.curves
    assert again.warnings == fit.warnings
