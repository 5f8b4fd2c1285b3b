"""Data mixtures: planted truth, the redundancy of the constants, the best proportions."""

import numpy as np
import pandas as pd
import pytest

from scalelab.errors import BadInput
from scalelab.laws.forms import DataMixture, best_mixture
from scalelab.laws.forms.mixtures import simplex_minimum

DOMAINS = ("web", "code", "books")
TRUTHS = ({"c": 1.5, "k": 2.0, "t_web": -2.0, "t_code": 0.5}, {"c": 1.0, "k": 1.0, "t_web": 0.5, "t_code": -3.0})


def mixtures(noise=0.0, seed=0, n=24):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.dirichlet([1, 1, 1], n), columns=list(DOMAINS))
    for i, truth in enumerate(TRUTHS):
        table[f"loss_{i}"] = DataMixture(*DOMAINS).predict(truth, table) * np.exp(noise * rng.standard_normal(n))
    return table


def fits(noise=0.0, bootstrap=0, seed=0):
    law, table = DataMixture(*DOMAINS), mixtures(noise, seed)
    return [law.fit(table, columns={"loss": f"loss_{i}"}, bootstrap=bootstrap) for i in range(2)]


def test_planted_truth():
    for fit, truth in zip(fits(), TRUTHS, strict=True):
        np.testing.assert_allclose(fit.params, pd.Series(truth), rtol=1e-6)
        assert fit.record["agreement"] >= 0.5


@pytest.mark.parametrize("seed", range(3))
def test_planted_truth_under_noise(seed):
    for fit, truth in zip(fits(0.003, 150, seed), TRUTHS, strict=True):
        interval = fit.conf_int(0.999)
        assert ((interval.lower <= pd.Series(truth)) & (pd.Series(truth) <= interval.upper)).all(), interval
        assert fit.ok


def test_hold_out_is_toward_the_corners():
    table = pd.concat([mixtures(0.002), pd.DataFrame(np.eye(3), columns=list(DOMAINS))], ignore_index=True)
    pure = DataMixture(*DOMAINS).predict(TRUTHS[0], table)
    fit = DataMixture(*DOMAINS).fit(table.assign(loss=table.loss_0.fillna(pure)), bootstrap=20)
    held = fit.holdout()
    assert held.called == "the largest share"
    assert {24, 25, 26} <= set(held.table.index)
    assert held.error < min(0.03, held.errors.mean_abs["nearest run"])
    assert "largest share" in fit.summary()


def test_constants_with_a_t_for_every_domain_are_the_same_law():
    """L = c + k exp(sum_j t_j r_j) with all t_j: shift them by the last, scale k."""
    t, k, c = np.array([-1.2, 0.9, 0.6]), 0.7, 1.4
    table = mixtures()
    full = c + k * np.exp(table[list(DOMAINS)].to_numpy() @ t)
    ours = {"c": c, "k": k * np.exp(t[-1]), "t_web": t[0] - t[-1], "t_code": t[1] - t[-1]}
    np.testing.assert_allclose(DataMixture(*DOMAINS).predict(ours, table), full, rtol=1e-13)


def test_corners_and_refusals():
    law, truth = DataMixture(*DOMAINS), TRUTHS[0]
    pure = law.predict(truth, pd.DataFrame(np.eye(3), columns=list(DOMAINS)))
    expected = truth["c"] + truth["k"] * np.exp([truth["t_web"], truth["t_code"], 0.0])
    np.testing.assert_allclose(pure, expected, rtol=1e-13)
    with pytest.raises(BadInput, match="adding up to 1"):
        law.predict(truth, {"web": [0.5], "code": [0.5], "books": [0.1]})
    with pytest.raises(BadInput, match="none below 0"):
        law.predict(truth, {"web": [1.2], "code": [-0.2], "books": [0.0]})
    for domains in (("web",), ("web", "web")):
        with pytest.raises(BadInput, match="domains"):
            DataMixture(*domains)


def test_best_mixture_of_two_validation_domains():
    """Two domains, closed form: s_1 k_1 t_1 e^(t_1 r) = -s_2 k_2 t_2 e^(t_2 r)."""
    law = DataMixture("web", "code")
    truths = {"c": 1.0, "k": 1.5, "t_web": -2.0}, {"c": 0.5, "k": 0.4, "t_web": 1.5}
    table = pd.DataFrame({"web": np.linspace(0, 1, 9)})
    table["code"] = 1 - table.web
    both = [law.fit(table.assign(loss=law.predict(truth, table)), bootstrap=0) for truth in truths]
    weights = [0.3, 0.7]
    r = np.log(0.3 * 1.5 * 2.0 / (0.7 * 0.4 * 1.5)) / 3.5
    best = best_mixture(both, weights).estimate
    np.testing.assert_allclose(best[["web", "code"]], [r, 1 - r], rtol=1e-6)
    lowest = 0.3 * (1 + 1.5 * np.exp(-2 * r)) + 0.7 * (0.5 + 0.4 * np.exp(1.5 * r))
    assert best.loss == pytest.approx(lowest, rel=1e-9)


def test_best_mixture_has_an_interval_that_holds_the_truth():
    truth = best_mixture(fits()).estimate
    assert truth[list(DOMAINS)].sum() == pytest.approx(1)
    frame = best_mixture(fits(0.003, 150), level=0.999)
    assert ((frame.lower <= truth + 1e-6) & (truth - 1e-6 <= frame.upper)).all(), frame
    assert frame.upper.web - frame.lower.web < 0.1


def test_one_validation_domain_wants_one_training_domain():
    best = best_mixture(fits()[0]).estimate
    np.testing.assert_allclose(best[list(DOMAINS)], [1, 0, 0], atol=1e-9)


def test_best_mixture_refuses_what_does_not_belong_together():
    one, two = fits(0.003, 20)
    other = DataMixture("code", "web", "books").fit(mixtures(), columns={"loss": "loss_0"}, bootstrap=0)
    with pytest.raises(BadInput, match="same domains"):
        best_mixture([one, other])
    with pytest.raises(BadInput, match="draws"):
        best_mixture([one, fits()[1]])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(BadInput, match="weights"):
            best_mixture([one, two], weights)


def test_the_simplex_solver_meets_the_optimality_condition():
    """Convex: r is the minimum if no corner lies below the tangent plane at r."""
    rng = np.random.default_rng(0)
    k, t = rng.uniform(0.2, 2, (300, 3)), rng.normal(0, 4, (300, 3, 5))
    r = simplex_minimum(k, t)
    e = k * np.exp(np.einsum("rij,rj->ri", t, r))
    slope = np.einsum("ri,rij->rj", e, t)
    gap = (slope * r).sum(1) - slope.min(1)
    assert (r >= 0).all()
    np.testing.assert_allclose(r.sum(1), 1, rtol=1e-12)
    assert (gap < 1e-7 * e.sum(1)).all()
