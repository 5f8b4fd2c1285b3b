"""The thirteen bad inputs on which most fitters return numbers without a word: none is silent here."""

import numpy as np
import pandas as pd
import pytest
from planted import law

from scalelab import laws
from scalelab.errors import BadInput


def table():
    """25 runs on a grid, named r0 to r24, with no columns but the law's."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(25))
    return pd.DataFrame({"N": N, "D": D, "L": law(N, D) * noise}, index=[f"r{i}" for i in range(25)])


COLUMNS = {"params": "N", "tokens": "D", "loss": "L"}


def fit(frame, **options):
    return laws.fit("chinchilla", frame, columns=COLUMNS, **({"bootstrap": 20} | options))


def with_value(row, column, value):
    frame = table()
    frame.loc[row, column] = value
    return frame


def four(frame):
    return frame.iloc[[0, 7, 13, 24]]


def five(frame):
    return frame.iloc[[0, 4, 8, 11, 20]]


# case -> (table, what the one line of the error must say)
REFUSED = {
    "one NaN loss": (lambda: with_value("r7", "L", np.nan), r"column L.*nonfinite in row r7"),
    "one infinite loss": (lambda: with_value("r7", "L", np.inf), r"column L.*nonfinite in row r7"),
    "one negative loss": (lambda: with_value("r7", "L", -1.0), r"column L.*nonpositive in row r7"),
    "one D of zero": (lambda: with_value("r7", "D", 0.0), r"column D.*nonpositive in row r7"),
    "4 rows, 5 parameters": (lambda: four(table()), r"4 rows.*5 parameters"),
    "an empty table": (lambda: table().iloc[:0], r"nothing to fit"),
    "lengths that differ": (lambda: {"N": [1e8] * 9, "D": [1e9] * 8, "L": [3.0] * 9}, r"'D': 8.*one length"),
}
# case -> (table, code, severity, what the finding must name)
TOLD = {
    "5 rows": (lambda: five(table()), "too-few-rows", "error", "5 rows"),
    "5 rows 48 times": (lambda: pd.concat([five(table())] * 48), "too-few-rows", "error", "5 rows"),
    "every row twice": (lambda: pd.concat([table()] * 2), "duplicate-rows", "warning", "r0, r1"),
    "constant N": (lambda: table().assign(N=1e8, L=lambda t: law(t.N, t.D)), "constant-predictor", "error", "N varies"),
    "D = 20 N": (
        lambda: table().assign(N=np.geomspace(1e7, 1e9, 25), D=lambda t: 20 * t.N, L=lambda t: law(t.N, t.D)),
        "collinear-ND", "error", "ln N and ln D",
    ),
    "one diverged run": (lambda: with_value("r12", "L", 50.0), "diverged-run", "warning", "r12"),
}  # fmt: skip


def test_there_are_thirteen():
    assert len(REFUSED) + len(TOLD) == 13


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_that_names_rows_and_columns(case):
    make, says = REFUSED[case]
    with pytest.raises(BadInput, match=says) as caught:
        fit(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", TOLD)
def test_fitted_with_a_finding_that_names_them(case):
    make, code, severity, names = TOLD[case]
    found = fit(make())
    (notice,) = [n for n in found.warnings if n.code == code]
    assert notice.severity == severity
    assert names in notice.message
    assert notice.remedy
    assert notice.numbers
    if severity == "error":
        assert not found.ok
        assert found.conf_int().isna().all().all()
        assert found.conf_int(method="profile").isna().all().all()


@pytest.mark.parametrize("row", range(25))
def test_one_diverged_run_moves_the_floor_by_less_than_a_hundredth(row):
    """Against the fit without that run, wherever it lies: with 25 runs a corner that says nothing moves E by 0.009
    by itself, and a robust fit cannot know what it would have said. In the middle against the clean fit too."""
    bad = fit(with_value(f"r{row}", "L", 50.0), bootstrap=0)
    assert abs(bad.params.E - fit(table().drop(f"r{row}"), bootstrap=0).params.E) < 0.01
    if row == 12:
        assert abs(bad.params.E - fit(table(), bootstrap=0).params.E) < 0.01
    (notice,) = [n for n in bad.warnings if n.code == "diverged-run"]
    assert notice.numbers["rows"] == [f"r{row}"]
    assert notice.numbers["params_without"]["E"] == pytest.approx(bad.params.E, abs=0.01)


@pytest.mark.parametrize("case", ["one NaN loss", "one infinite loss", "one negative loss", "one D of zero"])
def test_dropped_where_asked_and_said(case):
    found = fit(REFUSED[case][0](), drop=True)
    notice = next(n for n in found.warnings if n.code in ("nonfinite-row", "nonpositive-row"))
    assert notice.numbers["rows"] == ["r7"]
    assert found.nobs == 24


@pytest.mark.parametrize("objective", ["squares", "log-squares", "student"])
def test_a_diverged_run_is_named_under_every_objective(objective):
    found = fit(with_value("r12", "L", 50.0), bootstrap=0, objective=objective)
    assert "diverged-run" in [n.code for n in found.warnings]
