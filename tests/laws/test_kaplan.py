"""Kaplan's laws: planted truth, the published constants, their limits."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.laws.forms import Kaplan, KaplanSteps, PowerLaw

PUBLISHED = Kaplan.published["Kaplan 2020"]
STEPS = {"N_c": 6e13, "S_c": 2.1e3, "alpha_N": 0.077, "alpha_S": 0.76}


def grid(second="tokens", low=1e9, high=1e12):
    N, other = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(low, high, 7)))
    return pd.DataFrame({"params": N, second: other})


def planted(law, params, table, noise=0.0):
    scatter = np.exp(noise * np.random.default_rng(1).standard_normal(len(table)))
    return table.assign(loss=law.predict(params, table) * scatter)


@pytest.mark.parametrize("objective", ["log-squares", "huber", "squares"])
def test_recovers_the_published_constants(objective):
    fit = laws.fit("kaplan", planted(Kaplan(), PUBLISHED, grid()), bootstrap=0, objective=objective)
    np.testing.assert_allclose(fit.params, [PUBLISHED[name] for name in fit.params.index], rtol=1e-7)
    assert fit.record["agreement"] >= 0.8
    assert fit.ok


def test_intervals_hold_the_constants_under_noise():
    fit = laws.fit("kaplan", planted(Kaplan(), PUBLISHED, grid(), 0.003), bootstrap=200)
    interval = fit.conf_int(0.999)
    for name, value in PUBLISHED.items():
        assert interval.lower[name] <= value <= interval.upper[name]


def test_limits_are_the_power_laws_in_one_column():
    """Endless data: (N_c/N)^alpha_N; an endless model: (D_c/D)^alpha_D; by hand at one point in between."""
    N, D = 1e9, 2e10
    law = Kaplan()
    ends = law.predict("Kaplan 2020", {"params": [N, 1e40, N], "tokens": [1e40, D, D]})
    p = PUBLISHED
    by_size = PowerLaw("params").predict({"A": p["N_c"] ** p["alpha_N"], "alpha": p["alpha_N"]}, {"params": [N]})
    np.testing.assert_allclose(ends[0], by_size[0], rtol=1e-9)
    np.testing.assert_allclose(ends[1], (p["D_c"] / D) ** p["alpha_D"], rtol=1e-9)
    joint = ((p["N_c"] / N) ** (p["alpha_N"] / p["alpha_D"]) + p["D_c"] / D) ** p["alpha_D"]
    np.testing.assert_allclose(ends[2], joint, rtol=1e-12)


def test_overfitting_rule():
    """Kaplan's D >= 5e3 N^0.74: where too little data costs about 2 %; the power is the exponents' ratio."""
    p = PUBLISHED
    assert p["alpha_N"] / p["alpha_D"] == pytest.approx(0.74, abs=0.005)
    N = np.geomspace(1e7, 1e10, 4)
    cost = Kaplan().predict("Kaplan 2020", {"params": N, "tokens": 5e3 * N**0.74}) / (p["N_c"] / N) ** p["alpha_N"] - 1
    assert ((cost > 0.01) & (cost < 0.03)).all()


def test_optimum_of_the_published_law():
    """The numerical search against the closed form of the first-order condition under C = 6 N D.

    With u = (N_c/N)^r, r = alpha_N/alpha_D, and v = D_c/D: r u = v at the optimum, and D = C / 6N.
    """
    p = PUBLISHED
    flops = np.array([1e20, 1e21, 1e22])
    r = p["alpha_N"] / p["alpha_D"]
    N = (r * p["N_c"] ** r * flops / (6 * p["D_c"])) ** (1 / (1 + r))
    law = Kaplan()
    found = law.optimum(np.array([[p[name] for name in law.parameters]]), flops, 6.0)
    inside = flops / (6 * N) >= N  # the search looks at D >= N only
    assert inside.any()
    np.testing.assert_allclose(found[0][0][inside], N[inside], rtol=1e-5)


def test_units_do_not_matter():
    table = planted(Kaplan(), PUBLISHED, grid(), 0.003)
    fit = laws.fit("kaplan", table, bootstrap=0)
    mega = laws.fit("kaplan", table.assign(params=table.params / 1e6, tokens=table.tokens / 1e9), bootstrap=0)
    np.testing.assert_allclose(mega.params[["alpha_N", "alpha_D"]], fit.params[["alpha_N", "alpha_D"]], rtol=1e-7)
    np.testing.assert_allclose(mega.params.N_c * 1e6, fit.params.N_c, rtol=1e-6)
    np.testing.assert_allclose(mega.params.D_c * 1e9, fit.params.D_c, rtol=1e-6)


def test_size_and_steps():
    table = planted(KaplanSteps(), STEPS, grid("steps", 1e3, 1e6))
    fit = laws.fit("kaplan-steps", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(STEPS.values()), rtol=1e-7)
    noisy = planted(KaplanSteps(), STEPS, grid("steps", 1e3, 1e6), 0.002)
    interval = laws.fit("kaplan-steps", noisy, bootstrap=200).conf_int(0.999)
    for name, value in STEPS.items():
        assert interval.lower[name] <= value <= interval.upper[name]
