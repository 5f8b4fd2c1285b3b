"""Laws of inference: estimators against exact enumeration, planted truth, probabilities that stay probabilities."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import Coverage, RLCompute, Speculative, TrainTestCompute
from scalelab.laws.forms.sampling import speculative_speedup, tokens_per_verification
from scalelab.laws.passk import beta_tail, coverage_table, pass_at_k

REWARD = {"R0": 0.2, "A": 0.65, "C_mid": 3e22, "B": 1.2}


def attempts(alpha, beta, problems, n, seed):
    rng = np.random.default_rng(seed)
    return rng.binomial(n, rng.beta(alpha, beta, problems))


# ------------------------------------------------------------------------------------------------ pass@k


def test_pass_at_k_is_exact():
    for n in (1, 2, 7, 40):
        c, k = np.meshgrid(np.arange(n + 1), np.arange(1, n + 1))
        exact = [
            [float(1 - Fraction(math.comb(n - ci, ki), math.comb(n, ki))) for ci in range(n + 1)]
            for ki in range(1, n + 1)
        ]
        np.testing.assert_allclose(pass_at_k(n, c, k), exact, rtol=1e-13)
    huge = pass_at_k(10_000, 3, 50)  # binomials of 10^137
    assert huge == pytest.approx(float(1 - Fraction(math.comb(9_997, 50), math.comb(10_000, 50))), rel=1e-13)
    assert pass_at_k(10**9, 1, 1) == pytest.approx(1e-9, rel=1e-12)  # no cancellation


def test_pass_at_k_has_no_bias():
    n, p = 12, 0.17
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        assert np.dot(chance, pass_at_k(n, np.arange(n + 1), k)) == pytest.approx(1 - (1 - p) ** k, rel=1e-13)


def test_pass_at_k_broadcasts_and_is_fast_enough():
    n, c = np.array([[100], [200]]), np.array([[0], [200]])
    out = pass_at_k(n, c, [1, 10, 100])
    np.testing.assert_allclose(out, [[0, 0, 0], [1, 1, 1]])
    assert isinstance(pass_at_k(10, 2, 3), float)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((10, 11, 1), "correct"), ((10, -1, 1), "correct"), ((0, 0, 1), "samples"), ((10, 3, 11), "k"), ((10, 3, 0), "k"),
     ((10, 2.5, 1), "correct"), ((10, np.nan, 1), "correct"), ((10, "x", 1), "correct"), (([], [], 1), "samples")],
)  # fmt: skip
def test_impossible_counts_are_named(arguments, field):
    with pytest.raises(BadInput) as error:
        pass_at_k(*arguments)
    assert error.value.field == field


# ------------------------------------------------------------------------------------------------ coverage


def test_coverage_recovers_planted_truth():
    table = pd.DataFrame({"attempts": 2 ** np.arange(14)})
    truth = {"a": -2.3, "b": -0.41}
    fit = laws.fit("coverage", table.assign(coverage=Coverage().predict(truth, table)), bootstrap=0)
    np.testing.assert_allclose(fit.params, list(truth.values()), rtol=1e-8)
    assert fit.ok
    logs = laws.fit("coverage", table.assign(coverage=Coverage().predict(truth, table)), objective="huber", bootstrap=0)
    np.testing.assert_allclose(logs.params, list(truth.values()), rtol=1e-8)


def test_coverage_stays_between_0_and_1_where_it_was_0_and_1():
    table = coverage_table(64, attempts(0.4, 2.0, 40, 64, 0))
    assert {0.0, 1.0} <= set(table.coverage)
    fit = laws.fit("coverage", table, bootstrap=100)
    assert fit.record["bootstrap"] == "pairs of clusters (run)"
    assert fit.record["rows"] == len(table) == 40 * 7  # problems with equal counts are two problems
    frame = fit.get_prediction({"attempts": [1, 3, 1e3, 1e9]}).summary_frame()
    assert ((frame >= 0) & (frame <= 1)).all().all()
    assert (fit.predict_draws({"attempts": [1, 1e12]}) <= 1).all()
    held = fit.holdout()
    assert held.ok
    assert np.isfinite(held.errors.to_numpy()).all()
    # the mean over problems is what is fitted
    mean = table.groupby("attempts", as_index=False).coverage.mean()
    np.testing.assert_allclose(laws.fit("coverage", mean, bootstrap=0).params, fit.params, rtol=1e-6)
    with pytest.raises(BadInput, match="logarithm"):
        laws.fit("coverage", table, objective="huber")


def test_coverage_above_1_is_named():
    table = {"attempts": [1, 2, 4, 8], "coverage": [0.2, 0.4, 0.6, 1.2]}
    with pytest.raises(BadInput, match=r"coverage.*1\.2.*row 3.*from 0 to 1"):
        laws.fit("coverage", table)
    fit = laws.fit("coverage", table, drop=True, bootstrap=0)
    assert "out-of-range-row" in [n.code for n in fit.warnings]
    assert fit.nobs == 3


def test_clusters_of_problems_make_the_interval_wider():
    table = coverage_table(64, attempts(0.4, 2.0, 60, 64, 0))
    whole, rows = (laws.fit("coverage", table, cluster=c, bootstrap=100) for c in ("run", None))
    spread = [fit.predict_draws({"attempts": [8]}).std() for fit in (whole, rows)]
    assert spread[0] > 1.5 * spread[1]


# ------------------------------------------------------------------------------------------------ beta tail


def test_beta_tail_recovers_planted_truth_within_its_interval():
    alpha, beta = 0.35, 2.0
    fit = beta_tail(200, attempts(alpha, beta, 400, 200, 3), bootstrap=300)
    truth = pd.Series({"alpha": alpha, "beta": beta, "a": -math.gamma(alpha + beta) / math.gamma(beta), "b": -alpha})
    interval = fit.conf_int(0.99)
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    assert fit.ok
    assert not fit.warnings
    assert fit.bse.b < 0.03


def test_beta_tail_is_the_maximum_of_the_beta_binomial_likelihood():
    n, c = np.array([5, 9, 9, 20, 20, 20]), np.array([0, 3, 3, 1, 20, 7])
    fit = beta_tail(n, c, bootstrap=0)

    def log_likelihood(alpha, beta):
        def rising(x, m):
            return math.lgamma(x + m) - math.lgamma(x)

        counts = zip(n.tolist(), c.tolist(), strict=True)
        return sum(rising(alpha, ci) + rising(beta, ni - ci) - rising(alpha + beta, ni) for ni, ci in counts)

    best = log_likelihood(fit.params.alpha, fit.params.beta)
    assert fit.record["value"] == pytest.approx(-best, rel=1e-12)
    for f, g in itertools.product((0.99, 1, 1.01), repeat=2):
        assert log_likelihood(fit.params.alpha * f, fit.params.beta * g) <= best


def test_beta_tail_coverage_and_its_power_law_limit():
    fit = beta_tail(100, attempts(0.5, 3.0, 300, 100, 0), bootstrap=100)
    p = fit.params
    rng = np.random.default_rng(1)
    success = rng.beta(p.alpha, p.beta, 400_000)
    at = fit.coverage([1, 10, 1000])
    for k, value in zip(at.attempts, at.coverage, strict=True):
        failed = (1 - success) ** k
        assert abs(1 - failed.mean() - value) < 5 * failed.std() / np.sqrt(len(success))
    far = fit.coverage([1e8])
    assert 1 - far.coverage[0] == pytest.approx(-p.a * 1e8**p.b, rel=1e-3)
    assert ((at[["lower", "coverage", "upper"]] >= 0) & (at[["lower", "coverage", "upper"]] <= 1)).all().all()
    assert ((at.lower <= at.coverage) & (at.coverage <= at.upper)).all()


def test_beta_tail_does_not_depend_on_the_order_of_problems(tmp_path):
    c = attempts(0.5, 3.0, 80, 50, 0)
    a, b = beta_tail(50, c, bootstrap=50), beta_tail(50, c[::-1], bootstrap=50)
    assert np.array_equal(a.samples, b.samples)
    again = laws.load(a.save(tmp_path / "tail.json"))
    assert again.summary() == a.summary()
    assert np.array_equal(again.samples, a.samples)
    assert again.coverage([7]).equals(a.coverage([7]))


def test_beta_tail_sees_problems_beyond_reach():
    c = np.concatenate([attempts(2.0, 2.0, 100, 100, 0), np.zeros(15, int)])
    assert "unsolvable-problems" in [n.code for n in beta_tail(100, c, bootstrap=0).warnings]
    assert "too-few-rows" in [n.code for n in beta_tail(100, c[80:105], bootstrap=0).warnings]
    with pytest.raises(BadInput, match="some attempts must succeed"):
        beta_tail(10, np.zeros(20, int))
    with pytest.raises(BadInput, match="at least 4"):
        beta_tail(10, [1, 2, 3])
    same = beta_tail(1000, np.full(40, 300), bootstrap=20)  # one difficulty: no distribution to speak of
    assert not same.ok
    assert same.conf_int().isna().all().all()


# ------------------------------------------------------------------------------------------------ the others


def test_train_test_compute():
    flops, elo = (a.ravel() for a in np.meshgrid(np.geomspace(1e12, 1e16, 5), [-1500.0, -1000, -500, 0]))
    table = pd.DataFrame({"flops": flops, "elo": elo})
    law = TrainTestCompute()
    table["test_flops"] = law.predict("Jones 2021, 9x9 Hex", table)
    exact = 10 ** (-1.2 * np.log10(flops) + 0.004 * elo + 29)
    np.testing.assert_allclose(table.test_flops, exact, rtol=1e-12)
    fit = laws.fit("train-test-compute", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, [-1.2, 0.004, 29], rtol=1e-9)
    noisy = table.assign(test_flops=exact * np.exp(0.5 * np.random.default_rng(0).standard_normal(len(table))))
    fit = laws.fit("train-test-compute", noisy, bootstrap=200)
    design = np.stack([np.log10(flops), elo, np.ones(len(elo))], axis=1)
    np.testing.assert_allclose(fit.params, np.linalg.lstsq(design, np.log10(noisy.test_flops))[0], rtol=1e-8)
    interval = fit.conf_int(0.99)
    assert ((interval.lower <= [-1.2, 0.004, 29]) & (interval.upper >= [-1.2, 0.004, 29])).all()


def test_speculative_law_is_linear_in_logarithms():
    levels = {"tokens": np.geomspace(1e9, 1e12, 4), "params": [1e8, 3e8, 1e9], "decode_batch": [1, 4, 16, 64]}
    table = pd.DataFrame(list(itertools.product(*levels.values())), columns=list(levels))
    truth = np.array([-2.0, 0.2, 0.05, -0.1])
    design = np.column_stack([np.ones(len(table)), np.log(table)])
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(table))
    fit = laws.fit("speculative", table.assign(accepted=design @ truth), bootstrap=0)
    np.testing.assert_allclose(fit.params, truth, rtol=1e-8)
    noisy = table.assign(accepted=design @ truth + noise)
    fit = laws.fit("speculative", noisy, bootstrap=200)
    np.testing.assert_allclose(fit.params, np.linalg.lstsq(design, noisy.accepted)[0], rtol=1e-6)
    interval = fit.conf_int(0.99)
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all()


def test_speculative_law_of_what_was_varied(tmp_path):
    table = pd.DataFrame({"tokens": np.geomspace(1e9, 1e12, 7)})
    table["accepted"] = -1.0 + 0.15 * np.log(table.tokens)
    fit = laws.fit(Speculative(("tokens",)), table, bootstrap=10)
    np.testing.assert_allclose(fit.params, [-1, 0.15], rtol=1e-9)
    again = laws.load(fit.save(tmp_path / "fit.json"))
    assert again.law.inputs == ("tokens",)
    assert again.predict({"tokens": [1e10]})[0] == fit.predict({"tokens": [1e10]})[0]
    with pytest.raises(BadInput, match="varied"):
        Speculative(("depth",))


def test_tokens_per_verification():
    rng = np.random.default_rng(0)
    for rate, draft in ((0.7, 5), (0.2, 3)):
        accepted = (rng.random((200_000, draft)) < rate).cumprod(1).sum(1) + 1
        assert tokens_per_verification(rate, draft) == pytest.approx(accepted.mean(), abs=0.01)
        assert tokens_per_verification(rate, draft) == pytest.approx((1 - rate ** (draft + 1)) / (1 - rate), rel=1e-14)
    assert tokens_per_verification(1.0, 4) == 5
    assert tokens_per_verification(0.0, 4) == 1
    assert tokens_per_verification(1 - 1e-13, 4) == pytest.approx(5, rel=1e-12)  # no cancellation near 1
    assert tokens_per_verification(0.8, 0) == 1
    assert speculative_speedup(0.8, 0, 0.1) == 1
    assert speculative_speedup(0.8, 4, 0.05) == pytest.approx((1 - 0.8**5) / 0.2 / 1.2, rel=1e-14)
    np.testing.assert_allclose(tokens_per_verification([0.5, 1.0], [[1], [2]]), [[1.5, 2], [1.75, 3]])
    for bad in ((1.2, 3, 0.1), (0.5, -1, 0.1), (0.5, 3, -0.1), (np.nan, 3, 0.1)):
        with pytest.raises(BadInput):
            speculative_speedup(*bad)


@pytest.mark.parametrize("unit", [1.0, 1e-20])
def test_rl_compute_recovers_planted_truth_in_any_unit(unit):
    table = pd.DataFrame({"flops": np.geomspace(1e21, 1e24, 20) * unit})
    truth = REWARD | {"C_mid": REWARD["C_mid"] * unit}
    reward = RLCompute().predict(truth, table)
    fit = laws.fit("rl-compute", table.assign(reward=reward), bootstrap=0)
    np.testing.assert_allclose(fit.params, list(truth.values()), rtol=1e-7)
    assert fit.ok
    noisy = reward + 0.005 * np.random.default_rng(0).standard_normal(20)
    fit = laws.fit("rl-compute", table.assign(reward=noisy), bootstrap=200)
    interval = fit.conf_int(0.99)
    assert ((interval.lower <= list(truth.values())) & (list(truth.values()) <= interval.upper)).all(), interval


def test_rl_compute_stays_a_pass_rate_and_has_its_limits():
    table = pd.DataFrame({"flops": np.geomspace(1e21, 1e24, 20)})
    noise = 0.02 * np.random.default_rng(0).standard_normal(20)
    reward = np.clip(RLCompute().predict(REWARD | {"R0": 0.0, "A": 1.0}, table) + noise, 0, 1)
    assert (reward == 0).any() or (reward == 1).any()
    fit = laws.fit("rl-compute", table.assign(reward=reward), bootstrap=100)
    far = fit.predict_draws({"flops": [1e10, 1e40]})
    assert ((far >= 0) & (far <= 1)).all()
    p = pd.Series(REWARD)
    value = RLCompute().predict(REWARD, {"flops": [1.0, p.C_mid, 1e60]})
    np.testing.assert_allclose(value, [p.R0, (p.R0 + p.A) / 2, p.A], rtol=1e-9)
    with pytest.raises(BadInput, match=r"reward.*from 0 to 1"):
        laws.fit("rl-compute", table.assign(reward=reward + 0.5))
