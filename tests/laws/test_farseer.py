"""Farseer: the authors' runs, the printed law, any units, the unit of D on disk."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import Farseer
from scalelab.laws.forms.farseer import stretch
from scalelab.laws.jet import Jet
from scalelab.laws.objective import SQUARES
from scalelab.laws.search import polish

ROOT = pathlib.Path(__file__).parents[2]
PRINTED = Farseer.published["Li 2025"]
GOAL = 3.95e-4  # sum of squared residuals, bits per character, all 404 rows


def read(name):
    path = pathlib.Path(os.environ.get("SCALELAB_DATA", ROOT.parent / "shared" / "data")) / "farseer" / name
    if not path.is_file():
        pytest.skip(f"NOT CHECKED against published data: {path} is missing; set SCALELAB_DATA")
    return laws.read_table(path).rename(columns={"params_non_embedding": "params"})


@pytest.fixture(scope="module")
def points():
    return read("points.csv").rename(columns={"bpc": "loss"})


@pytest.fixture(scope="module")
def synthetic():
    return read("synthetic_from_published_law.csv")


@pytest.fixture(scope="module")
def fit(points):
    return laws.fit("farseer", points, bootstrap=0)


def squares(law, table):
    return float(((law.predict(table) - table.loss) ** 2).sum())


def grid(sizes, tokens):
    N, D = (g.ravel() for g in np.meshgrid(sizes, tokens, indexing="ij"))
    return {"params": N, "tokens": D}


# ------------------------------------------------------------------------------------------------ the printed law


def test_printed_law_at_published_points():
    loss = Farseer().predict("Li 2025", {"params": [1e9] * 4, "tokens": [1e9, 1e10, 1e11, 5e11]})
    np.testing.assert_allclose(loss, [0.6397, 0.5448, 0.4986, 0.4812], atol=5e-5)


def test_printed_law_has_an_optimum_up_to_1e22_and_none_from_1e23():
    params = np.array([[PRINTED[name] for name in Farseer.parameters]])
    N, D, loss = Farseer().optimum(params, np.array([1e19, 1e20, 1e21, 1e22, 1e23, 1e24]), 6.0)
    np.testing.assert_allclose((D / N)[0, :4], [17.3, 10.8, 10.9, 13.9], atol=0.06)
    assert np.isnan(np.stack([N, D, loss])[:, 0, 4:]).all()


def test_an_allocator_says_that_there_is_no_optimum(synthetic):
    fit = laws.fit("farseer", synthetic.assign(loss=synthetic.bpc_exact), fixed={"D0": 1.0}, bootstrap=0)
    best = fit.optimal([1e21, 1e23])
    assert best.params[0] > 0
    assert np.isnan(best.params[1])
    assert {n.code: n for n in fit.warnings}["no-interior-optimum"].numbers["flops"] == [1e23]


# ------------------------------------------------------------------------------------------------ planted


def test_recovers_the_printed_law_in_its_own_unit(synthetic):
    """The constants too: noise-free, and D in single tokens as they were printed."""
    fit = laws.fit("farseer", synthetic, columns={"loss": "bpc_exact"}, fixed={"D0": 1.0}, bootstrap=0)
    np.testing.assert_allclose(fit.predict(synthetic), synthetic.bpc_exact, rtol=1e-10)
    np.testing.assert_allclose(fit.params, [PRINTED[name] for name in fit.params.index], rtol=1e-6)
    assert fit.record["agreement"] >= 0.8
    surface = Farseer().predict(fit.params.to_dict(), grid(np.geomspace(1e8, 1e12, 60), np.geomspace(1e9, 1e14, 60)))
    surface = surface.to_numpy().reshape(60, 60)
    assert (np.diff(surface, axis=0) < 0).all()
    assert (np.diff(surface, axis=1) < 0).all()
    assert "rises-with-size" not in {n.code for n in fit.warnings}


def test_noise_of_a_thousandth(synthetic):
    fit = laws.fit("farseer", synthetic, columns={"loss": "bpc_noise_0p1pct"}, fixed={"D0": 1.0}, bootstrap=0)
    assert (fit.predict(synthetic) / synthetic.bpc_exact - 1).abs().mean() < 3e-4
    plain = laws.fit("chinchilla", synthetic, columns={"loss": "bpc_exact"}, bootstrap=0)
    assert (plain.predict(synthetic) / synthetic.bpc_exact - 1).abs().mean() == pytest.approx(0.0056, rel=0.05)


def test_another_unit_of_tokens_is_another_form(synthetic):
    """The same surface with D measured from its geometric mean: near, but not exact, and it says where it ends."""
    fit = laws.fit("farseer", synthetic, columns={"loss": "bpc_exact"}, bootstrap=0)
    worst = (fit.predict(synthetic) / synthetic.bpc_exact - 1).abs().max()
    assert 1e-4 < worst < 3e-3
    notice = {n.code: n for n in fit.warnings}["rises-with-size"]
    assert notice.severity == "warning"
    N = np.array([0.95, 1.2]) * notice.numbers["params"]
    surface = Farseer().predict(fit.params.to_dict(), grid(np.array([*N, *(N * 1.05)]), np.geomspace(1e9, 1e14, 30)))
    below, above, below_next, above_next = surface.to_numpy().reshape(4, 30)
    assert (below_next < below).all()
    assert (above_next >= above).any()


def test_intervals_hold_the_truth_under_noise():
    truth = PRINTED | {"D0": 2e10}
    truth |= {"b2": -4.0, "a2": 30.0}  # the loss at 2e10 tokens instead of one
    table = pd.DataFrame(grid(np.geomspace(2e8, 6e9, 8), np.geomspace(2e9, 2e11, 8)))
    exact = Farseer().predict(truth, table)
    table["loss"] = exact * np.exp(2e-3 * np.random.default_rng(0).standard_normal(len(table)))
    fit = laws.fit("farseer", table, bootstrap=200, fixed={"D0": 2e10})
    frame = fit.get_prediction(table).summary_frame(0.999)
    assert ((frame.mean_ci_lower <= exact) & (exact <= frame.mean_ci_upper)).all()
    assert (frame.mean_ci_upper / frame.mean_ci_lower - 1).max() < 0.02
    interval = fit.conf_int(0.999)
    for name in ("alpha", "beta", "gamma"):
        assert interval.lower[name] <= truth[name] <= interval.upper[name]


# ------------------------------------------------------------------------------------------------ measured runs


def test_measured_runs(points, fit):
    assert len(points) == 404
    assert squares(fit, points) <= GOAL
    assert {n.code: n for n in fit.warnings}["duplicate-rows"].numbers["rows"] == ["337", "342", "364", "369"]
    assert fit.nobs == 400
    assert 2 * fit.record["value"] <= GOAL
    assert fit.record["agreement"] >= 0.8
    assert fit.ok
    single = laws.fit("farseer", points, bootstrap=0, fixed={"D0": 1.0})
    assert squares(single, points) == pytest.approx(4.402e-4, rel=1e-3)
    surface = fit.predict(grid(np.geomspace(1e8, 1e12, 60), np.geomspace(1e9, 1e14, 60))).to_numpy().reshape(60, 60)
    assert (np.diff(surface, axis=0) < 0).all()
    assert (np.diff(surface, axis=1) < 0).all()


def test_random_starts_reach_the_goal(points, fit):
    """200 starts: value and slope of each curve uniform over its box, straight curves settled first."""
    problem, _ = fit.solved
    draws = np.random.default_rng(0).random((200, 6))
    starts = problem.base.settle(problem.base.draw(draws), fit.rows.weights, SQUARES)[:, problem.keep]
    found = polish(problem, starts, fit.rows.weights, SQUARES)
    loss = fit.law.evaluate(problem.natural(found.theta), {r: points[r].to_numpy() for r in ("params", "tokens")})
    reached = ((loss - points.loss.to_numpy()) ** 2).sum(1) <= GOAL
    assert reached.mean() >= 0.8, reached.mean()


def test_held_out_sizes(points):
    small, large = points[points.params < 2e9], points[points.params >= 2e9]
    assert len(large) == 91
    error = {}
    for name in ("farseer", "chinchilla"):
        fit = laws.fit(name, small, bootstrap=0)
        error[name] = (fit.predict(large) / large.loss - 1).abs().mean()
    assert error["farseer"] < 0.002
    assert error["chinchilla"] > 0.01


def test_any_units_and_order_give_one_answer(points, fit):
    fewer = points.iloc[::3]
    reference = laws.fit("farseer", fewer, bootstrap=0)
    for changed, back in (
        (fewer.assign(params=fewer.params / 1e6), 1.0),
        (fewer.assign(tokens=fewer.tokens / 1e9), 1.0),
        (fewer.assign(loss=fewer.loss * np.log(2) * 4), np.log(2) * 4),
        (fewer.sample(frac=1, random_state=1), 1.0),
    ):
        other = laws.fit("farseer", changed, bootstrap=0)
        np.testing.assert_allclose(other.predict(changed).sort_index() / back, reference.predict(fewer), rtol=1e-9)
        exponents = ["alpha", "beta", "gamma"]
        np.testing.assert_allclose(other.params[exponents], reference.params[exponents], rtol=1e-5)


def test_the_unit_of_tokens_is_stored_and_printed(points, tmp_path):
    fewer = points.iloc[::5]
    fit = laws.fit("farseer", fewer, bootstrap=20)
    unit = float(np.exp(np.log(fewer.drop_duplicates().tokens).mean()))
    np.testing.assert_allclose(fit.params["D0"], unit, rtol=1e-12)
    assert f"held fixed: D0 = {unit:g}" in fit.summary()
    assert (fit.draws.D0 == fit.params.D0).all()
    assert fit.record["free"] == 9
    loaded = laws.load(fit.save(tmp_path / "fit.json"))
    assert (loaded.predict(points) == fit.predict(points)).all()
    assert loaded.refit().params.D0 == fit.params.D0
    np.testing.assert_allclose(loaded.refit().params, fit.params, rtol=1e-6)
    assert fit.holdout().ok
    np.testing.assert_allclose(fit.law.predict(fit.params.to_dict(), points), fit.predict(points))


def test_exponents_can_be_held_and_tied_and_coefficients_not(points):
    fit = laws.fit("farseer", points.iloc[::4], bootstrap=0, fixed={"alpha": 0.1}, tied={"gamma": "beta"})
    assert fit.params.alpha == pytest.approx(0.1, rel=1e-12)
    assert fit.params.gamma == pytest.approx(fit.params.beta, rel=1e-12)
    assert fit.record["free"] == 7
    with pytest.raises(BadInput, match="a1"):
        laws.fit("farseer", points, fixed={"a1": 0.0})


# ------------------------------------------------------------------------------------------------ the authors' way


def test_stage_wise_estimate(synthetic, points):
    law = Farseer()
    exact = law.differential(synthetic, columns={"loss": "bpc_exact"})
    np.testing.assert_allclose(law.predict(exact, synthetic), synthetic.bpc_exact, rtol=1e-3)
    for name, sign in {"a1": -1, "alpha": 1, "a2": 1, "beta": -1, "a3": -1, "gamma": 1}.items():
        assert np.sign(exact[name]) == sign
    measured = law.differential(points)
    error = float(((law.predict(measured, points) - points.loss) ** 2).sum())
    assert GOAL < error < 1e-3  # a joint fit reaches less
    with pytest.raises(BadInput, match="four sizes"):
        law.differential(points[points.params.rank(method="dense") <= 3])


def test_a_curve_is_smooth_where_its_exponent_is_zero():
    z = np.array([[-8.0, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 8.0]])
    near = np.where(np.abs(z) < 1e-2, 1 + z / 2 + z**2 / 6, np.expm1(z) / np.where(z == 0, 1, z))
    jet = stretch(Jet.variable(z, 0))
    np.testing.assert_allclose(jet.value, near, rtol=1e-9)
    np.testing.assert_allclose(jet.gradient[0][0, 3], 1 / 2, rtol=1e-14)
    np.testing.assert_allclose(jet.hessian[0, 0][0, 3], 1 / 3, rtol=1e-14)
    h = 1e-5
    np.testing.assert_allclose(jet.gradient[0], (stretch(z + h) - stretch(z - h)) / (2 * h), rtol=1e-6)
