"""Bootstrap draws and their refits: what is drawn, in what pieces, and that each refit is at its own optimum."""

import tracemalloc

import numpy as np
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import resample, search
from scalelab.laws.objective import HUBER
from scalelab.laws.powersum import GRID, PowerSum
from scalelab.laws.resample import Resamples
from scalelab.laws.search import AGREE, polish, refit
from scalelab.laws.solver import minimise
from scalelab.laws.table import prepare


def labelled(n=24):
    return sweep(noise=0.01, sizes=n // 3).assign(
        run=lambda t: np.arange(len(t)) // 2, lab=lambda t: np.where(np.arange(len(t)) < 8, "a", "b")
    )


def rows_of(table, **options):
    return prepare(table, ("params", "tokens"), **options)


def drawn(rows, draws=40, method="pairs", distinct=5, seed=3, strata=None):
    resamples = Resamples(rows, draws, seed, distinct, method, rows.strata if strata is None else strata)
    fitted = 0.9 * np.log(rows.columns["loss"])
    parts = list(resamples.chunks(fitted, np.log(rows.columns["loss"]), 5))
    counts = np.concatenate([c for _, c, _ in parts])
    data = None if parts[0][2] is None else np.concatenate([d for _, _, d in parts])
    return counts, data, fitted


CASES = {
    "pairs": {},
    "clusters": {"cluster": "run"},
    "strata": {"stratify": "lab", "cluster": None},
    "clusters in strata": {"stratify": "lab", "cluster": "run"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["pairs", "wild", "parametric"])
def test_draws_do_not_depend_on_the_chunks(monkeypatch, case, method):
    rows = rows_of(labelled(), **CASES[case])
    # half of these draws have too few different rows or clusters, so that drawing again is tried too
    distinct = {"pairs": 16, "clusters": 16, "strata": 16, "clusters in strata": 16}[case]
    whole = drawn(rows, method=method, distinct=distinct)
    for elements in (24, 7 * 24, 16 * 24):
        monkeypatch.setattr(resample, "ELEMENTS", elements)
        pieces = drawn(rows, method=method, distinct=distinct)
        assert np.array_equal(whole[0], pieces[0])
        if method != "pairs":
            assert np.array_equal(whole[1], pieces[1])


def test_strata_keep_their_sizes():
    rows = rows_of(labelled(), stratify="lab", cluster=None)
    counts, _, _ = drawn(rows)
    assert (counts[:, rows.strata == rows.strata[0]].sum(1) == 8).all()
    assert (counts.sum(1) == 24).all()
    assert len(np.unique(counts, axis=0)) > 30
    counts, _, _ = drawn(rows_of(labelled(), stratify="lab", cluster="run"))
    assert (counts[:, 0::2] == counts[:, 1::2]).all()
    assert (counts[:, :8].sum(1) == 8).all()
    with pytest.raises(BadInput, match="cluster in two strata"):
        laws.fit("chinchilla", labelled().assign(run=lambda t: np.arange(len(t)) % 5), cluster="run", stratify="lab")


def test_every_row_is_drawn_as_often():
    counts, _, _ = drawn(rows_of(labelled(), cluster=None), draws=4000)
    np.testing.assert_allclose(counts.mean(0), 1.0, atol=5 / np.sqrt(4000))
    counts, _, _ = drawn(rows_of(labelled(), stratify="lab", cluster=None), draws=4000)
    np.testing.assert_allclose(counts.mean(0), 1.0, atol=5 / np.sqrt(4000))


def test_wild_signs_are_shared_within_clusters():
    rows = rows_of(labelled(), cluster="run")
    counts, data, fitted = drawn(rows, method="wild")
    assert (counts == 1).all()
    residual = np.log(rows.columns["loss"]) - fitted
    sign = (data - fitted) / residual / np.sqrt(24 / 19)
    np.testing.assert_allclose(np.abs(sign), 1.0, rtol=1e-9)
    np.testing.assert_allclose(sign[:, 0::2], sign[:, 1::2])
    assert abs(sign.mean()) < 0.2


def test_parametric_noise_has_the_residuals_spread():
    rows = rows_of(labelled(), cluster=None)
    _, data, fitted = drawn(rows, draws=3000, method="parametric")
    residual = np.log(rows.columns["loss"]) - fitted
    assert (data - fitted).std() == pytest.approx(np.sqrt((residual**2).sum() / 19), rel=0.02)


def test_methods_agree_where_their_assumptions_hold():
    """Normal noise of one size: pairs, wild and parametric draws estimate one standard error."""
    table = sweep(np.geomspace(1e18, 1e21, 10), 12, noise=0.01)
    error = {
        method: laws.fit("chinchilla", table, objective="log-squares", method=method, bootstrap=400).bse
        for method in ("pairs", "wild", "parametric")
    }
    for method in ("wild", "parametric"):
        np.testing.assert_allclose(error[method], error["pairs"], rtol=0.25)
    for method, name in (("wild", "wild"), ("parametric", "parametric")):
        assert laws.fit("chinchilla", table, method=method, bootstrap=5).record["bootstrap"] == name


def test_strata_that_explain_the_scatter_take_it_out_of_the_interval():
    """Two groups 4 % apart, within which the loss is constant: only the shares of the groups move its mean."""
    level = laws.define(
        "level", lambda p, x: p.L * np.ones_like(x.params), inputs=("params",), objective="log-squares",
        L=laws.positive(1, 5),
    )  # fmt: skip
    table = sweep(noise=0.0).assign(lab=lambda t: np.arange(len(t)) % 2)
    table["loss"] = 2.0 * np.exp(np.where(table.lab == 0, 0.02, -0.02))
    plain, within = (level.fit(table, bootstrap=200, stratify=s, cluster=None) for s in (None, "lab"))
    assert within.record["bootstrap"] == "pairs within strata"
    assert plain.samples.std() == pytest.approx(2.0 * 0.02 / np.sqrt(18), rel=0.2)
    assert within.samples.std() < 1e-9


def test_a_few_clusters_draws_are_those_of_their_rows():
    """Draws of 4 clusters repeat each other; each repetition is fitted once and given back everywhere."""
    table = sweep(np.geomspace(1e17, 1e20, 4), 8, noise=0.004).assign(run=lambda t: np.arange(len(t)) % 4)
    fit = laws.fit("chinchilla", table, cluster="run", bootstrap=60)
    rows = fit.rows
    counts = np.concatenate([c for _, c, _ in Resamples(rows, 60, 0, 5).chunks(rows.weights, rows.weights, 5)])
    picked = np.stack([np.repeat(np.arange(len(table)), c.astype(int)) for c in counts])
    again = laws.fit("chinchilla", table, cluster=None, bootstrap=picked)
    np.testing.assert_allclose(fit.samples, again.samples, rtol=1e-6)
    different = np.unique(counts, axis=0, return_index=True)[1]
    assert len(different) < 40
    assert len(np.unique(fit.samples, axis=0)) == len(different)


def hard():
    """18 rows whose scatter is 20 times the Huber width: resamples have local optima."""
    table = sweep(noise=0.02, seed=1)
    problem = PowerSum([table.params.to_numpy(), table.tokens.to_numpy()], table.loss.to_numpy())
    return problem, rows_of(table, cluster=None)


def excess(problem, rows, theta, counts):
    """Of each refit over the best of 16 starts of its own and all other refits."""
    starts = problem.grid_starts(counts, GRID, 4)
    repeated = np.repeat(counts, starts.shape[1], axis=0)
    lead = minimise(problem, starts.reshape(-1, 5), repeated, HUBER.widened(10), tolerance=1e-4, max_iterations=30)
    best = minimise(problem, lead.theta, repeated, HUBER).value.reshape(len(counts), -1).min(1)
    own = (counts * HUBER.rho(problem.model(theta) - problem.data)[0]).sum(1)
    return own / np.minimum(best, own) - 1


def test_refits_of_a_hard_table_are_at_their_own_optimum(monkeypatch):
    problem, rows = hard()
    one = np.ones(len(rows))
    found = polish(problem, problem.starts(one, HUBER, 8), one, HUBER)
    resamples = Resamples(rows, 200, 0, 5)
    ((_, counts, _),) = resamples.chunks(one, one, 5)

    def missed():
        theta, _ = refit(problem, found, one, HUBER, resamples, 5)
        return int((excess(problem, rows, theta, counts) > AGREE).sum())

    assert missed() == 0
    monkeypatch.setattr(search._Best, "exchange", lambda self: 0)
    monkeypatch.setattr(problem, "cold_starts", lambda weights: None)
    assert missed() >= 2  # from the point fit alone


def test_lanes_are_offered_each_others_optima():
    problem, rows = hard()
    weights = np.ones((6, len(rows)))
    best = search._Best(problem, weights, HUBER, None, lambda lanes: None)
    best.offer(problem.grid_starts(weights, GRID, 4)[:, 0])
    good = best.value.copy()
    bad = problem.model(best.theta[:1]) * 0  # theta of one lane put far off: as if it sat in a worse basin
    best.theta[2] = best.theta[2] + [0.3, 0, 0, 0, 0]
    best.value[2] = (weights[2] * HUBER.rho(problem.model(best.theta[[2]]) - problem.data + bad)[0]).sum()
    best.exchange()
    np.testing.assert_allclose(best.value, good, rtol=1e-9)


def test_memory_does_not_grow_with_the_draws(monkeypatch):
    monkeypatch.setattr(resample, "ELEMENTS", 1 << 16)
    table = sweep(np.geomspace(1e18, 1e21, 64), 64, noise=0.01)
    peaks = []
    for draws in (32, 128):
        tracemalloc.start()
        laws.fit("chinchilla", table, bootstrap=draws, cluster=None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 8 * 4096 * 40  # 96 draws' counts would be 3 MB more
    assert peaks[1] < 40e6


def test_indices_of_rows_that_were_left_out_are_refused():
    table = sweep(noise=0.004)
    table.loc[3, "loss"] = np.nan
    with pytest.raises(BadInput, match="left out"):
        laws.fit("chinchilla", table, drop=True, bootstrap=np.tile(np.arange(18), (5, 1)))
    with pytest.raises(BadInput, match="run from 0 to 17"):
        laws.fit("chinchilla", sweep(), bootstrap=np.full((5, 18), 18))
