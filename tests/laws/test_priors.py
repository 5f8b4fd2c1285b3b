"""Priors in the fit: weighed against the rows by their noise, drawn by each bootstrap draw, and said."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, sweep

from scalelab import cli, laws
from scalelab.errors import BadInput

LINE = laws.define(
    "line", lambda p, x: p.a + p.b * x.params, inputs=("params",), objective="squares", may_be_zero=("params",),
    a=laws.free(-30, 30, linear=True), b=laws.free(-10, 10, linear=True),
)  # fmt: skip
TRUE = {"E": (TRUTH["E"], 0.05), "alpha": (TRUTH["alpha"], 0.05)}
TABLE = sweep(np.geomspace(1e17, 1e20, 4), 8, noise=0.01, seed=5)


def line(n=40, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    return pd.DataFrame({"params": x, "loss": 15 + 2 * x + 0.3 * rng.normal(size=n)})


def test_of_least_squares_it_is_ridge_regression_and_its_draws_the_posterior():
    table = line()
    X, y = np.column_stack([np.ones(40), table["params"]]), table["loss"].to_numpy()
    own = np.linalg.lstsq(X, y, rcond=None)[0]
    variance = ((y - X @ own) ** 2).sum() / 38
    precision = X.T @ X / variance + np.diag([0, 0.05**-2])
    expected = np.linalg.solve(precision, X.T @ y / variance + [0, 2.05 / 0.05**2])
    fit = LINE.fit(table, priors={"b": (2.05, 0.05)}, bootstrap=4000, method="parametric")
    np.testing.assert_allclose(fit.params, expected, rtol=1e-9)
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    np.testing.assert_allclose(fit.draws.std(), sd, rtol=0.05)
    np.testing.assert_allclose(fit.draws.mean(), expected, atol=0.05 * sd.min())
    np.testing.assert_allclose(fit.standard_errors, sd, rtol=0.3)
    profile = fit.profile("b")
    assert (profile.upper - profile.lower) / (2 * 2.03) == pytest.approx(sd[1], rel=0.1)


@pytest.mark.parametrize("weight", [1.0, 1e-3])
@pytest.mark.parametrize("objective", ["huber", "log-squares", "squares", "student"])
def test_wide_priors_say_nothing_and_narrow_ones_all(objective, weight):
    def fit(**more):
        return laws.fit("chinchilla", TABLE, objective=objective, bootstrap=0,
                        weights=np.full(len(TABLE), weight), **more)  # fmt: skip

    plain, wide = fit(), fit(priors={"E": (1.0, 1e4), "alpha": (0.0, 1e4)})
    np.testing.assert_allclose(wide.params, plain.params, rtol=1e-5)
    narrow, held = fit(priors={"E": (1.6, 1e-7)}), fit(fixed={"E": 1.6})
    np.testing.assert_allclose(narrow.params, held.params, rtol=1e-3)
    between = fit(priors={"E": (1.6, 0.01)})
    assert min(1.6, plain.params.E) < between.params.E < max(1.6, plain.params.E)


def test_weights_of_the_rows_and_their_order_change_nothing():
    prior = {"E": (1.6, 0.02), "beta": (0.3, 0.05)}
    fits = [
        laws.fit("chinchilla", table, bootstrap=0, priors=prior, weights=np.full(len(table), w))
        for table, w in ((TABLE, 1.0), (TABLE.iloc[::-1], 1.0), (TABLE, 1e5))
    ]
    for other in fits[1:]:
        np.testing.assert_allclose(other.params, fits[0].params, rtol=1e-8)


def test_what_few_runs_leave_open_a_prior_settles():
    """Nine runs of a narrow range: E is known to 0.03 from elsewhere, and the interval of the loss far out shrinks."""
    few = sweep(np.geomspace(1e18, 1e19, 3), 3, noise=0.003, seed=2)
    plain, told = (laws.fit("chinchilla", few, bootstrap=200, priors=p) for p in (None, {"E": (TRUTH["E"], 0.03)}))

    def width(fit):
        return float(np.ptp(np.nanpercentile(fit.draws["E"], [5, 95])))

    assert width(told) < 0.6 * width(plain)
    assert 0.03 < width(told) < 4 * 0.03
    assert abs(told.params.E - TRUTH["E"]) < 0.06


def test_it_is_said_kept_and_goes_into_every_refit(tmp_path):
    fit = laws.fit("chinchilla", TABLE, bootstrap=20, priors={"E": (2.5, 0.001)})
    (conflict,) = (w for w in fit.warnings if w.code == "prior-conflict")
    assert conflict.numbers["without_priors"]["E"] == pytest.approx(laws.fit("chinchilla", TABLE, bootstrap=0).params.E)
    assert "prior-conflict" not in {w.code for w in laws.fit("chinchilla", TABLE, bootstrap=0, priors=TRUE).warnings}
    assert "prior: E = 2.5 +- 0.001 (normal)" in fit.summary()
    assert "E = 2.5 +- 0.001 as prior" in str(fit.card())
    again = laws.load(fit.save(tmp_path / "fit.json"))
    assert again.options == fit.options
    for refitted in (again.refit(), fit.refit()):
        np.testing.assert_allclose(refitted.params, fit.params, rtol=1e-9)
    pd.testing.assert_frame_equal(again.leave_one_out(), fit.leave_one_out())
    assert again.standard_errors.E < 0.01


def test_fixed_and_tied_parameters_and_laws_with_coordinates_of_their_own():
    fit = laws.fit("chinchilla", TABLE, bootstrap=0, tied={"beta": "alpha"}, priors={"beta": (0.5, 1e-6)})
    assert fit.params.alpha == pytest.approx(0.5, abs=1e-4)
    assert fit.params.beta == fit.params.alpha
    told = laws.fit("farseer", TABLE, bootstrap=0, priors={"alpha": (0.1, 1e-6)})
    assert told.params.alpha == pytest.approx(0.1, abs=1e-4)
    for name, more in {"E": {"fixed": {"E": 1.7}}, "F": {}}.items():
        with pytest.raises(BadInput, match="prior"):
            laws.fit("chinchilla", TABLE, bootstrap=0, priors={name: (1.7, 0.1)}, **more)
    with pytest.raises(BadInput, match="coordinates in which it can have none"):
        laws.fit("farseer", TABLE, bootstrap=0, priors={"a1": (0.1, 0.1)})


@pytest.mark.parametrize("prior", [(1.7, 0), 1.7, (1.7, float("inf")), ("a", 1), (1, 2, 3)])
def test_what_is_no_prior(prior):
    with pytest.raises(BadInput, match=r"priors\[E\]"):
        laws.fit("chinchilla", TABLE, bootstrap=0, priors={"E": prior})


def test_the_command(tmp_path, capsys):
    TABLE.to_csv(tmp_path / "t.csv")
    assert cli.main(["fit", str(tmp_path / "t.csv"), "--bootstrap=20", "--prior=E=1.6:0.0001"]) == 0
    assert "E = 1.6 +- 0.0001" in capsys.readouterr().out
    for text in ("E=1.6", "E=1.6:x", "E=1.6:-1", "F=1:1"):
        assert cli.main(["fit", str(tmp_path / "t.csv"), f"--prior={text}"]) == 2
        err = capsys.readouterr().err
        assert "--prior" in err
        assert len(err.strip().splitlines()) == 1
