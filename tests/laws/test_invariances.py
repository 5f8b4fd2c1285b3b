"""Property-based: what a fit must not depend on, for several forms, objectives and random sweeps."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalelab import laws

FORMS = {
    "chinchilla": (laws.Chinchilla(), "log"),
    "power in C": (
        laws.define(
            "power in C", lambda p, x: p.E + p.K * x.flops**-p.gamma, inputs=("flops",),
            E=laws.positive(0.01, 10, linear=True), K=laws.positive(1, 1e6, linear=True), gamma=laws.free(0.02, 0.8),
        ), "log",
    ),
    "product": (
        laws.define(
            "product", lambda p, x: p.A * x.params**-p.alpha * x.tokens**-p.beta, inputs=("params", "tokens"),
            objective="log-squares",
            A=laws.positive(1, 1e4, linear=True), alpha=laws.free(0.01, 1), beta=laws.free(0.01, 1),
        ), "log",
    ),
    "size on values": (
        laws.define(
            "size", lambda p, x: p.E + p.A * x.params**-p.alpha, inputs=("params",), objective="squares",
            E=laws.positive(0.01, 10, linear=True), A=laws.positive(1, 1e6, linear=True), alpha=laws.free(0.05, 1),
        ), "value",
    ),
}  # fmt: skip
TRUTH = {
    "chinchilla": (1.7, 400.0, 1200.0, 0.34, 0.37),
    "power in C": (1.7, 3000.0, 0.18),
    "product": (40.0, 0.06, 0.09),
    "size on values": (1.9, 500.0, 0.3),
}


def table(name, seed, noise=0.004):
    """A random sweep of 30 runs of the form itself."""
    rng = np.random.default_rng(seed)
    N, D = np.exp(rng.uniform(np.log(1e7), np.log(3e9), 30)), np.exp(rng.uniform(np.log(1e9), np.log(1e11), 30))
    frame = pd.DataFrame({"params": N, "tokens": D, "flops": 6 * N * D})
    law = FORMS[name][0]
    loss = law.evaluate(np.array([TRUTH[name]]), {r: frame[r].to_numpy() for r in law.inputs})[0]
    return frame.assign(loss=loss * np.exp(noise * rng.standard_normal(30)), seed=np.arange(30))


def fit(name, frame, **options):
    return FORMS[name][0].fit(frame, bootstrap=0, **options)


def same(a, b, where, rtol=1e-6):
    """Predictions agree: parameters in a flat valley may differ more than anything that they say."""
    np.testing.assert_allclose(a.predict(where), b.predict(where), rtol=rtol)


check = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds, shuffle=st.integers(0, 100))
def test_row_order(name, seed, shuffle):
    frame = table(name, seed)
    a, b = fit(name, frame), fit(name, frame.sample(frac=1, random_state=shuffle))
    same(a, b, frame)
    np.testing.assert_allclose(a.params, b.params, rtol=1e-4)
    assert a.record["data_sha256"] == b.record["data_sha256"]


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds, factor=st.floats(1e-6, 1e6))
def test_sum_or_mean(name, seed, factor):
    """Any factor on all weights: the same optimum, and an objective that much larger."""
    frame = table(name, seed)
    a, b = fit(name, frame), fit(name, frame, weights=np.full(30, factor))
    same(a, b, frame)
    np.testing.assert_allclose(b.record["value"], factor * a.record["value"], rtol=1e-7)


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds, units=st.tuples(*[st.floats(-3, 3)] * 2))
def test_units_of_the_inputs(name, seed, units):
    """N in millions, D in billions, ...: exponents and predictions stay, coefficients take the factor."""
    frame = table(name, seed)
    n, d = 10.0 ** np.array(units)
    other = frame.assign(params=frame.params * n, tokens=frame.tokens * d, flops=frame.flops * n * d)
    a, b = fit(name, frame), fit(name, other)
    np.testing.assert_allclose(b.fittedvalues, a.fittedvalues, rtol=1e-6)
    np.testing.assert_allclose(b.record["value"], a.record["value"], rtol=1e-6)
    for exponent in {"alpha", "beta", "gamma"} & set(a.names):
        assert b.params[exponent] == pytest.approx(a.params[exponent], rel=1e-4)


@pytest.mark.parametrize("name", [n for n, (_, on) in FORMS.items() if on == "log"])
@check
@given(seed=seeds, unit=st.floats(0.2, 5))
def test_units_of_the_loss(name, seed, unit):
    """Nats, bits: residuals of logarithms do not see them."""
    frame = table(name, seed)
    a, b = fit(name, frame), fit(name, frame.assign(loss=frame.loss * unit))
    np.testing.assert_allclose(b.fittedvalues, unit * a.fittedvalues, rtol=1e-6)


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds, counts=st.lists(st.integers(1, 3), min_size=30, max_size=30))
def test_weights_equal_repetition(name, seed, counts):
    frame = table(name, seed)
    repeated = frame.loc[np.repeat(frame.index, counts)].assign(seed=lambda t: np.arange(len(t)))
    a, b = fit(name, frame, weights=np.array(counts, float)), fit(name, repeated)
    same(a, b, frame)
    np.testing.assert_allclose(b.record["value"], a.record["value"], rtol=1e-7)


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds, row=st.integers(0, 29))
def test_leaving_a_row_out_is_giving_it_no_weight(name, seed, row):
    frame = table(name, seed)
    left = fit(name, frame).leave_one_out().iloc[row]
    alone = fit(name, frame.drop(row))
    predicted = FORMS[name][0].predict(left.to_dict(), frame)
    np.testing.assert_allclose(predicted, alone.predict(frame), rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
@check
@given(seed=seeds)
def test_more_freedom_never_fits_worse(name, seed):
    """Every parameter held at its truth, one at a time: the objective of the free fit is no higher."""
    frame = table(name, seed)
    best = fit(name, frame).record["value"]
    for parameter, value in zip(FORMS[name][0].parameters, TRUTH[name], strict=True):
        assert best <= fit(name, frame, fixed={parameter: value}).record["value"] * (1 + 1e-9)
