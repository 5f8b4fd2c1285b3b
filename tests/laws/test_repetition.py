"""Repeated data: golden values, limits, planted truth in two stages and at once; pools of several kinds."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import DataConstrained, RepeatedPools, UtilityDecay
from scalelab.laws.forms.repetition import worth

C4 = DataConstrained.published["Muennighoff 2023, C4"]


def epochs(noise=0.0, seed=0):
    """Runs of 1 to 40 epochs, some larger than their unique tokens warrant."""
    rows = [
        (N, U * e, U)
        for U in (1e8, 4e8, 1.5e9, 4e9, 1e10)
        for e in (1, 2, 4, 8, 16, 40)
        for N in (1e7, 5e7, 2e8, 8e8, 3e9)
        if 1e17 < 6 * N * U * e < 1e22
    ]
    table = pd.DataFrame(rows, columns=["params", "tokens", "unique_tokens"])
    scatter = np.random.default_rng(seed).standard_normal(len(table))
    return table.assign(loss=DataConstrained().predict(C4, table) * np.exp(noise * scatter))


def test_golden_worth_of_repeated_tokens():
    seen = np.array([2, 4, 8, 16, 64])
    golden = [0.9841, 0.9314, 0.8280, 0.6614, 0.2521]
    np.testing.assert_allclose(worth(seen, 1.0, C4["R_D"]) / seen, golden, rtol=2e-4)  # four digits are printed
    np.testing.assert_allclose(worth(seen * 1e9, 1e9, C4["R_D"]) / (seen * 1e9), golden, rtol=2e-4)


def test_limits_of_worth():
    U, R = 1e9, 15.0
    np.testing.assert_array_equal(worth(np.array([0.0, 0.3, 1.0]) * U, U, R), np.array([0.0, 0.3, 1.0]) * U)
    tiny = 1e-10  # expm1: no digit of the excess is lost
    assert worth(U * (1 + tiny), U, R) - U == pytest.approx(U * tiny, rel=1e-5)
    assert worth(1e30, U, R) == pytest.approx(U * (1 + R), rel=1e-12)
    assert worth(40 * U, U, 1e14) == pytest.approx(40 * U, rel=1e-6)


def test_single_epoch_of_a_fitting_model_is_chinchilla():
    base = {name: C4[name] for name in ("E", "A", "B", "alpha", "beta")}
    table = pd.DataFrame({"params": np.geomspace(1e7, 1e9, 5), "tokens": np.geomspace(1e9, 1e11, 5)})
    plain = laws.Chinchilla().predict(base, table)
    for unique in (table.tokens, 3 * table.tokens):  # more than was seen: what was seen counts
        np.testing.assert_allclose(DataConstrained().predict(C4, table.assign(unique_tokens=unique)), plain, rtol=1e-13)
    assert (DataConstrained().predict(C4, table.assign(unique_tokens=table.tokens / 20)) > plain).all()


def test_fitting_parameters_are_the_base_laws_optimum():
    """U_N is Chinchilla's N* at D* = U: up to there parameters count in full, beyond they wear out."""
    base = laws.fit("chinchilla", epochs().query("tokens == unique_tokens"), bootstrap=0)  # any five numbers will do
    at = base.optimal(1e20)
    constants = dict(base.params) | {"R_D": 15.0, "R_N": 5.0}
    table = pd.DataFrame({"params": at.params * np.array([0.9, 0.999, 1.01, 2.0]), "tokens": at.tokens})
    excess = DataConstrained().predict(constants, table.assign(unique_tokens=at.tokens)) - base.predict(table)
    np.testing.assert_allclose(excess[:2], 0, atol=1e-13)
    assert (excess[2:] > 1e-8).all()


def test_planted_truth_at_once():
    fit = laws.fit("data-constrained", epochs(), bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(C4), rtol=1e-5)
    assert fit.record["agreement"] >= 0.5
    assert "repeated-data" not in {n.code for n in fit.warnings}  # it is what the law is for


@pytest.mark.parametrize("seed", range(2))
def test_planted_truth_under_noise(seed):
    fit = laws.fit("data-constrained", epochs(0.004, seed), bootstrap=150)
    interval, truth = fit.conf_int(0.999), pd.Series(C4)
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval


