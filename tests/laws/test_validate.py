"""Hold-out by compute: what is held out, errors beside baselines, refusals."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest
from planted import sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.validate import budgets, default_cut


def test_the_largest_budget_is_predicted():
    table = sweep(noise=0.002)
    held = laws.fit("chinchilla", table, bootstrap=100).holdout()
    assert held.ok
    assert (held.fitted, held.held_out) == (12, 6)
    assert held.cut == pytest.approx(1e20)
    assert held.distance == pytest.approx(1)
    assert sorted(held.table.index) == sorted(table.index[table.flops == 1e20])
    assert list(held.errors.index) == ["law", "nearest run", "power law in C"]
    assert held.error < 0.02
    assert held.error < held.errors.mean_abs["nearest run"]
    assert (held.table.lower < held.table.predicted).all()
    assert (held.table.predicted < held.table.upper).all()
    np.testing.assert_allclose(held.table.error, held.table.predicted / held.table.loss - 1)
    assert "1e+20" in held.summary()


def test_the_prediction_has_not_seen_the_held_out_runs():
    table = sweep(noise=0.002)
    other = table.assign(loss=np.where(table.flops == 1e20, table.loss * 2, table.loss))
    a, b = (laws.fit("chinchilla", t, bootstrap=0).holdout() for t in (table, other))
    np.testing.assert_allclose(a.table.predicted, b.table.predicted, rtol=1e-9)
    assert b.error > 0.4


def test_noise_free_prediction_is_exact():
    held = laws.fit("chinchilla", sweep(), bootstrap=0).holdout()
    assert held.error < 1e-7
    assert held.table.lower.isna().all()  # no draws, no band


def test_a_cut_of_one_s_own():
    fit = laws.fit("chinchilla", sweep(np.geomspace(1e17, 1e20, 4), noise=0.002), bootstrap=0)
    held = fit.holdout(cut=5e18)
    assert (held.fitted, held.held_out) == (12, 12)
    assert fit.holdout(cut=5e18) is held
    for cut in (1e17, 1e21):
        with pytest.raises(BadInput, match="cut"):
            fit.holdout(cut=cut)


def test_too_few_runs_to_hold_out_is_said():
    held = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=5), bootstrap=0).holdout()
    assert not held.ok
    assert np.isnan(held.error)
    assert "5 different runs" in held.summary()


def test_budgets_and_cuts():
    flops = np.array([1e18, 1.02e18, 1e19, 0.99e19, 1.01e18, 3e20])
    assert budgets(flops).tolist() == [0, 0, 1, 1, 0, 2]
    assert default_cut(np.repeat([1e17, 1e18, 1e19], 4)) == 1e19
    assert default_cut(np.append(np.repeat(np.geomspace(1e15, 1e19, 5), 6), 1e20)) == 1e19  # one run is no budget
    assert default_cut(np.geomspace(1e17, 1.5e17, 10)) == pytest.approx(np.geomspace(1e17, 1.5e17, 10)[8])


# ------------------------------------------------------------------------------------------------ many cuts, groups


def test_expanding_window():
    table = sweep(np.geomspace(1e17, 1e21, 5), noise=0.002)
    fit = laws.fit("chinchilla", table, bootstrap=0)
    window = fit.expanding()
    assert window.ok
    np.testing.assert_allclose(window.errors.index, np.geomspace(1e18, 1e21, 4), rtol=1e-6)
    assert window.errors.fitted.tolist() == [6, 12, 18, 24]
    assert window.errors.held_out.tolist() == [24, 18, 12, 6]
    last = fit.holdout(cut=float(window.errors.index[-1]))
    assert window.errors.law.iloc[-1] == pytest.approx(last.error, rel=1e-9)
    assert window.errors["nearest run"].iloc[-1] == pytest.approx(last.errors.mean_abs["nearest run"], rel=1e-9)
    np.testing.assert_allclose(window.by_distance.index, [1, 2, 3, 4])
    assert window.by_distance.predictions.sum() == 24 + 18 + 12 + 6
    assert window.by_distance.law.iloc[0] < window.by_distance["nearest run"].iloc[0]
    assert "decades" in window.summary()
    one = fit.expanding([1e20])
    assert one.errors.index.tolist() == [1e20]
    for cuts in ([], [1e30], [1e17]):
        with pytest.raises(BadInput, match="cuts"):
            fit.expanding(cuts)


def test_expanding_without_budgets_cuts_at_shares():
    rng = np.random.default_rng(0)
    table = sweep(np.geomspace(1e18, 1e21, 40), 1, noise=0.002)
    table = table.assign(tokens=table.tokens * np.exp(0.8 * rng.standard_normal(40)))
    table["flops"] = 6 * table.params * table.tokens
    window = laws.fit("chinchilla", table, bootstrap=0).expanding()
    assert 3 <= len(window.errors) <= 6
    assert window.errors.fitted.is_monotonic_increasing


def test_too_few_runs_for_a_window_is_said():
    window = laws.fit("chinchilla", sweep(budgets=(1e18, 1e20), sizes=4), bootstrap=0).expanding()
    assert not window.ok
    assert "none" in window.summary()


def test_errors_of_the_published_points():
    """fitting-practice, pitfall 9: median error 0.72 to 0.91 %, rms 1.14 to 1.25 % beyond three cuts."""
    folder = pathlib.Path(os.environ.get("SCALELAB_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "chinchilla_epoch" / "points.csv"
    if not path.is_file():
        pytest.skip(f"NOT CHECKED against published data: {path} is missing; set SCALELAB_DATA")
    table = laws.read_table(path)
    columns = {"tokens": "tokens_derived", "flops": "train_flop"}
    fit = laws.fit("chinchilla", table[table.outlier_top5_loss == 0], columns=columns, bootstrap=0)
    errors = fit.expanding([1e20, 3e20, 1e21]).table.groupby("cut").law
    assert errors.apply(lambda e: e.abs().median()).between(0.0071, 0.0092).all()
    assert errors.apply(lambda e: np.sqrt((e**2).mean())).between(0.0113, 0.0127).all()


def test_a_group_left_out():
    table = sweep(noise=0.002).assign(family=lambda t: np.where(t.index % 3 == 0, "a", "b"))
    table.loc[table.family == "a", "loss"] *= 1.05
    fit = laws.fit("chinchilla", table, bootstrap=0, objective="log-squares")
    frame = fit.leave_group_out("family")
    assert frame.index.tolist() == ["a", "b"]
    assert frame.held_out.tolist() == [6, 12]
    assert frame.bias["a"] == pytest.approx(-0.05, abs=0.015)  # the law of b is 5 % too low for a
    alone = laws.fit("chinchilla", table[table.family == "b"], bootstrap=0, objective="log-squares")
    mine = table[table.family == "a"]
    assert frame.law["a"] == pytest.approx(np.abs(alone.predict(mine) / mine.loss - 1).mean(), rel=1e-4)
    budgets_out = fit.leave_group_out("budget")
    assert len(budgets_out) == 3
    assert (budgets_out["nearest run"] > budgets_out.law / 3).all()
    with pytest.raises(BadInput, match="one value"):
        fit.leave_group_out("tokenizer" if "tokenizer" in table else "seed")
    with pytest.raises(BadInput, match="must be one of"):
        fit.leave_group_out("team")


# ------------------------------------------------------------------------------------------------ ranking


def single(role):
    return laws.define(
        f"power in {role}", lambda p, x: p.E + p.A * getattr(x, role) ** -p.alpha, inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True), A=laws.positive(1, 1e5, linear=True), alpha=laws.free(0.05, 1),
    )  # fmt: skip


def flat():
    return laws.define(
        "product", lambda p, x: p.A * x.params**-p.alpha * x.tokens**-p.beta, inputs=("params", "tokens"),
        A=laws.positive(1, 1e4, linear=True), alpha=laws.free(0.01, 1), beta=laws.free(0.01, 1),
    )  # fmt: skip


def test_the_true_form_ranks_first():
    table = sweep(np.geomspace(1e17, 1e21, 5), noise=0.002, spread=8)
    ranking = laws.rank(table, [single("params"), "chinchilla", flat()])
    assert ranking.table.index[0] == "chinchilla"
    assert ranking.best.law.name == "chinchilla"
    assert ranking.table.verdict["chinchilla"] == "best"
    assert ranking.table.verdict["product"] == "worse"
    assert ranking.table.verdict["nearest run"] == "baseline"
    assert ranking.table.held_out.is_monotonic_increasing
    assert [n.code for n in ranking.warnings] == ["seed-noise-unknown"]
    assert "chinchilla" in ranking.summary()
    fit = laws.fit("chinchilla", table, bootstrap=0)
    assert ranking.table.held_out["chinchilla"] == pytest.approx(fit.holdout().error, rel=1e-6)


def test_replicates_give_the_noise_floor():
    parts = [sweep(np.geomspace(1e17, 1e21, 5), noise=0.01, seed=s).assign(seed=s) for s in range(4)]
    ranking = laws.rank(pd.concat(parts, ignore_index=True), ["chinchilla", flat()])
    assert ranking.noise.freedom == 90
    assert ranking.noise.relative == pytest.approx(0.01, rel=0.2)
    assert ranking.floor == pytest.approx(ranking.noise.relative * np.sqrt(2 / np.pi))
    assert ranking.warnings == []
    assert "30 sets" in str(ranking.noise)


def test_forms_that_noise_cannot_tell_apart_are_tied():
    twin = laws.define(
        "twin", laws.Chinchilla().formula, inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True), A=laws.positive(1, 1e5, linear=True),
        B=laws.positive(1, 1e5, linear=True), alpha=laws.free(0.05, 1.5), beta=laws.free(0.05, 1.5),
    )  # fmt: skip
    ranking = laws.rank(sweep(np.geomspace(1e17, 1e21, 5), noise=0.005), ["chinchilla", twin])
    assert set(ranking.table.verdict) == {"best", "tied", "baseline"} or (
        ranking.table.held_out["twin"] == ranking.table.held_out["chinchilla"]
    )


def test_what_cannot_be_ranked_is_refused():
    table = sweep(noise=0.002)
    for forms, says in (([], "at least one"), (["chinchila"], "must be among"), (["chinchilla"] * 2, "twice")):
        with pytest.raises(BadInput, match=says):
            laws.rank(table, forms)
    other = laws.define("bits", lambda p, x: p.a * x.params**-p.b, inputs=("params",), target="bpb",
                        a=laws.positive(1, 10, linear=True), b=laws.free(0, 1))  # fmt: skip
    with pytest.raises(BadInput, match="same target"):
        laws.rank(table, ["chinchilla", other])


# ------------------------------------------------------------------------------------------------ card, diagnostics


def test_the_card_fills_the_list():
    table = sweep(noise=0.004).assign(tokenizer="bytes", schedule="cosine", params_kind="total")
    fit = laws.fit("chinchilla", table, bootstrap=50)
    card = fit.card()
    text = str(card)
    for question, answer in {
        "law": "L(N, D)", "purpose": "choose N and D", "runs": "18 of 18", "N counts": "total",
        "D": "seen once", "FLOPs": "1 to 1 times 6 N D", "tokenizer, context, vocabulary": "bytes",
        "seed noise": "unknown", "objective": "delta = 0.001", "optimizer": "starts agree",
        "intervals": "50 bootstrap draws", "hold-out": "6 of C", "sensitivity": "40 fits",
        "data": fit.record["data_sha256"], "versions": "numpy",
    }.items():  # fmt: skip
        assert answer in card[question], question
        assert f"**{question}**" in text
    assert "E = 1." in card["parameters"]
    assert card == laws.fit("chinchilla", table, bootstrap=50).card() | {"versions": card["versions"]}


def test_diagnostics():
    fit = laws.fit("chinchilla", sweep(np.geomspace(1e18, 1e21, 6), 6, 0.004), bootstrap=0, objective="log-squares")
    d = fit.diagnostics
    assert d["rows"] == d["effective rows"] == 36
    assert d["residual sd"] == pytest.approx(0.004, rel=0.4)
    assert d["objective"] == pytest.approx(0.5 * (fit.resid**2).sum())
    assert d["eigenvalue 1"] > 1e-8
    assert d["eigenvalue 5"] >= d["eigenvalue 1"]
    assert d.filter(like="eigenvalue").sum() == pytest.approx(5)
    assert abs(d["slope in ln N"]) < 4
    assert np.isnan(d["seed noise"])
