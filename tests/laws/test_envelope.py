"""The envelope of training curves: planted curves, censored ends, bootstrap of runs, disk."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, best_size, curves, law, sweep

from scalelab import laws
from scalelab.errors import BadInput

A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


def planted(sizes=25, noise=0.0, seed=0, longest=400, flops=True):
    """Curves that follow the law, from one token per parameter to `longest`; each run off it by its own amount."""
    rng = np.random.default_rng(seed)
    parts = []
    for k, N in enumerate(np.geomspace(1e7, 1e10, sizes)):
        D = np.geomspace(N, N * longest, 30)
        loss = law(N, D) * np.exp(noise * rng.standard_normal())
        parts.append(pd.DataFrame({"run": f"run{k:02d}", "params": N, "tokens": D, "flops": 6 * N * D, "loss": loss}))
    table = pd.concat(parts, ignore_index=True)
    return table if flops else table.drop(columns="flops")


def codes(fit):
    return {n.code: n for n in fit.warnings}


def test_planted_exponents():
    fit = laws.envelope(planted(40), bootstrap=0)
    assert fit.params.a == pytest.approx(A, abs=0.005)
    assert fit.params.b == pytest.approx(1 - A, abs=0.005)
    assert fit.params.a + fit.params.b == pytest.approx(1, abs=1e-9)  # every point obeys C = 6 N D
    for budget in (1e18, 1e19, 1e20):
        assert fit.optimal(budget).params == pytest.approx(best_size(budget), rel=0.03)
    used = fit.envelope[fit.envelope.used]
    np.testing.assert_allclose(used.loss, law(used.params, used.tokens), rtol=3e-4)
    np.testing.assert_allclose(6 * used.params * used.tokens, used.flops, rtol=1e-9)
    assert fit.ok
    assert fit.conf_int().isna().all().all()


def test_compute_is_six_nd_where_it_is_not_given():
    with_flops, without = laws.envelope(planted(12), bootstrap=0), laws.envelope(planted(12, flops=False), bootstrap=0)
    np.testing.assert_allclose(with_flops.params, without.params, rtol=1e-9)


def test_ends_where_the_smallest_or_largest_size_wins_are_dropped():
    table = planted(9)
    fit = laws.envelope(table, bootstrap=0)
    frame = fit.envelope
    assert not frame.used.all()
    ends = table.params.min(), table.params.max()
    for end in ends:
        assert not frame.used[np.isclose(frame.params, end)].any()
    censored = np.polyfit(np.log(frame.flops), np.log(frame.params), 1)[0]
    assert abs(fit.params.a - A) < abs(censored - A)


def test_a_run_that_ended_is_no_candidate():
    """Short curves of small runs must not be extended: at their last point the next size takes over, censored."""
    fit = laws.envelope(planted(9, longest=8), bootstrap=0)
    frame = fit.envelope
    ratio = frame.tokens / frame.params
    assert ratio.max() <= 8 * (1 + 1e-9)
    smallest_alive = np.isclose(frame.tokens / frame.params, 8, rtol=1e-2)
    assert not frame.used[smallest_alive].all()


@pytest.mark.parametrize("seed", range(3))
def test_interval_of_resampled_runs_holds_the_truth(seed):
    fit = laws.envelope(planted(25, noise=0.001, seed=seed), bootstrap=200, seed=seed)
    interval = fit.conf_int()
    assert interval.lower.a <= A <= interval.upper.a
    assert 0 < interval.upper.a - interval.lower.a < 0.1
    best = fit.optimal(1e19)
    assert best.params_lower < best.params < best.params_upper
    again = laws.envelope(planted(25, noise=0.001, seed=seed), bootstrap=200, seed=seed)
    assert np.array_equal(again.samples, fit.samples)


def test_too_few_sizes_and_missing_runs_are_said():
    fit = laws.envelope(planted(4), bootstrap=50)
    assert "too-few-sizes" in codes(fit)
    alone = laws.envelope(planted(2), bootstrap=0)
    assert alone.params.isna().all()
    assert codes(alone)["too-few-sizes"].severity == "error"
    with pytest.raises(BadInput, match="which run"):
        laws.envelope(planted(6).drop(columns="run"))
    with pytest.raises(BadInput, match="one number of parameters"):
        laws.envelope(planted(6).assign(run="same"))
    with pytest.raises(BadInput, match="bootstrap"):
        laws.envelope(planted(6), bootstrap=-1)


def test_cosine_schedules_that_are_cut_are_said():
    table = planted(12)
    assert "cut-cosine" not in codes(laws.envelope(table.assign(schedule="wsd"), bootstrap=0))
    notice = codes(laws.envelope(table.assign(schedule="cosine"), bootstrap=0))["cut-cosine"]
    assert notice.numbers["rows"] == len(table) - 12


def test_curves_of_records():
    """What `records.curves` gives: evaluations by run id."""
    runs = sweep(np.geomspace(1e17, 1e20, 7), 7)
    table = curves(runs).merge(runs[["id", "params"]], on="id")
    fit = laws.envelope(table, bootstrap=0)
    assert fit.record["runs"] == len(runs)
    assert fit.params.a == pytest.approx(A, abs=0.05)


def test_file_and_text(tmp_path):
    fit = laws.envelope(planted(12), bootstrap=30)
    loaded = laws.load(fit.save(tmp_path / "envelope.json"))
    assert loaded.summary() == fit.summary()
    pd.testing.assert_frame_equal(loaded.envelope, fit.envelope)
    assert np.array_equal(loaded.samples, fit.samples, equal_nan=True)
    assert "12 runs" in fit.summary()
