"""Every finding that a single fit can have, each triggered by a table that deserves it; and a clean one."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, as_records, best_size, law, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.residuals import runs_test


def codes(fit):
    return {n.code: n for n in fit.warnings}


def fit(table, **options):
    return laws.fit("chinchilla", table, **({"bootstrap": 0} | options))


def grid(N, D, noise=0.002, truth=TRUTH):
    table = pd.DataFrame([(n, d) for n in N for d in D], columns=["params", "tokens"])
    loss = law(table.params, table.tokens, truth) * np.exp(noise * np.random.default_rng(0).standard_normal(len(table)))
    return as_records(table.assign(flops=6 * table.params * table.tokens, loss=loss))


NS, DS = np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)


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


# ------------------------------------------------------------------------------------------------ bootstrap and use


def test_bootstrap_that_cannot_identify_the_law():
    rows = np.tile(np.arange(25), (40, 1))
    rows[:10] = 3  # a quarter of the draws hold one row only
    found = fit(grid(NS, DS), bootstrap=rows)
    assert codes(found)["bootstrap-degenerate"].numbers["failed"] == 10
    assert np.isnan(found.draws.iloc[:10]).all().all()


def test_bootstrap_without_spread_is_suspected():
    found = fit(grid(NS, DS, noise=0.0005), bootstrap=np.tile(np.arange(25), (40, 1)))
    assert "bootstrap-degenerate" in codes(found)


def test_bad_bootstrap_arguments():
    table = grid(NS, DS)
    with pytest.raises(BadInput, match="bootstrap"):
        fit(table, bootstrap=-1)
    with pytest.raises(BadInput, match="0 to 24"):
        fit(table, bootstrap=np.full((3, 25), 25))
    with pytest.raises(BadInput, match="row indices"):
        fit(table, bootstrap=np.zeros((3, 25)))
    table.loc[4, "status"] = "failed"
    with pytest.raises(BadInput, match="left out"):
        fit(table, bootstrap=np.tile(np.arange(25), (3, 1)))


def test_far_extrapolation():
    table = grid(NS, DS)
    found = fit(table)
    found.predict(table)
    found.optimal(3e18)
    assert found.warnings == []
    found.optimal(table.flops.max() * 2)
    note = codes(found)["far-extrapolation"]
    assert note.severity == "note"
    found.optimal(table.flops.max() * 1000)
    warning = codes(found)["far-extrapolation"]
    assert warning.severity == "warning"
    assert warning.numbers["decades"]["C"] == pytest.approx(3)
    assert warning.numbers["holdout_error"] < 0.05
    assert sum(n.code == "far-extrapolation" for n in found.warnings) == 1
    found.predict({"params": [1e8], "tokens": [1e15]})
    assert codes(found)["far-extrapolation"].numbers["decades"]["D"] == pytest.approx(4)


def test_inputs_of_a_prediction_are_checked():
    with pytest.raises(BadInput, match="tokens"):
        fit(grid(NS, DS)).predict({"params": [1e8], "tokens": [-1.0]})
    with pytest.raises(BadInput, match="needs a column tokens"):
        fit(grid(NS, DS)).predict({"params": [1e8]})


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


# ------------------------------------------------------------------------------------------------ residuals


def clean(seed=0, noise=0.004):
    return sweep(np.geomspace(1e18, 1e21, 7), 7, noise, seed)


def test_residual_trend():
    table = clean(noise=0.001)
    x = np.log(table.tokens / table.params / 20)
    notice = codes(fit(table.assign(loss=table.loss * np.exp(0.002 * x**2))))["residual-trend"]
    assert notice.numbers["t"]["D/N"][1] > 10
    waves = np.cos(2 * np.log(table.params / table.params.median()))
    notice = codes(fit(table.assign(loss=table.loss * np.exp(0.01 * waves))))["residual-trend"]
    assert notice.numbers["runs_z"]["N"] < -4


def test_runs_test():
    assert runs_test(np.repeat([1.0, -1.0], 20)) < -5
    assert runs_test(np.tile([1.0, -1.0], 20)) > 5
    rng = np.random.default_rng(0)
    z = [runs_test(rng.standard_normal(50)) for _ in range(400)]
    assert abs(np.mean(z)) < 0.2
    assert 0.85 < np.std(z) < 1.15


def test_dependent_rows_and_the_cluster_that_mends_it():
    table = grid(np.geomspace(1e7, 1e9, 9), DS, noise=0.0005)
    shared = np.random.default_rng(3).standard_normal(9)
    table["loss"] *= np.exp(0.006 * np.repeat(shared, 5))
    found = fit(table, bootstrap=200)
    notice = codes(found)["dependent-rows"]
    assert notice.numbers["cluster"] == "params"
    assert notice.numbers["correlation"]["params"] > 0.5
    mended = fit(table, bootstrap=200, cluster="params")
    assert "dependent-rows" not in codes(mended)
    assert mended.bse.alpha > 1.2 * found.bse.alpha


def test_heteroscedastic():
    table = sweep(np.geomspace(1e18, 1e21, 9), 9)
    rng = np.random.default_rng(0)
    noise = 0.01 * (table.flops / 1e18) ** -0.3 * rng.standard_normal(len(table))
    notice = codes(fit(table.assign(loss=table.loss * np.exp(noise))))["heteroscedastic"]
    assert notice.numbers["ratio"] > 2 or notice.numbers["ratio"] < 0.5


# ------------------------------------------------------------------------------------------------ studies


def test_influence_of_one_run():
    table = clean(noise=0.002)
    table.loc[table.params.idxmax(), "loss"] *= 1.025
    notice = codes(fit(table, objective="log-squares", bootstrap=0))["influence"]
    assert table.id[table.params.idxmax()] in notice.numbers["rows"]
    assert max(notice.numbers["half_widths"]) > 1


def test_influence_of_one_cluster():
    table = sweep(np.geomspace(1e18, 1e21, 12), 5, noise=0.001).assign(run=lambda t: np.arange(len(t)) // 3)
    table.loc[table.index[-3:], "loss"] *= 1.04
    notice = codes(fit(table, objective="log-squares", bootstrap=0))["influence"]
    assert any("cluster" in name for name in notice.numbers["rows"])


def test_trim_drift():
    """The highest losses lie above the law, the more so the higher they are."""
    table = sweep(np.geomspace(1e18, 1e21, 10), 10, noise=0.002, spread=8)
    bend = 0.6 * np.maximum(table.loss / table.loss.quantile(0.8) - 1, 0)
    notice = codes(fit(table.assign(loss=table.loss * (1 + bend))))["trim-drift"]
    assert notice.numbers["dropped"][0] == 0
    assert notice.numbers["params"]["E"] == sorted(notice.numbers["params"]["E"], reverse=True)


def test_the_published_points_have_their_known_faults():
    """Five runs at low D/N that the form misses: fitting-practice's pitfalls 6 and 7."""
    root = pathlib.Path(os.environ.get("SCALELAB_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
    path = root / "chinchilla_epoch" / "points.csv"
    if not path.is_file():
        pytest.skip(f"NOT CHECKED against published data: {path} is missing; set SCALELAB_DATA")
    columns = {"tokens": "tokens_derived", "flops": "train_flop"}
    found = codes(laws.fit("chinchilla", laws.read_table(path), columns=columns, bootstrap=200))
    assert {"trim-drift", "residual-trend", "diverged-run", "objective-dependent"} <= set(found)


def test_objective_dependent():
    table = clean(noise=0.002)
    table.loc[table.index[::6], "loss"] *= 1.08
    notice = codes(fit(table, bootstrap=200))["objective-dependent"]
    assert "squares" in notice.numbers["others"]


def test_isoflop_and_law_disagree():
    table = clean(noise=0.001)
    x = np.log(table.tokens / table.params / 20)
    notice = codes(fit(table.assign(loss=table.loss * np.exp(0.004 * x**2)), bootstrap=200))["isoflop-law-disagree"]
    assert notice.numbers["flops"] == pytest.approx(1e21)
    found = fit(sweep(np.geomspace(1e18, 1e21, 4), 9, noise=0.002, spread=3), bootstrap=200)
    assert found.beside_isoflop().overlap.all()
    with pytest.raises(BadInput, match="no IsoFLOP sweep"):
        fit(grid(NS, DS)).beside_isoflop()


def test_isoflop_drift():
    table = sweep(np.geomspace(1e18, 1e21, 4), 9, noise=0.001, spread=6)
    away = np.log(table.params / table.flops.map(best_size))
    lopsided = table[np.abs(away - 0.5 * (np.log10(table.flops) - 19.5)) < 1.3]
    assert codes(laws.isoflop(lopsided, bootstrap=200))["isoflop-drift"].numbers["factor"] > 1.5
    assert "isoflop-drift" not in codes(laws.isoflop(table, bootstrap=200))


def test_studies_wait_until_they_are_asked_for(monkeypatch):
    from scalelab.laws import studies

    calls = []
    real = studies.findings
    monkeypatch.setattr(studies, "findings", lambda f: calls.append(1) or real(f))
    found = fit(clean(), bootstrap=50)
    found.params, found.conf_int(), found.predict(clean()), found.ok
    assert not calls
    found.warnings, found.warnings  # noqa: B018
    assert calls == [1]


# ------------------------------------------------------------------------------------------------ context


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


# ------------------------------------------------------------------------------------------------ use


def test_at_start():
    found = fit(grid([1e8], np.geomspace(1e9, 1e11, 12)))
    assert codes(found)["at-start"].numbers["parameters"] == ["alpha"]
    assert not found.ok


def test_asking_further_than_the_runs_span():
    found = fit(grid(NS, DS))
    found.optimal(6e20 * 10**2)
    assert "narrow-range" not in codes(found)
    found.optimal(6e20 * 10**4.5)
    assert codes(found)["narrow-range"].numbers["distance"] == pytest.approx(4.5)


def test_floor_dominates():
    found = fit(clean())
    found.optimal(1e22)
    assert "floor-dominates" not in codes(found)
    found.optimal(1e26)
    assert codes(found)["floor-dominates"].severity == "note"


def test_published_constants_are_marked_stale():
    found = fit(clean())
    frame = found.published()
    assert frame.loc["E", "Besiroglu 2024"] == 1.8172
    assert frame.loc["mean error here", "this fit"] < 0.01
    assert codes(found)["stale-compare"].numbers["published"] == ["Hoffmann 2022", "Besiroglu 2024"]
