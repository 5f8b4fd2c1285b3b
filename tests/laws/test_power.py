"""Laws in one column: planted truth, closed forms, breaks, limits, disk."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import BrokenPower, PowerFloor, PowerLaw

C = np.geomspace(1e17, 1e23, 40)
FLOOR = {"E": 1.7, "A": 900.0, "alpha": 0.15}
BROKEN = {"E": 0.5, "b": 50.0, "c0": 0.05, "c1": 0.12, "d1": 1e20, "f1": 0.5}


def planted(law, params, x=C, noise=0.0, seed=0):
    (column,) = law.inputs
    table = pd.DataFrame({column: x})
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))
    return table.assign(loss=law.predict(params, table) * scatter)


def test_power_law_is_the_line_in_logs():
    """The closed form of least squares in logs, noise and all."""
    table = planted(PowerLaw(), {"A": 30.0, "alpha": 0.05}, noise=0.01)
    fit = laws.fit("power", table, bootstrap=200)
    slope, intercept = np.polyfit(np.log(C), np.log(table.loss), 1)
    np.testing.assert_allclose(fit.params, [np.exp(intercept), -slope], rtol=1e-9)
    interval = fit.conf_int(0.999)
    assert interval.lower.alpha < 0.05 < interval.upper.alpha
    assert fit.ok


@pytest.mark.parametrize("alpha", [-0.3, 0.05, 0.9])
def test_power_law_of_any_column(alpha):
    table = planted(PowerLaw("tokens"), {"A": 30.0, "alpha": alpha}, np.geomspace(1e8, 1e11, 9))
    fit = PowerLaw("tokens").fit(table, bootstrap=0)
    np.testing.assert_allclose(fit.params, [30, alpha], rtol=1e-8)
    assert "D^alpha" in fit.summary()


@pytest.mark.parametrize("objective", ["huber", "squares", "log-squares"])
def test_floor_recovers_planted_truth(objective):
    fit = laws.fit("power-floor", planted(PowerFloor(), FLOOR), objective=objective, bootstrap=0)
    np.testing.assert_allclose(fit.params, list(FLOOR.values()), rtol=1e-6)
    assert fit.ok


def test_floor_under_noise():
    fit = laws.fit("power-floor", planted(PowerFloor(), FLOOR, noise=0.003), bootstrap=300)
    interval = fit.conf_int(0.999)
    for name, value in FLOOR.items():
        assert interval.lower[name] <= value <= interval.upper[name]


def test_without_a_floor_the_floor_law_finds_none():
    fit = laws.fit("power-floor", planted(PowerLaw(), {"A": 30.0, "alpha": 0.05}), bootstrap=0)
    assert fit.params.E < 1e-3
    assert "E-below-zero" in {n.code for n in fit.warnings}
    np.testing.assert_allclose(fit.params[["A", "alpha"]], [30, 0.05], rtol=1e-2)


def test_units_do_not_matter():
    table = planted(PowerFloor(), FLOOR, noise=0.003)
    fit = laws.fit("power-floor", table, bootstrap=0)
    peta = laws.fit("power-floor", table.assign(flops=table.flops / 1e15), bootstrap=0)
    np.testing.assert_allclose(peta.params[["E", "alpha"]], fit.params[["E", "alpha"]], rtol=1e-7)
    np.testing.assert_allclose(peta.params.A * 1e15**peta.params.alpha, fit.params.A, rtol=1e-6)


def test_one_break_recovered():
    fit = laws.fit("broken-power", planted(BrokenPower(), BROKEN), bootstrap=0)
    np.testing.assert_allclose(fit.params, list(BROKEN.values()), rtol=1e-5)
    assert fit.record["agreement"] >= 0.5


def test_two_breaks_recovered_and_loaded(tmp_path):
    truth = BROKEN | {"d1": 1e19, "c2": -0.1, "d2": 3e21, "f2": 0.3}
    law = BrokenPower(2)
    assert list(law.parameters) == ["E", "b", "c0", "c1", "d1", "f1", "c2", "d2", "f2"]
    table = planted(law, truth, np.geomspace(1e16, 1e24, 80))
    fit = law.fit(table, bootstrap=0)
    np.testing.assert_allclose(fit.params, [truth[name] for name in law.parameters], rtol=1e-5)
    assert fit.ok
    loaded = laws.load(fit.save(tmp_path / "fit.json"))
    assert loaded.law.breaks == 2
    assert (loaded.predict(table) == fit.predict(table)).all()


def test_break_under_noise():
    table = planted(BrokenPower(), BROKEN, np.geomspace(1e16, 1e24, 60), noise=0.002)
    fit = laws.fit("broken-power", table, bootstrap=100)
    interval = fit.conf_int(0.999)
    for name in ("c0", "c1", "d1"):
        assert interval.lower[name] <= BROKEN[name] <= interval.upper[name]
    assert table.flops.min() < fit.params.d1 < table.flops.max()


def test_slopes_of_a_broken_law_on_either_side():
    """-c0 far below the break, -(c0 + c1) far beyond it; without a change of slope it is a plain power law."""
    x = np.array([1e5, 1e6, 1e34, 1e35])
    loss = planted(BrokenPower(), BROKEN | {"E": 0.0}, x).loss.to_numpy()
    slope = np.diff(np.log(loss)) / np.diff(np.log(x))
    np.testing.assert_allclose(slope[[0, 2]], [-0.05, -0.17], rtol=1e-6)
    flat = planted(BrokenPower(), BROKEN | {"E": 0.0, "c1": 0.0}, C).loss
    np.testing.assert_allclose(flat, 50 * C**-0.05, rtol=1e-12)


def test_a_file_keeps_the_column(tmp_path):
    law = PowerFloor("params")
    table = planted(law, {"E": 1.7, "A": 400.0, "alpha": 0.34}, np.geomspace(1e7, 1e10, 12))
    fit = law.fit(table, bootstrap=20)
    loaded = laws.load(fit.save(tmp_path / "fit.json"))
    assert loaded.law.inputs == ("params",)
    assert loaded.law.equation == "L(N) = E + A / N^alpha"
    assert (loaded.predict(table) == fit.predict(table)).all()


@pytest.mark.parametrize("breaks", [0, 6, True, 1.0])
def test_breaks_must_be_a_small_number(breaks):
    with pytest.raises(BadInput, match="breaks"):
        BrokenPower(breaks)
