"""Comparisons: planted multipliers and crossings, pairs, verdicts, findings, files."""

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, best_size, law, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws import contrast, frontier
from scalelab.laws.compare import compare
from scalelab.laws.comparison import Comparison
from scalelab.laws.paired import units
from scalelab.laws.shared import fit_shared

BUDGETS = np.geomspace(1e18, 1e20, 5)
CROSSING = 1e19


def optimal(C, truth):
    N = best_size(C, truth)
    return law(N, C / (6 * N), truth)


def twice_as_good(truth=TRUTH):
    """L(N, D) of the reference at sqrt(2) N and sqrt(2) D: the same loss for half the compute, at every C."""
    s = np.sqrt(2)
    return {**truth, "A": truth["A"] * s ** -truth["alpha"], "B": truth["B"] * s ** -truth["beta"]}


def crosses(at=CROSSING, E=1.85):
    """A higher floor and smaller terms, so that the optimal losses meet at C = `at`: better below, worse above."""
    level = optimal(at, TRUTH)
    share = (level - E) / (level - TRUTH["E"])
    return {**TRUTH, "E": E, "A": share * TRUTH["A"], "B": share * TRUTH["B"]}


def arms(other, noise=0.004, seed=0, sizes=5, budgets=BUDGETS):
    tables = {
        "base": sweep(budgets, sizes, noise, 2 * seed),
        "new": sweep(budgets, sizes, noise, 2 * seed + 1, truth=other),
    }
    return {name: table.drop(columns="seconds") for name, table in tables.items()}


def codes(comparison):
    return {n.code for n in comparison.warnings}


# ------------------------------------------------------------------------------------------------ planted truth


def test_a_planted_multiplier():
    result = compare(arms(twice_as_good(), noise=0.0), (1e18, 1e22), law="chinchilla", bootstrap=0)
    table = result.table()
    np.testing.assert_allclose(table["multiplier"], 0.5, rtol=1e-4)
    for row in table.itertuples():
        assert row.difference == pytest.approx(
            optimal(row.flops, twice_as_good()) - optimal(row.flops, TRUTH), rel=1e-4
        )
    assert np.isnan(result.crossings.loc["new", "flops"])
    swapped = compare(dict(reversed(arms(twice_as_good(), noise=0.0).items())), [1e20], law="chinchilla", bootstrap=0)
    assert swapped.table()["multiplier"][0] == pytest.approx(2.0, rel=1e-4)


def test_a_multiplier_has_its_interval():
    result = compare(arms(twice_as_good(), seed=2), [1e18, 1e19, 1e20], law="chinchilla", bootstrap=300)
    table = result.table()
    assert ((table["multiplier_lower"] < 0.5) & (table["multiplier_upper"] > 0.5)).all()
    assert (table["multiplier_upper"] < 0.7).all()
    assert (table["verdict"] == "new").all()
    assert (table["probability"] > 0.99).all()
    assert list(table["inside"]) == [True, True, True]


def test_a_planted_crossing():
    exact = compare(arms(crosses(), noise=0.0), (1e18, 1e20), law="chinchilla", bootstrap=0).crossings.loc["new"]
    assert exact["flops"] == pytest.approx(CROSSING, rel=1e-3)
    assert exact["better_above"] == "base"
    result = compare(arms(crosses(), noise=0.002), (1e18, 1e20), law="chinchilla", bootstrap=400)
    found = result.crossings.loc["new"]
    assert found["lower"] < CROSSING < found["upper"]
    assert found["lower"] > 1e18
    assert found["upper"] < 1e20
    assert found["probability_inside"] > 0.99
    table = result.table()
    assert (table["verdict"][table["flops"] < found["lower"]] == "new").all()
    assert (table["verdict"][table["flops"] > found["upper"]] == "base").all()
    between = (table["flops"] > found["lower"]) & (table["flops"] < found["upper"])
    assert (table["verdict"][between] == "no verdict").all()
    assert "crossover-outside" not in codes(result)


def test_a_crossing_beyond_the_data_is_said_to_be():
    result = compare(arms(crosses(1e21), noise=0.001), [1e19, 1e21], law="chinchilla", bootstrap=100)
    assert result.crossings.loc["new", "flops"] == pytest.approx(1e21, rel=0.5)
    assert result.crossings.loc["new", "probability_inside"] < 0.9
    assert "crossover-outside" in codes(result)


def test_equal_arms_have_no_verdict():
    result = compare(arms(TRUTH, seed=1), law="chinchilla", bootstrap=300)
    assert (result.table()["verdict"] == "no verdict").mean() > 0.8
    assert "small-gap" in codes(result)
    assert result.table()["probability"].between(0.001, 0.999).all()


