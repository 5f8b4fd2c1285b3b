"""What the checks of a fit find in its rows, its design and its solution, each in a table that deserves it."""

import numpy as np
import pandas as pd
import pytest
from checked import DS, NS, codes, fit, grid
from planted import TRUTH, law, sweep

from scalelab.errors import BadInput


def test_a_clean_sweep_has_no_findings():
    found = fit(grid(NS, DS), bootstrap=100)
    assert found.ok
    assert found.warnings == []


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("loss", np.nan, "nonfinite"),
        ("loss", np.inf, "nonfinite"),
        ("loss", -1.0, "nonpositive"),
        ("tokens", 0.0, "nonpositive"),
    ],
)
def test_unusable_rows_are_named_or_dropped(column, value, what):
    table = grid(NS, DS)
    table.loc[7, column] = value
    with pytest.raises(BadInput, match=f"{column}.*{what}.*{table.id[7]}"):
        fit(table)
    found = fit(table, drop=True)
    assert codes(found)[f"{what}-row"].numbers["rows"] == [table.id[7]]
    assert found.nobs == len(table) - 1
    np.testing.assert_allclose(found.params, fit(table.drop(7)).params, rtol=1e-8)


def test_bad_weights_are_named():
    table = grid(NS, DS)
    with pytest.raises(BadInput, match=r"weights.*nonpositive"):
        fit(table, weights=np.where(np.arange(25) == 3, 0.0, 1.0))


def test_unfinished_runs_are_left_out_aloud():
    table = grid(NS, DS)
    table.loc[[2, 5], "status"] = "diverged"
    table.loc[[2, 5], "loss"] = [np.nan, 50.0]
    table.loc[9, "status"] = "failed"
    found = fit(table)
    notice = codes(found)["run-not-done"]
    assert notice.numbers["rows"] == table.id[[2, 5, 9]].tolist()
    assert notice.numbers["status"] == {"diverged": 2, "failed": 1}
    assert found.nobs == 22
    with pytest.raises(BadInput, match="status is done"):
        fit(table.assign(status="failed"))


def test_copies_are_counted_once_and_replicates_are_not():
    table = grid(NS, DS)
    twice = pd.concat([table, table], ignore_index=True)
    found = fit(twice)
    assert codes(found)["duplicate-rows"].numbers["rows"] == table.id.tolist()
    assert found.nobs == 25
    np.testing.assert_allclose(found.params, fit(table).params, rtol=1e-10)
    replicates = fit(twice.assign(seed=np.repeat([0, 1], 25)))
    assert replicates.nobs == 50
    assert "duplicate-rows" not in codes(replicates)


@pytest.mark.parametrize("rows", [[0, 6, 12, 18], [0, 6, 12, 18] * 10, [3]])
def test_fewer_rows_than_parameters_are_refused(rows):
    with pytest.raises(BadInput, match=r"5 parameters|at least 5"):
        fit(grid(NS, DS).iloc[rows])


def test_too_few_rows():
    found = fit(grid(NS, DS).iloc[[0, 4, 8, 11, 20, 24]], bootstrap=50)
    assert codes(found)["too-few-rows"].severity == "error"
    assert not found.ok
    assert found.conf_int().isna().all().all()
    assert codes(fit(grid(NS[::2], DS[::2])))["too-few-rows"].severity == "warning"


def test_repeated_rows_do_not_make_up_for_few():
    with pytest.raises(BadInput, match="rows"):
        fit(pd.concat([grid(NS, DS).iloc[[0, 4, 8, 11]]] * 12))
    found = fit(pd.concat([grid(NS, DS).iloc[[0, 4, 8, 11, 20]]] * 12))
    assert {"duplicate-rows", "too-few-rows"} <= set(codes(found))
    assert not found.ok


# ------------------------------------------------------------------------------------------------ design


def test_too_few_levels():
    found = fit(grid(NS[[0, 4]], DS), bootstrap=20)
    assert codes(found)["too-few-levels"].numbers == {"column": "params", "levels": 2}
    assert not found.ok


def test_constant_predictor():
    found = fit(grid([1e8], np.geomspace(1e9, 1e11, 12)), bootstrap=20)
    assert codes(found)["constant-predictor"].numbers["column"] == "params"
    assert not found.ok
    assert found.conf_int().isna().all().all()
    assert "no intervals" in found.summary()


def test_one_ratio_of_tokens_to_parameters():
    N = np.geomspace(1e7, 1e10, 14)
    table = pd.DataFrame({"params": N, "tokens": 20 * N})
    found = fit(table.assign(loss=law(table.params, table.tokens)), bootstrap=20)
    assert codes(found)["collinear-ND"].numbers["correlation"] > 0.999
    assert "ill-conditioned" in codes(found)
    assert not found.ok


def test_ill_conditioned_names_the_combination():
    table = grid(np.geomspace(1e8, 2.2e8, 5), DS, noise=0)
    flat = TRUTH | {"alpha": 0.01, "A": 0.5}
    table["loss"] = law(table.params, table.tokens, flat)
    notice = codes(fit(table))["ill-conditioned"]
    assert notice.numbers["eigenvalue"] < 1e-8
    assert "E" in notice.message
    assert "A" in notice.message


def test_narrow_range():
    found = fit(grid(np.geomspace(1e8, 4e8, 5), np.geomspace(1e9, 4e9, 5)))
    assert codes(found)["narrow-range"].numbers["decades"] == pytest.approx(np.log10(16))


