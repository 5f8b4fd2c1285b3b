"""Next runs and the power of studies: widths against a direct simulation, designs, config files."""

import importlib

import numpy as np
import pandas as pd
import pytest
from planted import TRUTH, best_size, sweep

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.plan import plan, v_optimal
from scalelab.laws.power import detectable
from scalelab.laws.simulate import simulate

planning = importlib.import_module("scalelab.laws.plan")  # `laws.plan` is the function

BUDGETS = np.geomspace(1e18, 1e20, 4)


@pytest.fixture(scope="module")
def fit():
    return laws.fit("chinchilla", sweep(BUDGETS, 4, 0.004, 1), bootstrap=200)


@pytest.fixture(scope="module")
def planned(fit):
    return plan(fit, 3e20, 1e22, n=200)


def test_the_table_says_what_to_expect(planned):
    table = planned.table
    assert {"compute-optimal", "no new runs", "ladder of 2", "isoflop of 6", "V-optimal of 4"} <= set(table.index)
    assert table["loss_width"].is_monotonic_increasing
    assert table.loc["compute-optimal", "relative"] == 1.0
    assert table.loc["compute-optimal", "relative_mc"] == 0.0
    spent = table.drop(index="no new runs")["flops"]
    np.testing.assert_allclose(spent, 3e20, rtol=1e-9)
    assert table.loc["no new runs", "loss_width"] > table["loss_width"].min()
    assert (table["size_factor"] > 1).all()
    assert (table["loss_width_mc"] < 0.25 * table["loss_width"]).all()
    text = planned.summary()
    assert f"recommended: {planned.recommended}" in text
    assert "±" in text
    assert "far-extrapolation" in {n.code for n in planned.warnings}


def test_the_plain_choice_is_the_laws_optimum(planned, fit):
    (run,) = planned.runs("compute-optimal")
    best = fit.optimal(3e20)
    assert run["params"] == pytest.approx(best["params"])
    assert run["tokens"] == pytest.approx(best["tokens"])


def test_every_design_stays_within_its_budget_and_the_laws_range(planned, fit):
    seen = fit.rows.columns["tokens"] / fit.rows.columns["params"]
    for name in ("V-optimal of 1", "V-optimal of 4"):
        design = planned.designs[name]
        assert design["flops"].sum() == pytest.approx(3e20)
        ratio = design["tokens"] / design["params"]
        assert (ratio >= seen.min() / 2).all()
        assert (ratio <= seen.max() * 2).all()


def test_widths_agree_with_fits_made_one_by_one(fit):
    """The same study without its machinery: simulated tables, fitted by `laws.fit`."""
    design = {"params": [1e9, 2e9, 4e9], "tokens": [4e10, 2e10, 1e10]}
    scored = plan(fit, 2.4e20 * 2, 1e22, candidates={"mine": design}, n=200).table.loc["mine"]
    rng = np.random.default_rng(1)
    errors = []
    old = pd.DataFrame({role: fit.rows.columns[role] for role in ("params", "tokens")})
    both = pd.concat([old, pd.DataFrame(design)], ignore_index=True)
    for draw in fit.samples[:100]:
        truth = dict(zip(TRUTH, draw, strict=True))
        noise = planning.residual_noise(fit, (len(both),), rng)
        table = simulate("chinchilla", both, 0.0, params=truth)
        again = laws.fit("chinchilla", table.assign(loss=table["loss"] * np.exp(noise)), bootstrap=0, starts=2)
        at = [fit.law.optimum(p[None], np.array([1e22]), 6.0)[2][0, 0] for p in (again.estimate, draw)]
        errors.append(at[0] - at[1])
    width = np.subtract(*np.quantile(errors, [0.975, 0.025]))
    assert scored["loss_width"] == pytest.approx(width, rel=0.3)


def test_more_runs_help_and_better_placed_runs_help_more(fit):
    N = best_size(1e21)
    one = {"params": [N], "tokens": [1e21 / (6 * N)]}
    four = {name: values * 4 for name, values in one.items()}
    small = {"params": [1e7] * 4, "tokens": [2e8] * 4}
    table = plan(fit, 1e21, 1e22, candidates={"one": one, "four": four, "small": small}, n=200).table
    assert table.loc["four", "loss_width"] < table.loc["one", "loss_width"] < table.loc["no new runs", "loss_width"]
    assert table.loc["one", "loss_width"] < table.loc["small", "loss_width"]
    assert table.loc["one", "relative"] == pytest.approx(1, abs=0.1)


