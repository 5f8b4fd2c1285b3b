"""The ladder: both steps, their composition, and how their errors come together."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import Ladder, LossToAccuracy, TaskLoss

LOSS = {"E": 0.5, "A": 80.0, "B": 300.0, "alpha": 0.3, "beta": 0.33}
ACCURACY = {"a": -0.55, "k": 5.0, "L0": 1.0, "b": 0.82}
TRUTH = LOSS | ACCURACY
TARGET = {"params": [7e9], "tokens": [4e12]}


def runs(noise=0.0, seed=0, steps=(True, True)):
    """24 runs; noise in the first or the second step, or both."""
    rng = np.random.default_rng(seed)
    N, M = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 3e9, 6), [10.0, 40.0, 160.0, 640.0]))
    table = pd.DataFrame({"params": N, "tokens": N * M})
    scatter = noise * rng.standard_normal((2, len(table))) * np.array(steps)[:, None]
    table["task_loss"] = TaskLoss().predict(LOSS, table) * np.exp(scatter[0])
    table["accuracy"] = LossToAccuracy().predict(ACCURACY, table) * np.exp(scatter[1])
    return table


def test_planted_truth():
    fit = laws.fit("ladder", runs(), bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(TRUTH), rtol=1e-5)
    truth = Ladder().predict(TRUTH, TARGET)
    np.testing.assert_allclose(fit.predict(TARGET), truth, rtol=1e-7)
    l = TaskLoss().predict(LOSS, TARGET).iloc[0]
    by_hand = ACCURACY["a"] / (1 + np.exp(-ACCURACY["k"] * (l - ACCURACY["L0"]))) + ACCURACY["b"]
    assert truth.iloc[0] == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_planted_truth_under_noise(seed):
    fit = laws.fit("ladder", runs(0.004, seed), bootstrap=200)
    interval, truth = fit.conf_int(0.999), pd.Series(TRUTH)
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    frame = fit.get_prediction(TARGET).summary_frame(0.999)
    assert frame.mean_ci_lower[0] < Ladder().predict(TRUTH, TARGET)[0] < frame.mean_ci_upper[0]


def test_it_is_its_two_steps():
    table = runs(0.004)
    fit = laws.fit("ladder", table, bootstrap=50)
    first, second = laws.fit("task-loss", table, bootstrap=0), laws.fit("loss-to-accuracy", table, bootstrap=0)
    np.testing.assert_allclose(fit.params, [*first.params, *second.params], rtol=1e-6)
    through = second.predict({"task_loss": first.predict(TARGET)})
    np.testing.assert_allclose(fit.predict(TARGET), through, rtol=1e-6)
    np.testing.assert_array_equal(fit.samples, np.hstack([step.samples for step in fit.steps]))


def test_errors_of_both_steps_reach_the_accuracy():
    def spread(steps):
        return (
            laws.fit("ladder", runs(0.006, 3, steps), bootstrap=200).get_prediction(TARGET).summary_frame().mean_se[0]
        )

    both, first, second = spread((True, True)), spread((True, False)), spread((False, True))
    assert min(first, second) > 1e-4
    assert both > 0.8 * max(first, second)


def test_both_steps_see_the_same_resampled_runs():
    """Draws without the one wrong run give the truth in both steps, the others in neither."""
    table = runs()
    table.loc[5, ["task_loss", "accuracy"]] *= [1.02, 1.03]
    fit = laws.fit("ladder", table, bootstrap=200, objective="log-squares")
    far = np.abs(fit.draws / pd.Series(TRUTH) - 1) > 1e-5
    first, second = (far[list(names)].any(axis=1) for names in (LOSS, ACCURACY))
    assert 90 < first.sum() < 160  # a run is in 64 % of the draws
    assert (first == second).all()


def test_the_highest_accuracy_is_at_the_lowest_task_loss():
    fit = laws.fit("ladder", runs(0.002), bootstrap=50)
    at = fit.optimal(1e22)
    step = fit.steps[0].optimal(1e22)
    assert at.params == pytest.approx(step.params)
    assert "task_loss" in step.index
    N = at.params * np.array([0.5, 1.0, 2.0])
    accuracy = fit.predict({"params": N, "tokens": 1e22 / (6 * N)})
    assert accuracy[1] == pytest.approx(at.accuracy, rel=1e-9)
    assert accuracy[1] > max(accuracy[0], accuracy[2])
    assert at.accuracy_lower < at.accuracy < at.accuracy_upper


def test_hold_out_save_and_findings(tmp_path):
    table = (
        runs(0.004)
        .assign(run=[f"r{i // 2}" for i in range(24)])
        .rename(columns={"task_loss": "bpb", "accuracy": "acc"})
    )
    fit = laws.fit("ladder", table, bootstrap=60, columns={"task_loss": "bpb", "accuracy": "acc"})
    assert "clusters (run)" in fit.record["bootstrap"]
    held = fit.holdout()
    assert held.ok
    assert held.error < held.errors.mean_abs["nearest run"]
    again = laws.load(fit.save(tmp_path / "ladder.json"))
    assert again.summary() == fit.summary()
    np.testing.assert_array_equal(again.samples, fit.samples)
    np.testing.assert_array_equal(again.predict(TARGET), fit.predict(TARGET))
    flat = table.assign(acc=0.25 + 1e-4 * np.arange(24) / 24)  # at chance everywhere: no sigmoid to see
    fit = laws.fit("ladder", flat, columns={"task_loss": "bpb", "accuracy": "acc"}, bootstrap=0)
    assert not fit.ok
    assert any(n.message.startswith("step 2 (accuracy)") for n in fit.warnings)
    assert fit.steps[0].ok


def test_fixed_parameters_and_refusals():
    table = runs(0.004)
    fit = laws.fit("ladder", table, fixed={"b": 0.82, "E": 0.5}, tied={"beta": "alpha"}, bootstrap=0)
    np.testing.assert_allclose(fit.params[["b", "E"]], [0.82, 0.5], rtol=1e-12)
    assert fit.params.alpha == pytest.approx(fit.params.beta)
    with pytest.raises(BadInput, match="gamma"):
        laws.fit("ladder", table, fixed={"gamma": 1.0})
    with pytest.raises(BadInput, match="delta"):
        laws.fit("ladder", table, delta="auto")
    with pytest.raises(BadInput, match="task_loss"):
        laws.fit("ladder", table.drop(columns="task_loss"))


def test_limits_of_the_sigmoid():
    low, high = LossToAccuracy().predict(ACCURACY, {"task_loss": [1e-9, 1e6]})
    assert high == pytest.approx(ACCURACY["a"] + ACCURACY["b"])
    assert low == pytest.approx(ACCURACY["b"] + ACCURACY["a"] / (1 + np.exp(ACCURACY["k"] * ACCURACY["L0"])))
