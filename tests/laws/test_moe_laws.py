"""Mixture-of-experts laws: golden values, planted truth, limits, allocation with the experts given."""

import itertools

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import allocate
from scalelab.laws.forms import EfficiencyLeverage, FineGrainedMoE, JointMoE, MoESparsity
from scalelab.laws.forms.moe import fine_grained_flops

SIZES, TOKENS = np.geomspace(1e8, 1e10, 5), np.geomspace(1e9, 1e11, 5)
# The source's constants; it is not known here where its number of experts saturates: these two are made up.
JOINT = {
    "a": 35.91, "delta": 0.2285, "alpha": 0.1889, "gamma": -0.0098, "b": 35.98, "omega": -0.5529, "beta": 0.1775,
    "zeta": 0.0259, "c": 1.3637, "E_start": 2.0, "E_max": 300.0,
}  # fmt: skip
WORLDS = {
    "fine-grained-moe": (
        FineGrainedMoE.published["Krajewski 2024"],
        {"params": SIZES, "tokens": TOKENS, "granularity": [1, 2, 4, 8, 16]},
    ),
    "joint-moe": (JOINT, {"params_active": SIZES / 5, "tokens": TOKENS, "experts": [1, 2, 4, 8, 16, 32]}),
    "moe-sparsity": (
        MoESparsity.published["Abnar 2025"],
        {"params": SIZES, "tokens": TOKENS, "sparsity": [0, 0.5, 0.75, 0.9, 0.95, 0.98]},
    ),
    "efficiency-leverage": (
        EfficiencyLeverage.published["Tian 2025"] | {"A_max": 3.0},
        {"flops": np.geomspace(1e18, 1e22, 5), "activation": [1 / 64, 1 / 16, 1 / 4, 1], "granularity": [1, 4, 8, 16]},
    ),
}


def planted(name, noise=0.0, seed=0):
    truth, levels = WORLDS[name]
    law = laws.LAWS[name]()
    table = pd.DataFrame(list(itertools.product(*levels.values())), columns=list(levels))
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(table)))
    return table.assign(**{law.target: law.predict(truth, table) * scatter}), pd.Series(truth)


def test_golden_values():
    at = {"params": [1e9] * 3, "tokens": [2e10] * 3}
    np.testing.assert_allclose(
        FineGrainedMoE().predict("Krajewski 2024", at | {"granularity": [1, 4, 16]}),
        [3.27613, 3.16909, 3.12119],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        MoESparsity().predict("Abnar 2025", at | {"sparsity": [0, 0.75, 0.95]}), [2.56568, 2.62843, 2.77534], rtol=1e-5
    )
    leverage = EfficiencyLeverage().predict("Tian 2025", {"flops": [1e22], "activation": [0.031], "granularity": [12]})
    assert leverage[0] == pytest.approx(7.24490, rel=1e-5)
    best = EfficiencyLeverage.best_granularity(pd.Series(EfficiencyLeverage.published["Tian 2025"]))
    assert best == pytest.approx(11.3, abs=0.05)


@pytest.mark.parametrize("name", WORLDS)
def test_recovers_planted_truth(name):
    table, truth = planted(name)
    fit = laws.fit(name, table, bootstrap=0)
    np.testing.assert_allclose(fit.params, truth[fit.params.index], rtol=1e-6)
    assert np.abs(fit.resid).max() < 1e-10
    assert fit.ok, fit.warnings


@pytest.mark.parametrize("name", WORLDS)
def test_the_law_is_inside_its_interval_under_noise(name):
    """Parameters of these laws trade against each other; what the law says at and beside the data does not."""
    table, truth = planted(name, noise=0.003, seed=1)
    held = {"E_max": JOINT["E_max"]} if name == "joint-moe" else {}  # 32 experts say nothing of where they saturate
    fit = laws.fit(name, table, bootstrap=60, fixed=held)
    assert fit.converged
    law = fit.law
    true = law.predict(truth, table)
    frame = fit.get_prediction(table).summary_frame(0.95)
    inside = (frame.mean_ci_lower <= true) & (true <= frame.mean_ci_upper)
    assert inside.mean() > 0.75, inside.mean()
    assert np.abs(fit.fittedvalues / true - 1).max() < 0.005
    assert (frame.mean_ci_upper / frame.mean_ci_lower - 1).median() < 0.01


def test_granularity_saturates_at_the_law_without_its_term():
    p = FineGrainedMoE.published["Krajewski 2024"]
    fine = FineGrainedMoE().predict(p, {"params": [1e9], "tokens": [2e10], "granularity": [1e30]})[0]
    assert fine == pytest.approx(p["c"] + p["a"] / 1e9 ** p["alpha"] + p["b"] / 2e10 ** p["beta"], rel=1e-12)


def test_optimum_at_a_given_granularity():
    table, truth = planted("fine-grained-moe")
    fit = laws.fit("fine-grained-moe", table, bootstrap=0)
    for G in (1, 16):
        best = fit.optimal(1e21, fine_grained_flops(G), granularity=G)
        # with G held this is Chinchilla's law with A = a + g / G^gamma, which is solved apart
        A = truth.a + truth.g / G**truth.gamma
        exact = allocate.optimum(
            np.array([[truth.c, A, truth.b, truth.alpha, truth.beta]]), np.array([1e21]), fine_grained_flops(G)
        )
        np.testing.assert_allclose([best.params, best.tokens, best.loss], np.ravel(exact), rtol=1e-5)
    with pytest.raises(BadInput, match="granularity"):
        fit.optimal(1e21)