def test_six_nd():
    table = grid(NS, DS)
    assert "six-nd" not in codes(fit(table))
    notice = codes(fit(table.assign(flops=table.flops * 1.3)))["six-nd"]
    assert notice.numbers["highest"] == pytest.approx(1.3)
    trend = codes(fit(table.assign(flops=table.flops * (table.params / 1e8) ** 0.04)))["six-nd"]
    assert trend.numbers["trend"] == pytest.approx(0.04)


def test_repeated_data():
    table = grid(NS, DS)
    table["unique_tokens"] = np.minimum(table.tokens, 4e10)
    notice = codes(fit(table))["repeated-data"]
    assert notice.numbers["epochs"] == pytest.approx(2.5)
    assert len(notice.numbers["rows"]) == 5


# ------------------------------------------------------------------------------------------------ solution


def test_a_diverged_run_is_named_and_hardly_moves_the_fit():
    table = grid(NS, DS, noise=0.001)
    clean = fit(table)
    table.loc[12, "loss"] = 50.0
    found = fit(table)
    notice = codes(found)["diverged-run"]
    assert notice.numbers["rows"] == [table.id[12]]
    assert notice.numbers["params_without"]["E"] == pytest.approx(clean.params.E, abs=0.01)
    assert abs(found.params.E - clean.params.E) < 0.01


def test_outlier_row():
    table = grid(NS, DS)
    table.loc[12, "loss"] *= 0.9
    assert codes(fit(table))["outlier-row"].numbers["rows"] == [table.id[12]]


def test_an_irreducible_loss_of_zero():
    table = grid(NS, DS, noise=0.002, truth=TRUTH | {"E": 1e-9})
    table["loss"] -= 0.03
    found = fit(table, bootstrap=20)
    assert found.converged
    assert codes(found)["E-below-zero"].numbers["E"] < 1e-4
    assert np.isfinite(found.draws.to_numpy()).all()


def test_floor_above_the_lowest_loss():
    table = grid(NS, DS, noise=0)
    table.loc[24, "loss"] = 1.5  # one run that is far better than the law's floor
    assert codes(fit(table))["E-above-min-loss"].numbers["lowest"] == 1.5


def test_tiny_term():
    table = grid(NS, DS, noise=0.0005, truth=TRUTH | {"A": 2.0})
    found = fit(table)
    assert codes(found)["tiny-term"].numbers["term"] == "A"
    assert np.isfinite(found.params).all()


def test_a_loss_that_ignores_size():
    """A = 0: its exponent may be anything; said, without a crash or an endless loop."""
    table = grid(NS, DS, noise=0, truth=TRUTH | {"A": 0.0})
    found = fit(table, bootstrap=20)
    assert {"tiny-term", "at-bound", "ill-conditioned", "not-converged"} & set(codes(found))
    np.testing.assert_allclose(found.predict(table), table.loss, rtol=1e-5)


def test_a_loss_that_rises_with_size_sits_on_the_bound():
    table = grid(NS, DS, noise=0.001)
    table["loss"] = 2 + 1000 / table.tokens**0.37 + 0.1 * np.log(table.params / 1e7)
    found = fit(table, bootstrap=50)
    assert {"at-bound", "tiny-term"} & set(codes(found))


def test_at_bound():
    table = grid(np.geomspace(1e7, 1e8, 5), DS, noise=0)
    table["loss"] = law(table.params, table.tokens, TRUTH | {"A": 1e43, "alpha": 6.0})
    found = fit(table, bootstrap=20)
    assert codes(found)["at-bound"].numbers["parameter"] == "alpha"
    assert not found.ok
    assert found.conf_int().isna().all().all()


def test_solver_failures_withhold_intervals(monkeypatch):
    """A solver that stops at once: not converged, few starts agree, and no interval is given."""
    from scalelab.laws import search as module

    real = module.minimise
    monkeypatch.setattr(
        module, "minimise", lambda *args, **kw: real(*args, **(kw | {"max_iterations": 1, "tolerance": 1e-30}))
    )
    found = fit(grid(NS, DS), bootstrap=20)
    assert {"not-converged", "few-starts-agree"} <= set(codes(found))
    assert not found.ok
    assert found.conf_int().isna().all().all()
    assert np.isnan(found.optimal(1e20).params_lower)
    assert "NOT CONVERGED" in found.summary()


# ------------------------------------------------------------------------------------------------ no alarm fatigue


@pytest.mark.parametrize("options", [{}, {"objective": "log-squares"}])
@pytest.mark.parametrize(("budgets", "sizes"), [(4, 4), (6, 6), (10, 10)])
def test_clean_sweeps_raise_no_alarm(budgets, sizes, options):
    """A dozen tests a fit: none of them rings on a true law with normal noise."""
    found = [
        notice.code
        for seed in range(3)
        for notice in fit(sweep(np.geomspace(1e18, 1e21, budgets), sizes, 0.005, 100 + seed), **options).warnings
    ]
    assert found == []


@pytest.mark.study
@pytest.mark.slow
def test_the_rate_of_false_alarms():
    alarms = 0
    for seed in range(150):
        for budgets, sizes in ((4, 4), (6, 6), (10, 10)):
            found = fit(sweep(np.geomspace(1e18, 1e21, budgets), sizes, 0.005, seed), bootstrap=200).warnings
            alarms += bool(found)
    assert alarms <= 9, alarms  # of 450 fits