@pytest.mark.slow
def test_coverage_of_crossing_and_multiplier():
    """60 planted worlds each: 95 % intervals cover in 90 to 100 %."""
    worlds, crossing, multiplier = 60, 0, 0
    for seed in range(worlds):
        found = compare(arms(crosses(), 0.003, seed), [1e19], law="chinchilla", bootstrap=200, seed=seed).crossings
        crossing += found.loc["new", "lower"] <= CROSSING <= found.loc["new", "upper"]
        row = compare(arms(twice_as_good(), 0.004, seed), [1e20], law="chinchilla", bootstrap=200, seed=seed).table()
        multiplier += row["multiplier_lower"][0] <= 0.5 <= row["multiplier_upper"][0]
    assert crossing >= 0.9 * worlds
    assert multiplier >= 0.9 * worlds


# ------------------------------------------------------------------------------------------------ pairs


def paired_arms(noise=0.01, own=0.002, seed=3):
    rng = np.random.default_rng(seed)
    common = np.exp(noise * rng.standard_normal(25))
    return {
        name: table.assign(loss=table["loss"] * common * np.exp(own * rng.standard_normal(25)), run=np.arange(25))
        for name, table in arms(twice_as_good(), noise=0.0).items()
    }


def test_pairing_narrows_what_the_arms_have_in_common():
    tables = paired_arms()
    alone = compare(tables, [1e19], law="chinchilla", bootstrap=200)
    together = compare(tables, [1e19], pair="run", law="chinchilla", bootstrap=200)

    def width(result):
        row = result.table().iloc[0]
        return row["upper"] - row["lower"]

    assert width(together) < 0.6 * width(alone)
    assert "unpaired" in codes(alone)
    assert "run" in next(n for n in alone.warnings if n.code == "unpaired").numbers["possible"]
    assert "unpaired" not in codes(together)
    assert together.record["drawn"] == "paired by run (25 matched of 25)"
    fits = {name: laws.fit("chinchilla", table, bootstrap=5) for name, table in tables.items()}
    again = compare(fits, [1e19], pair="run", bootstrap=200)
    pd.testing.assert_frame_equal(again.contrasts, together.contrasts)
    shuffled = {name: table.sample(frac=1, random_state=1) for name, table in tables.items()}
    mixed = compare(shuffled, [1e19], pair="run", law="chinchilla", bootstrap=200)
    pd.testing.assert_frame_equal(mixed.contrasts, together.contrasts, rtol=1e-6)


def test_fits_of_one_seed_are_not_taken_for_pairs():
    """The same random numbers drew rows in both fits; without `pair` the draws must not go together."""
    tables = paired_arms(0.01, 0.0)
    width = {}
    for seed in (0, 1):
        fits = {
            name: laws.fit("chinchilla", t, bootstrap=300, seed=seed * (name == "new")) for name, t in tables.items()
        }
        row = compare(fits, [1e19]).table().iloc[0]
        width[seed] = row["upper"] - row["lower"]
    assert width[0] == pytest.approx(width[1], rel=0.2)


def test_units_join_keys_and_clusters():
    arm = np.array([0, 0, 0, 0, 1, 1, 1])
    alone = units(arm, None, list("aabcabc"))
    assert alone.unit.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert alone.matched == 0
    paired = units(arm, [1, 2, 2, 4, 1, 7, 8], list("abcdaab"))
    # key 2 joins rows 1 and 2; key 1 joins rows 0 and 4; cluster a of arm 1 joins rows 4 and 5
    assert paired.unit.tolist() == [0, 1, 1, 2, 0, 0, 3]
    assert paired.matched == 1
    assert len(np.unique(paired.stratum)) == 3
    assert paired.grouped


def test_a_shared_fit_is_compared_with_its_own_draws():
    tables = arms({**TRUTH, "A": 330.0})
    fit = fit_shared(tables, shared=("E", "B", "alpha", "beta"), bootstrap=300)
    together = compare(fit, [1e21])
    separate = compare(tables, [1e21], law="chinchilla", bootstrap=300)
    assert "of one shared fit" in together.record["drawn"]
    widths = [float((c.table()["upper"] - c.table()["lower"]).iloc[0]) for c in (together, separate)]
    assert widths[0] < 0.3 * widths[1]
    truth = optimal(1e21, {**TRUTH, "A": 330.0}) - optimal(1e21, TRUTH)
    row = together.table().iloc[0]
    assert row["lower"] < truth < row["upper"]


# ------------------------------------------------------------------------------------------------ what is equal