def test_planted_truth_in_two_stages():
    """As the source: base law from single-epoch runs near their optimum, then the two constants of repetition."""
    base = {name: C4[name] for name in ("E", "A", "B", "alpha", "beta")}
    N, M = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 3e9, 7), [20.0, 40.0, 80.0, 160.0]))
    single = pd.DataFrame({"params": N, "tokens": N * M})
    single["loss"] = laws.Chinchilla().predict(base, single)
    first = laws.fit("chinchilla", single, tied={"beta": "alpha"}, bootstrap=0)
    np.testing.assert_allclose(first.params, pd.Series(base), rtol=1e-6)
    second = laws.fit("data-constrained", epochs(0.004), fixed=dict(first.params), bootstrap=150)
    np.testing.assert_allclose(second.params[list(base)], pd.Series(base), rtol=1e-6)
    interval = second.conf_int(0.999).loc[["R_D", "R_N"]]
    assert (interval.lower < [C4["R_D"], C4["R_N"]]).all()
    assert (interval.upper > [C4["R_D"], C4["R_N"]]).all()
    assert second.record["free"] == 2


def test_golden_optimum():
    """With data to spare: D/N at any budget, and N* at 5.76e23 FLOPs."""
    params = np.array([list(C4.values())])
    N, D, _ = DataConstrained().optimum(params, np.array([1e20, 5.76e23]), 6.0, unique_tokens=1e20)
    np.testing.assert_allclose(D / N, [[19.613, 19.613]], rtol=1e-4)
    assert N[0, 1] == pytest.approx(6.99622e10, rel=1e-4)


def test_optimum_under_limited_data_repeats_less_than_it_trains():
    fit = laws.fit("data-constrained", epochs(0.002), bootstrap=0)
    plenty, little = (fit.optimal(1e21, unique_tokens=U) for U in (1e13, 2e9))
    assert plenty.tokens / plenty.params == pytest.approx(19.6, rel=0.1)  # golden for these constants: 19.613
    assert little.loss > plenty.loss
    N = little.params * np.array([0.8, 1.0, 1.25])
    loss = fit.predict({"params": N, "tokens": 1e21 / (6 * N), "unique_tokens": [2e9] * 3})
    assert loss[1] == pytest.approx(little.loss, rel=1e-9)
    assert loss[1] < min(loss[0], loss[2])
    with pytest.raises(BadInput, match="unique_tokens"):
        fit.optimal(1e21)


# ------------------------------------------------------------------------------------------------ pools

POOLS = {
    "E": 1.8, "A": 500.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36, "q_books": 2.5, "R_web": 15.0, "R_books": 6.0,
}  # fmt: skip


def pooled(noise=0.0, seed=0, n=80):
    rng = np.random.default_rng(seed)
    D, share = 10 ** rng.uniform(9, 11.5, n), rng.choice([0, 0.1, 0.25, 0.5, 1.0], n)
    table = pd.DataFrame(
        {
            "params": 10 ** rng.uniform(7, 9.5, n),
            "tokens_web": D * (1 - share),
            "tokens_books": D * share,
            "unique_tokens_web": rng.choice([3e9, 3e10], n),
            "unique_tokens_books": rng.choice([2e8, 1e9, 5e9], n),
        }
    )
    scatter = rng.standard_normal(n)
    return table.assign(loss=RepeatedPools("web", "books").predict(POOLS, table) * np.exp(noise * scatter))


def test_planted_pools():
    law = RepeatedPools("web", "books")
    fit = law.fit(pooled(), bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(POOLS)[fit.params.index], rtol=1e-5)
    fit = law.fit(pooled(0.003), bootstrap=150)
    interval, truth = fit.conf_int(0.999), pd.Series(POOLS)[fit.params.index]
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    tied = law.fit(pooled(0.003), tied={"R_books": "R_web"}, bootstrap=0)
    assert tied.params.R_books == pytest.approx(tied.params.R_web)


def test_one_pool_is_the_data_constrained_law_of_fitting_models():
    one = {name: C4[name] for name in ("E", "A", "B", "alpha", "beta")} | {"R_all": C4["R_D"]}
    table = pd.DataFrame({"params": [1e7, 1e8], "tokens": [8e9, 2e10], "unique_tokens": [1e9, 5e9]})
    pools = table.rename(columns={"tokens": "tokens_all", "unique_tokens": "unique_tokens_all"})
    expected = DataConstrained().predict(C4, table)
    np.testing.assert_allclose(RepeatedPools("all").predict(one, pools), expected, rtol=1e-13)


