"""The benchmarks run and say what they measured; no test asserts a time."""

import re

import numpy as np
import pytest
from rich.table import Table

from scalelab import laws
from scalelab.bench import fit, step


def test_step_benchmark_pairs_the_loop_with_the_bare_step(capsys):
    assert step.main(pairs=3) == 0
    out = capsys.readouterr().out
    assert re.search(r"the loop runs at \d+\.\d% of the bare step's rate \(95 % interval .* median of 2 ", out), out


@pytest.mark.slow
def test_fit_benchmark_compares_with_scipy(capsys, monkeypatch, tmp_path):
    """On planted rows, said aloud; what it says of correctness must hold, whatever the times."""
    monkeypatch.setenv("SCALELAB_DATA", str(tmp_path))
    assert fit.main(repeats=1, starts=6, refits=6) == 0
    out = capsys.readouterr().out
    assert "PLANTED" in out
    assert "SKIPPED" in out  # Farseer's runs
    assert out.count("100.0% of 6") == 2
    for word in ("point fit", "1,000 refits", "in a fresh", "user-defined law", "peak memory", "own optimum"):
        assert word in out, word


def test_fit_benchmark_finds_every_refit_at_its_own_optimum():
    (table, _), _ = fit.chinchilla_rows()
    report, ticks = Table(*"abcde"), []
    fit.against_scipy(report, table, 1, 5, 5, False, ticks.append)
    labels, ours, theirs, ratios, _ = (list(column.cells) for column in report.columns)
    assert [label.split(": ")[1] for label in labels] == [
        "point fit, warm", "1,000 refits", "objective over the best known", "refits at their own optimum"
    ]  # fmt: skip
    assert float(ours[2]) <= 1e-9
    assert ours[3] == "100.0% of 5"
    assert theirs[3].endswith("%")
    assert "(" in ratios[0]
    assert ticks == [1]


def test_the_fields_objective_is_ours():
    (table, _), _ = fit.chinchilla_rows()
    field, ones = fit.Field(table), np.ones(len(table))
    theta = np.array([6.0, 7.0, 0.6, 0.35, 0.37])
    ours = fit.values(laws.fit("chinchilla", table, bootstrap=0), field.params(theta)[None], ones[None])
    np.testing.assert_allclose(field.value(theta), ours[0], rtol=1e-12)
    step = 1e-6 * np.eye(5)
    slope = [(field.value(theta + s) - field.value(theta - s)) / 2e-6 for s in step]
    np.testing.assert_allclose(field.gradient(theta, ones), slope, rtol=1e-5)
    assert len(fit.HOFFMANN) == 4500
