"""The analysis of the learning-rate transfer sweep."""

import pathlib
import runpy

import numpy as np
import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_best_learning_rate_of_planted_parabolas():
    """Exactly where the vertex was planted; with scatter inside the interval; none where the best is at an end."""
    module = runpy.run_path(str(ROOT / "analysis" / "lr_transfer.py"))
    x = np.arange(-9.0, -3.0)
    loss = np.exp(0.9 + 0.01 * (x + 6.3) ** 2)
    assert module["optimum"](2**x, loss) == pytest.approx((-6.3,) * 3, abs=1e-5)
    noisy = loss * np.exp(0.001 * np.array([1, -1, 1, 1, -1, 1]))
    vertex, low, high = module["optimum"](2**x, noisy)
    assert low < -6.3 < high
    assert low < vertex < high < low + 3
    assert module["optimum"](2**x, np.exp(x)) is None
    three = [
        np.concatenate(parts)
        for parts in zip(*((2**x, loss * (1 + 0.1 * s), 0 * x + s) for s in range(3)), strict=True)
    ]
    assert module["optimum"](*three) == pytest.approx((-6.3,) * 3, abs=1e-5)  # a seed's own height is no scatter
    rows = [{"family": "f", "parametrization": kind, "width": width, "lr": 2**v, "loss": y, "seed": 0}
            for kind, width in (("standard", 32), ("standard", 64), ("mup", 64))
            for v, y in zip(x, loss, strict=True)]  # fmt: skip
    found = module["optima"](pd.DataFrame(rows))
    assert list(zip(found["parametrization"], found["width"], strict=True)) == [
        ("standard", 32), ("standard", 64), ("mup", 32), ("mup", 64)
    ]  # fmt: skip
    np.testing.assert_allclose(np.log2(found["lr"]), -6.3, atol=1e-5)