def test_two_equal_pools_are_one():
    halves = {name: C4[name] for name in ("E", "A", "B", "alpha", "beta")} | {"q_2": 1.0, "R_1": 9.0, "R_2": 9.0}
    one = {"params": [1e8], "tokens_1": [2e10], "unique_tokens_1": [4e9], "tokens_2": [0.0], "unique_tokens_2": [1.0]}
    two = {"params": [1e8]} | {
        f"{role}_{i}": [v] for role, v in (("tokens", 1e10), ("unique_tokens", 2e9)) for i in (1, 2)
    }
    law = RepeatedPools()
    assert law.predict(halves, one)[0] == pytest.approx(law.predict(halves, two)[0], rel=1e-12)
    with pytest.raises(BadInput, match="different names"):
        RepeatedPools("web", "web")


# The authors' released constants for four pools of DataComp, best first ("effective utility", results/ of their
# repository): utilities, half-lives in epochs, a (per 100,000 samples), floor.
GOYAL = {"b": (-0.16, -0.125, -0.1, -0.085), "tau": (6.7273, 8.5455, 5.2727, 2.2727), "a": 0.025 / 1e5, "d": 0.1}
POOL = 12.8e6


def goyal(count, seen):
    """The error after `seen` samples of the `count` best pools, by the law."""
    names = [str(i) for i in range(count)]
    constants = {"a": GOYAL["a"], "d": GOYAL["d"]}
    constants |= {f"{what}_{i}": GOYAL[what][i] for what in ("b", "tau") for i in range(count)}
    table = {"tokens": np.atleast_1d(seen)} | {f"unique_tokens_{i}": np.full(np.size(seen), POOL) for i in names}
    return UtilityDecay(*names).predict(constants, table).to_numpy()


def step_by_step(count, seen):
    """The same, epoch by epoch, as the law is told: each epoch multiplies the excess by a power of the growth."""
    epoch, n, excess = 0, min(count * POOL, seen), None
    while True:
        utility = np.mean(
            [b * 0.5 ** (epoch / (tau * count)) for b, tau in zip(GOYAL["b"], GOYAL["tau"], strict=True)][:count]
        )
        if epoch == 0:
            excess = (GOYAL["a"] * n) ** utility
        else:
            after = min(n + count * POOL, seen)
            excess, n = excess * (after / n) ** utility, after
        if n >= seen:
            return GOYAL["d"] + excess
        epoch += 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_utility_decays_epoch_by_epoch(count):
    seen = np.array([3e6, 12.8e6, 20e6, 128e6, 640e6])
    np.testing.assert_allclose(goyal(count, seen), [step_by_step(count, s) for s in seen], rtol=1e-12)


def test_more_compute_wants_more_pools():
    """The source's finding: the best pool alone wins while it is fresh, and loses once it is worn out."""
    error = np.array([goyal(count, [32e6, 640e6]) for count in (1, 2, 3, 4)])
    best = error.argmin(axis=0)
    assert best[0] == 0
    assert best[1] > best[0]


def test_planted_utility_decay():
    law = UtilityDecay("top", "rest")
    truth = {"d": 0.1, "a": 2.5e-7, "b_top": -0.16, "b_rest": -0.1, "tau_top": 6.7, "tau_rest": 5.3}
    rng = np.random.default_rng(0)
    kind = np.arange(48) % 3
    table = pd.DataFrame(
        {
            "tokens": 10 ** rng.uniform(6.5, 8.8, 48),
            "unique_tokens_top": np.where(kind == 1, 0, POOL),
            "unique_tokens_rest": np.where(kind == 0, 0, POOL),
        }
    )
    table["error"] = law.predict(truth, table)
    fit = law.fit(table, bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(truth), rtol=1e-5)
    table["error"] *= np.exp(0.003 * rng.standard_normal(48))
    fit = law.fit(table, bootstrap=150)
    interval = fit.conf_int(0.999)
    assert ((interval.lower <= pd.Series(truth)) & (pd.Series(truth) <= interval.upper)).all(), interval
    with pytest.raises(BadInput, match="at least one pool"):
        law.fit(table.assign(unique_tokens_top=0.0, unique_tokens_rest=0.0))


def test_many_epochs_in_little_memory():
    """Chunks of epochs give the sum that the law is; past all reason it is refused, in one line."""
    seen = POOL * np.array([3.4, 40.0, 41.5, 1000.25])
    expected = [step_by_step(1, s) for s in seen]
    np.testing.assert_allclose(goyal(1, seen), expected, rtol=1e-12)
    with pytest.raises(BadInput, match=r"tokens = 1280000000000000.0: are 1e\+08 epochs; up to 4096"):
        goyal(1, POOL * 1e8)