def test_equal_size_tokens_and_time_under_different_costs():
    """The second arm pays twice the FLOPs per token and a third of the time per FLOP."""
    tables = {name: t.assign(seconds=1e-12 * t["params"] * t["tokens"]) for name, t in arms(TRUTH, noise=0.0).items()}
    tables["new"]["seconds"] *= 2 / 3
    C = 1e20
    for cost in (12.0, lambda N: 12.0 * N):
        result = compare(tables, [C], law="chinchilla", cost={"base": 6.0, "new": cost}, bootstrap=0)
        N = best_size(C)
        D = C / (6 * N)
        gap = {at: result.table(at)["difference"][0] for at in ("compute", "params", "tokens", "seconds")}
        assert gap["compute"] == pytest.approx(optimal(C / 2, TRUTH) - optimal(C, TRUTH), rel=1e-4)
        assert gap["params"] == pytest.approx(law(N, D / 2) - law(N, D), rel=1e-3)
        assert gap["tokens"] == pytest.approx(law(N / 2, D) - law(N, D), rel=1e-3)
        assert gap["seconds"] == pytest.approx(optimal(1.5 * C, TRUTH) - optimal(C, TRUTH), rel=1e-3)
        assert result.table()["multiplier"][0] == pytest.approx(2.0, rel=1e-3)


def test_time_is_compared_only_where_it_was_recorded():
    tables = arms(TRUTH)
    with pytest.raises(BadInput, match="not recorded"):
        compare(tables, [1e19], law="chinchilla", bootstrap=0).table("seconds")
    fits = {n: laws.fit("chinchilla", t.assign(seconds=1e-12 * t["params"] * t["tokens"]), bootstrap=0)
            for n, t in tables.items()}  # fmt: skip
    assert len(compare(fits, [1e19]).table("seconds")) == 1


def test_a_law_without_a_closed_form_compares_alike():
    mine = laws.define(
        "mine", lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.beta, inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True), A=laws.positive(1, 1e5, linear=True),
        B=laws.positive(1, 1e5, linear=True), alpha=laws.free(0.05, 1.5), beta=laws.free(0.05, 1.5),
    )  # fmt: skip
    tables = arms(twice_as_good())
    built_in = compare(tables, [1e19, 1e21], law="chinchilla", bootstrap=40).table()
    own = compare(tables, [1e19, 1e21], law=mine, bootstrap=40).table()
    columns = ["multiplier", "multiplier_lower", "difference", "lower", "upper"]
    np.testing.assert_allclose(own[columns], built_in[columns], rtol=1e-2)