def test_routing_cost_makes_the_best_granularity_finite():
    table, _ = planted("fine-grained-moe")
    fit = laws.fit("fine-grained-moe", table, bootstrap=0)
    grid = 2 ** np.arange(13)
    free = [fit.optima(np.array([1e20]), 6.0, granularity=G).loss[0] for G in grid]
    paid = [fit.optima(np.array([1e20]), fine_grained_flops(G), granularity=G).loss[0] for G in grid]
    assert (np.diff(free) < 0).all()
    assert 4 <= grid[np.argmin(paid)] <= 128
    # more compute buys wider models, whose routers are a smaller share: finer experts pay
    rich = [fit.optima(np.array([1e25]), fine_grained_flops(G), granularity=G).loss[0] for G in grid]
    assert np.argmin(rich) > np.argmin(paid)


def test_flops_of_a_fine_grained_model_are_counted_from_its_shapes():
    layers, width, expansion, granularity = 12, 768, 8, 4
    total = layers * (4 * width**2 + expansion * 8 * width**2)
    router = width * expansion * granularity
    met = layers * (4 * width**2 + 8 * width**2 + router)
    assert fine_grained_flops(granularity, expansion, width / layers)(np.array([total]))[0] == pytest.approx(6 * met)
    with pytest.raises(BadInput, match="granularity"):
        fine_grained_flops(0)


def test_joint_law_reads_its_powers_as_denominators():
    law = JointMoE()
    at = {"params_active": [1e9] * 4, "tokens": [1e11] * 4, "experts": [1, 4, 16, 64]}
    assert (np.diff(law.predict(JOINT, at)) < 0).all()  # more experts help
    for role in ("params_active", "tokens"):
        more = law.predict(JOINT, at | {role: [1e12] * 4})
        assert (more < law.predict(JOINT, at)).all()
    # at one expert count: Chinchilla's law
    e = np.log(JOINT["E_start"])
    A, alpha = JOINT["a"] * np.exp(-JOINT["delta"] * e), JOINT["alpha"] + JOINT["gamma"] * e
    B, beta = JOINT["b"] * np.exp(-JOINT["omega"] * e), JOINT["beta"] + JOINT["zeta"] * e
    assert law.predict(JOINT, at)[0] == pytest.approx(JOINT["c"] + A / 1e9**alpha + B / 1e11**beta, rel=1e-12)


def test_joint_law_allocates_active_parameters():
    table, _ = planted("joint-moe", noise=0.003)
    fit = laws.fit("joint-moe", table, bootstrap=20)
    best = fit.optimal(1e20, experts=8)
    n = np.geomspace(best.params / 20, best.params * 20, 4001)
    every = fit.predict({"params_active": n, "tokens": 1e20 / (6 * n), "experts": np.full(4001, 8)})
    assert n[every.argmin()] == pytest.approx(best.params, rel=0.01)
    assert best.loss <= every.min() * (1 + 1e-12)
    assert best.params_lower < best.params < best.params_upper
    with pytest.raises(BadInput, match="experts"):
        fit.optimal(1e20)


def test_sparsity_law_keeps_its_floor_apart_from_its_bend():
    """Where the data put lambda at 0, c and e run off to opposite infinities; the law does not."""
    table, truth = planted("moe-sparsity")
    law = MoESparsity()
    straight = 1.4 - 0.08 * -np.log1p(-table.sparsity)  # lambda = 0: a floor linear in ln(1 - S)
    rest = law.predict(truth, table) - truth.c / (1 - table.sparsity) ** truth.lam - truth.e
    fit = law.fit(table.assign(loss=rest + straight), bootstrap=0)
    assert fit.converged
    assert abs(fit.params.lam) < 1e-4
    assert np.abs(fit.resid).max() < 1e-6
    with pytest.raises(BadInput, match="fixed or tied"):
        law.fit(table, fixed={"e": 0.9})
    held = law.fit(table, fixed={"lam": truth.lam}, bootstrap=0)
    np.testing.assert_allclose(held.params, truth[held.params.index], rtol=1e-6)


def test_sparsity_is_a_share():
    table, truth = planted("moe-sparsity")
    with pytest.raises(BadInput, match=r"sparsity.*row 0.*from 0 to 1"):
        laws.fit("moe-sparsity", table.assign(sparsity=table.sparsity - 0.5))
    with pytest.raises(BadInput, match="sparsity"):
        MoESparsity().predict(truth, {"params": [1e9], "tokens": [1e10], "sparsity": [1.0]})


def test_leverage_without_bound_is_fitted_with_it_held():
    truth = pd.Series(EfficiencyLeverage.published["Tian 2025"])
    table, _ = planted("efficiency-leverage")
    table = table.assign(leverage=EfficiencyLeverage().predict(truth, table))
    fit = laws.fit("efficiency-leverage", table, fixed={"A_max": 5.28e16}, bootstrap=0)
    np.testing.assert_allclose(fit.params, truth[fit.params.index], rtol=1e-6)
    assert np.isnan(EfficiencyLeverage.best_granularity(pd.Series({"beta": -0.1, "gamma": -0.01})))


@pytest.mark.parametrize("name", WORLDS)
def test_files_come_back(name, tmp_path):
    fit = laws.fit(name, planted(name, noise=0.003)[0], bootstrap=3)
    again = laws.load(fit.save(tmp_path / "fit.json"))
    assert np.array_equal(again.samples, fit.samples)
    assert again.summary() == fit.summary()