def test_a_plan_is_a_function_of_its_seed(fit):
    first, again, other = (plan(fit, 3e20, 1e22, n=100, seed=s).table for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_v_optimality_reduces_the_linearised_variance():
    """Where the law is linear the variance is a closed form: the chosen run is the best of the grid."""
    exact = laws.fit("chinchilla", sweep(BUDGETS, 4, 0.002, 1), objective="log-squares", bootstrap=0)
    target, budget = 1e22, 1e21
    chosen = v_optimal(exact, budget, target, 1)
    grid = planning._runs(
        planning._best_size(exact, np.array([budget]), 6.0, {}) * planning.RATIOS, np.array(budget), 6.0
    )

    def variance(N, D):
        names = list(TRUTH)
        columns = {
            "params": np.append(exact.rows.columns["params"], N),
            "tokens": np.append(exact.rows.columns["tokens"], D),
        }
        slopes, g = [], []
        for i in range(5):
            step = np.zeros(5)
            step[i] = 1e-5 * exact.params[names[i]]
            ends = [exact.estimate + s * step for s in (1, -1)]
            values = [np.log(exact.law.evaluate(e[None], columns)[0]) for e in ends]
            slopes.append((values[0] - values[1]) / (2 * step[i]))
            best = [exact.law.optimum(e[None], np.array([target]), 6.0)[2][0, 0] for e in ends]
            g.append((best[0] - best[1]) / (2 * step[i]))
        J, g = np.array(slopes).T, np.array(g)
        scale = np.abs(exact.estimate)
        return (g * scale) @ np.linalg.solve((J * scale).T @ (J * scale), g * scale)

    seen = exact.rows.columns["tokens"] / exact.rows.columns["params"]
    allowed = [
        (r.params, r.tokens) for r in grid.itertuples() if seen.min() / 2 <= r.tokens / r.params <= 2 * seen.max()
    ]
    scores = [variance(*run) for run in allowed]
    assert chosen["params"][0] == pytest.approx(allowed[int(np.argmin(scores))][0])


def test_fixed_and_tied_parameters_stay_so():
    tied = laws.fit("chinchilla", sweep(BUDGETS, 4, 0.004, 1), fixed={"E": 1.7}, tied={"beta": "alpha"}, bootstrap=100)
    loose = laws.fit("chinchilla", sweep(BUDGETS, 4, 0.004, 1), bootstrap=100)
    widths = [plan(f, 3e20, 1e22, n=100).table.loc["compute-optimal", "loss_width"] for f in (tied, loose)]
    assert widths[0] < 0.7 * widths[1]


def test_another_law_and_another_cost(fit):
    mine = laws.define(
        "mine", lambda p, x: p.E + p.A * x.params**-p.alpha + p.B * x.tokens**-p.alpha, inputs=("params", "tokens"),
        E=laws.positive(0.1, 10, linear=True), A=laws.positive(1, 1e5, linear=True),
        B=laws.positive(1, 1e5, linear=True), alpha=laws.free(0.05, 1.5),
    )  # fmt: skip
    own = laws.fit(mine, sweep(BUDGETS, 4, 0.004, 1), bootstrap=60)
    result = plan(own, 3e20, 1e21, n=60, cost=lambda N: 8.0 * N)
    for design in result.designs.values():
        np.testing.assert_allclose(design["flops"], 8 * design["params"] * design["tokens"])
    assert result.table["loss_width"].gt(0).all()


def test_the_config_of_a_plan_can_be_planned(tmp_path):
    """Small runs, for which the file's own sweep is expanded as `scalelab plan` does."""
    from scalelab import sweep as sweeps

    table = sweep((1e13, 1e14, 1e15), 5, 0.003, 2)
    small = laws.fit("chinchilla", table, bootstrap=100)
    result = plan(small, 4e14, 1e16, n=100)
    result.fit.rows.columns["family"] = np.full(len(table), "gla")
    assert "FAMILY = 'gla'" in result.to_config(tmp_path / "own.py").read_text()
    del result.fit.rows.columns["family"]
    path = result.to_config(tmp_path / "next_runs.py", "ladder of 2")
    expanded = sweeps.expand(str(path), {})
    wanted = result.runs("ladder of 2")
    assert len(expanded.runs) == len(wanted) == 2
    assert not expanded.dropped
    for run, want in zip(expanded.runs, wanted, strict=True):
        assert run.tokens == pytest.approx(want["tokens"], rel=0.01)
        assert run.params_non_embedding == pytest.approx(
            0.8 * want["params"], rel=0.35
        )  # the recipe's widths are steps
    recurrent = sweeps.expand(str(result.to_config(tmp_path / "mamba2.py", "ladder of 2", "mamba2")), {})
    assert {run.spec.config.family for run in recurrent.runs} == {"mamba2"}
    with pytest.raises(BadInput, match="has no runs"):
        result.to_config(tmp_path / "none.py", "no new runs")
    with pytest.raises(BadInput, match="must be one of"):
        result.runs("best")


def test_bad_plans(fit):
    cases = [
        ({"budget": 0.0}, "budget"),
        ({"target": np.nan}, "target"),
        ({"n": 10}, "n"),
        ({"candidates": {"a": {"params": [1e9]}}}, "candidates[a]"),
        ({"candidates": {"a": {"params": [1e9], "tokens": [-1.0]}}}, "candidates[a]"),
    ]
    for changes, field in cases:
        with pytest.raises(BadInput) as error:
            plan(fit, **{"budget": 1e20, "target": 1e21, **changes})
        assert error.value.field == field
    with pytest.raises(BadInput, match="50 bootstrap draws"):
        plan(laws.fit("chinchilla", sweep(BUDGETS, 4, 0.004, 1), bootstrap=0), 1e20, 1e21)
    power = laws.define(
        "p", lambda p, x: p.K * x.flops**-p.g, inputs=("flops",), K=laws.positive(1, 9e4), g=laws.free(0.01, 1)
    )
    of_compute = laws.fit(power, sweep(BUDGETS, 4, 0.004, 1), bootstrap=60)
    with pytest.raises(BadInput, match="no allocation"):
        plan(of_compute, 1e20, 1e21)


# ------------------------------------------------------------------------------------------------ power


def test_detectable_differences(fit):
    table = detectable(fit, 1e21, (1, 4, 16))
    np.testing.assert_allclose(table["by_laws"], table["by_laws"].iloc[0] / np.array([1, 2, 4]))
    draws = fit.law.optimum(fit.samples, np.array([1e21]), 6.0)[2][:, 0]
    spread = np.subtract(*np.quantile(draws, [0.975, 0.025])) / 3.92
    assert table["by_laws"].iloc[0] == pytest.approx(2.8016 * np.sqrt(2) * spread, rel=1e-3)
    sigma = np.sqrt((fit.resid**2).sum() / (16 - 5)) * fit.optimal(1e21)["loss"]
    assert table["by_runs"].iloc[0] == pytest.approx(2.8016 * np.sqrt(2) * sigma, rel=1e-3)
    assert table.loc[4, "flops_by_runs"] == 8e21
    paired = detectable(fit, 1e21, 1, shared=0.75)
    assert paired["by_laws"].iloc[0] == pytest.approx(table["by_laws"].iloc[0] / 2)
    wanted = table["by_laws"].iloc[0] / 2.2
    needed = detectable(fit, 1e21, 1, difference=wanted)
    least = needed.index[needed["found_by"].str.contains("laws")].min()
    assert least == 5  # 2.2 squared is 4.84
    assert needed.loc[least, "by_laws"] <= wanted


def test_bad_studies(fit):
    for changes, field in (
        ({"seeds": 0}, "seeds"), ({"C": -1.0}, "C"), ({"difference": 0.0}, "difference"),
        ({"power": 1.0}, "power, level, shared"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as error:
            detectable(fit, **{"C": 1e21, **changes})
        assert error.value.field == field


@pytest.mark.slow
def test_the_detectable_difference_is_found_as_often_as_promised():
    """60 pairs of arms that differ by it: about 80 % of comparisons end in a verdict."""
    from scalelab.laws.compare import compare

    design = sweep(np.geomspace(1e18, 1e20, 5), 5)
    pilot = laws.fit(
        "chinchilla", simulate("chinchilla", design, 0.004, 99, params=TRUTH), objective="log-squares", bootstrap=300
    )
    gap = detectable(pilot, 3e19, 1)["by_laws"].iloc[0]
    found = 0
    for seed in range(60):
        tables = {
            name: simulate("chinchilla", design, 0.004, 2 * seed + k, params={**TRUTH, "E": TRUTH["E"] - k * gap})
            for k, name in enumerate(("base", "new"))
        }
        result = compare(tables, [3e19], law="chinchilla", objective="log-squares", bootstrap=200, seed=seed)
        found += result.table()["verdict"][0] == "new"
    assert 0.65 <= found / 60 <= 0.95