def test_laws_in_compute_alone_compare():
    power = laws.define(
        "power", lambda p, x: p.E + p.K * x.flops**-p.gamma, inputs=("flops",), E=laws.positive(0.5, 5, linear=True),
        K=laws.positive(1, 1e6, linear=True), gamma=laws.free(0.02, 0.5),
    )  # fmt: skip
    C = np.geomspace(1e17, 1e20, 12)
    tables = {n: {"flops": C, "loss": 1.7 + (C * s) ** -0.15 * 800} for n, s in (("base", 1.0), ("new", 3.0))}
    result = compare(tables, [1e18, 1e20], law=power, bootstrap=0)
    np.testing.assert_allclose(result.table()["multiplier"], 1 / 3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ numerics


def test_inverse_interpolation():
    x = np.linspace(40, 60, 70)
    y = np.stack([1.7 + 900 * np.exp(-0.15 * x), 1.8 + 700 * np.exp(-0.14 * x)])
    level = np.array([1.7 + 900 * np.exp(-0.15 * 47.123), 1.8 + 700 * np.exp(-0.14 * 58.9)])
    np.testing.assert_allclose(frontier.where(level, x, y), [47.123, 58.9], atol=1e-5)
    assert frontier.where(np.array([1.6, 99.0]), x, y).tolist() == [np.inf, -np.inf]
    assert np.isnan(frontier.where(np.array([np.nan, 2.0]), x, y)[0])
    np.testing.assert_allclose(frontier.crossings(x, np.sin((x - 50.3) / 5)), [50.3 - 5 * np.pi + 5 * np.pi], atol=1e-3)


def test_bands_of_infinite_draws():
    draws = np.array([[1.0, np.nan, 1.0], [2.0, np.nan, np.inf], [3.0, np.nan, np.inf], [4.0, 1.0, 2.0]])
    lower, upper = contrast.band(draws, 0.9)
    np.testing.assert_allclose([lower[0], upper[0]], np.quantile(draws[:, 0], [0.05, 0.95]))
    assert np.isnan(lower[1])
    assert (lower[2], upper[2]) == (1.0, np.inf)


# ------------------------------------------------------------------------------------------------ findings


def test_constants_of_a_paper_are_stale():
    table = arms(TRUTH)["base"]
    sides = {"mine": laws.fit("chinchilla", table, bootstrap=100), "paper": ("chinchilla", "Besiroglu 2024")}
    result = compare(sides, [1e20])
    assert "stale-compare" in codes(result)
    expected = laws.Chinchilla().optimum(
        np.array([list(laws.Chinchilla.published["Besiroglu 2024"].values())]), np.array([1e20]), 6.0
    )[2][0, 0]
    assert result.table()["loss"][0] == pytest.approx(expected)
    assert np.isfinite(result.table()["lower"][0])
    own = compare({"a": ("chinchilla", TRUTH), "b": ("chinchilla", twice_as_good())}, [1e20])
    assert own.table()["multiplier"][0] == pytest.approx(0.5, rel=1e-4)
    assert own.table()["verdict"][0] == "no verdict"  # constants have no interval


def test_a_fit_that_is_not_ok_gives_no_interval():
    fixed_ratio = arms(TRUTH)["base"].assign(tokens=lambda t: 20 * t["params"], flops=lambda t: 120 * t["params"] ** 2)
    fixed_ratio["loss"] = law(fixed_ratio["params"], fixed_ratio["tokens"])
    result = compare({"base": arms(TRUTH)["base"], "bad": fixed_ratio}, [1e19], law="chinchilla", bootstrap=50)
    assert "arm-unusable" in codes(result)
    assert not result.ok
    assert result.table()["verdict"][0] == "no verdict"
    assert "lower" not in result.table()
    assert "collinear-ND" in result.summary()


def test_labels_that_differ_are_named():
    tables = arms(TRUTH)
    tables = {n: t.assign(tokenizer=n, params_kind="total") for n, t in tables.items()}
    result = compare(tables, [1e19], law="chinchilla", bootstrap=20)
    assert "mixed-evals" in codes(result)
    assert "mixed-N-kinds" not in codes(result)


# ------------------------------------------------------------------------------------------------ the result


def test_three_arms_text_file_and_figures(tmp_path):
    tables = arms(twice_as_good()) | {"third": arms(crosses(), seed=7)["new"]}
    result = compare(tables, law="chinchilla", bootstrap=100)
    assert result.reference == "base"
    assert result.arms == ["new", "third"]
    assert len(result.table()) == 26
    assert len(result.table(arm="third")) == 13
    assert set(result.curves["arm"]) == {"base", "new", "third"}
    text = result.summary()
    assert "third: compute needed" in text
    assert "crossing at C" in text
    assert "outside the data" in text
    again = laws.load(result.save(tmp_path / "comparison.json"))
    assert isinstance(again, Comparison)
    pd.testing.assert_frame_equal(again.contrasts, result.contrasts)
    pd.testing.assert_frame_equal(again.curves, result.curves)
    pd.testing.assert_frame_equal(again.crossings, result.crossings)
    assert again.summary() == text
    assert text in again._repr_html_().replace("&#x27;", "'").replace("&gt;", ">").replace("&lt;", "<")
    for draw in (result.plot.multiplier, result.plot.difference):
        ax = draw()
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["new", "third"]
        lines = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 13]
        assert len(lines) >= 2
        assert ax.get_xscale() == "log"
        assert draw(ax) is ax


def test_bad_input():
    tables = arms(TRUTH)
    fit = laws.fit("chinchilla", tables["base"], bootstrap=0)
    cases = [
        ({"arms": {"base": fit}}, "arms"),
        ({"arms": tables}, "arm base"),
        ({"arms": tables, "law": "chinchilla", "pair": "nothing"}, "pair"),
        ({"arms": tables, "law": "chinchilla", "pair": "loss"}, "pair"),
        ({"arms": {"a": fit, "b": ("chinchilla", TRUTH)}, "pair": "params"}, "pair"),
        ({"arms": {"a": fit, "b": ("chinchilla", "nobody")}}, "arm b"),
        ({"arms": {"a": fit, "b": ("chinchilla", {"E": 1.0})}}, "arm b"),
        ({"arms": {"a": ("chinchilla", TRUTH), "b": ("chinchilla", TRUTH)}}, "C"),
        ({"arms": {"a": fit, "b": fit}, "C": [-1.0]}, "C"),
        ({"arms": {"a": fit, "b": fit}, "level": 95}, "level"),
        ({"arms": {"a": fit, "b": fit}, "cost": {"a": 6.0}}, "cost"),
    ]
    for arguments, field in cases:
        with pytest.raises(BadInput) as error:
            compare(**{"bootstrap": 10, **arguments})
        assert error.value.field == field
    result = compare({"a": fit, "b": fit}, [1e19])
    for arguments, field in (({"at": "money"}, "at"), ({"arm": "c"}, "arm")):
        with pytest.raises(BadInput) as error:
            result.table(**arguments)
        assert error.value.field == field
