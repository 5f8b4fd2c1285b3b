"""Surfaces around Chinchilla's: planted truth, what the family holds, tied exponents."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.laws.forms import ChinchillaGamma, Coupled, Kaplan, Multiplicative

BASE = {"E": 1.7, "A": 400.0, "B": 1200.0, "alpha": 0.34, "beta": 0.37}
MUENNIGHOFF = {
    "E": np.exp(0.6254804), "A": np.exp(6.255414), "B": np.exp(7.3049974), "alpha": 0.3526596, "beta": 0.3526596
}  # fmt: skip


def grid(points=7):
    N, D = np.meshgrid(np.geomspace(1e7, 1e10, points), np.geomspace(1e9, 1e12, points))
    return pd.DataFrame({"params": N.ravel(), "tokens": D.ravel()})


def planted(law, params, noise=0.0, table=None):
    table = grid() if table is None else table
    scatter = np.exp(noise * np.random.default_rng(1).standard_normal(len(table)))
    return table.assign(loss=law.predict(params, table) * scatter)


def recast(q):
    """The same surface in the xLSTM authors' constants."""
    return {
        "E": 1.7, "A": 400.0 ** (1 / q), "B": 1200.0 ** (1 / q), "alpha": 0.34 / q, "beta": 0.37 / q, "gamma": q
    }  # fmt: skip


@pytest.mark.parametrize("q", [0.3, 1.0, 2.0])
def test_both_ways_of_writing_it_recover_the_truth(q):
    truth = BASE | {"q": q}
    table = planted(Coupled(), truth)
    np.testing.assert_allclose(table.loss, ChinchillaGamma().predict(recast(q), table), rtol=1e-12)
    coupled = laws.fit("coupled", table, bootstrap=0)
    np.testing.assert_allclose(coupled.params, list(truth.values()), rtol=1e-6)
    gamma = laws.fit("chinchilla-gamma", table, bootstrap=0)
    np.testing.assert_allclose(gamma.params, list(recast(q).values()), rtol=1e-6)
    assert coupled.ok
    assert gamma.ok


def test_family_holds_chinchilla_kaplan_and_the_larger_term():
    table = grid()
    plain = laws.Chinchilla().predict(BASE, table)
    np.testing.assert_allclose(Coupled().predict(BASE | {"q": 1.0}, table), plain, rtol=1e-13)
    np.testing.assert_allclose(ChinchillaGamma().predict(BASE | {"gamma": 1.0}, table), plain, rtol=1e-13)
    k = Kaplan.published["Kaplan 2020"]
    as_coupled = {
        "E": 0.0, "A": k["N_c"] ** k["alpha_N"], "B": k["D_c"] ** k["alpha_D"],
        "alpha": k["alpha_N"], "beta": k["alpha_D"], "q": k["alpha_D"],
    }  # fmt: skip
    np.testing.assert_allclose(Coupled().predict(as_coupled, table), Kaplan().predict(k, table), rtol=1e-12)
    larger = 1.7 + np.maximum(400 * table.params**-0.34, 1200 * table.tokens**-0.37)
    np.testing.assert_allclose(Coupled().predict(BASE | {"q": 1e-4}, table), larger, rtol=1e-4)


def test_noise_and_the_question_whether_q_is_one():
    table = planted(Coupled(), BASE | {"q": 1.0}, noise=0.002)
    fit = laws.fit("coupled", table, bootstrap=100)
    interval = fit.conf_int(0.999)
    assert interval.lower.q < 1 < interval.upper.q
    assert interval.lower.E < 1.7 < interval.upper.E
    held = laws.fit("coupled", table, bootstrap=0, fixed={"q": 1.0})
    np.testing.assert_allclose(held.params[list(BASE)], laws.fit("chinchilla", table, bootstrap=0).params, rtol=1e-6)


def test_optimum_of_a_coupled_surface():
    """Its optimum is that of the sum of the inner powers, in closed form, whatever E and the outer power."""
    q, flops = 0.5, np.array([1e20, 1e22])
    law = Coupled()
    found = law.optimum(np.array([[*BASE.values(), q]]), flops, 6.0)
    inner = np.array([[0.0, 400.0 ** (1 / q), 1200.0 ** (1 / q), 0.34 / q, 0.37 / q]])
    N, D, _ = laws.Chinchilla().optimum(inner, flops, 6.0)
    np.testing.assert_allclose(found[0], N, rtol=1e-5)
    np.testing.assert_allclose(found[1], D, rtol=1e-5)


def test_units_do_not_matter():
    table = planted(Coupled(), BASE | {"q": 0.6}, noise=0.002)
    fit = laws.fit("coupled", table, bootstrap=0)
    other = laws.fit("coupled", table.assign(params=table.params / 1e6, tokens=table.tokens / 1e9), bootstrap=0)
    names = ["E", "alpha", "beta", "q"]
    np.testing.assert_allclose(other.params[names], fit.params[names], rtol=1e-5)


def test_multiplicative():
    truth = {"E": 1.7, "A": 4000.0, "alpha": 0.14, "beta": 0.17}
    fit = laws.fit("multiplicative", planted(Multiplicative(), truth), bootstrap=0)
    np.testing.assert_allclose(fit.params, list(truth.values()), rtol=1e-6)
    noisy = laws.fit("multiplicative", planted(Multiplicative(), truth, 0.002), bootstrap=200)
    interval = noisy.conf_int(0.999)
    for name, value in truth.items():
        assert interval.lower[name] <= value <= interval.upper[name]
    best = noisy.optimal(1e21)
    assert np.isnan(best.params)  # the larger exponent takes all
    assert "no-interior-optimum" in {n.code for n in noisy.warnings}


def test_tied_exponents_give_one_ratio_of_tokens_to_parameters():
    """Muennighoff's C4 fit: alpha = beta, 19.613 tokens per parameter at any compute."""
    table = planted(laws.Chinchilla(), MUENNIGHOFF, noise=0.0)
    fit = laws.fit("chinchilla", table, tied={"beta": "alpha"}, bootstrap=0)
    np.testing.assert_allclose(fit.params, [MUENNIGHOFF[name] for name in fit.params.index], rtol=1e-6)
    best = fit.optimal([1e19, 1e21, 5.76e23])
    np.testing.assert_allclose(best.tokens / best.params, 19.613, rtol=1e-4)
    np.testing.assert_allclose(best.params.iloc[2], 6.99622e10, rtol=1e-4)
    noisy = planted(laws.Chinchilla(), BASE, noise=0.002)  # exponents that differ: tied all the same
    tied = laws.fit("chinchilla", noisy, tied={"beta": "alpha"}, bootstrap=50)
    np.testing.assert_allclose(tied.allocation().loc[["a", "b"], "estimate"], 0.5, rtol=1e-9)
    assert (tied.draws.alpha == tied.draws.beta).all()
