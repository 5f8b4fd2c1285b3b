"""Precision: golden values, planted truth, limits, optima."""

import types

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import FloatPrecision, PostTraining, Precision

BASE = {"E": 1.8, "A": 450.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36}
TRUTH = BASE | {"gamma_weights": 2.5, "gamma_activations": 2.0, "gamma_kv": 1.1}
POST = TRUTH | {"C_T": 0.02, "gamma_D": 0.6, "gamma_N": 0.55, "gamma_post": 0.8}
SUN = FloatPrecision.published["Sun 2025"]


def runs(law, truth, noise=0.0, seed=0, n=120):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "params": 10 ** rng.uniform(7.5, 9.5, n),
            "tokens": 10 ** rng.uniform(9, 11.5, n),
            "bits_weights": rng.choice([2.0, 3, 4, 6, 8, 16], n),
            "bits_activations": rng.choice([3.0, 4, 6, 8, 16], n),
            "bits_kv": rng.choice([2.0, 3, 4, 8, 16], n),
            "bits_post": rng.choice([3.0, 4, 5, 6, 8], n),
        }
    )
    return table.assign(loss=law.predict(truth, table) * np.exp(noise * rng.standard_normal(n)))


@pytest.mark.parametrize(("law", "truth"), [(Precision(), TRUTH), (PostTraining(), POST)])
def test_planted_truth(law, truth):
    fit = law.fit(runs(law, truth), bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(truth)[fit.params.index], rtol=1e-5)
    fit = law.fit(runs(law, truth, 0.003), bootstrap=120)
    interval, truth = fit.conf_int(0.999), pd.Series(truth)[fit.params.index]
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    assert fit.record["agreement"] >= 0.5


def test_only_what_varies_is_asked_for():
    law = Precision("weights")
    assert law.inputs == ("params", "tokens", "bits_weights")
    truth = BASE | {"gamma_weights": 2.5}
    table = runs(law, truth)[["params", "tokens", "bits_weights", "loss"]]
    np.testing.assert_allclose(law.fit(table, bootstrap=0).params, pd.Series(truth), rtol=1e-5)
    for parts in (("gradients",), ("kv", "kv")):
        with pytest.raises(BadInput, match="precision"):
            Precision(*parts)


def test_limits():
    table = pd.DataFrame({"params": [1e8, 1e9], "tokens": [1e10, 1e10]})
    bits = {f"bits_{x}": 60.0 for x in ("weights", "activations", "kv", "post")}
    plain = laws.Chinchilla().predict(BASE, table)
    np.testing.assert_allclose(Precision().predict(TRUTH, table.assign(**bits)), plain, rtol=1e-9)
    np.testing.assert_allclose(PostTraining().predict(POST, table.assign(**bits)), plain, rtol=1e-9)
    few = Precision().predict(TRUTH, table.assign(**bits | {"bits_weights": 2.0}))
    fewer_parameters = laws.Chinchilla().predict(BASE, table.assign(params=table.params * (1 - np.exp(-2 / 2.5))))
    np.testing.assert_allclose(few, fewer_parameters, rtol=1e-9)


def test_quantising_costs_more_after_longer_training():
    law, table = PostTraining(), pd.DataFrame({"params": 1e8, "tokens": np.geomspace(1e9, 1e14, 60)})
    at = {"bits_weights": 16.0, "bits_activations": 16.0, "bits_kv": 16.0}
    loss = law.predict(POST, table.assign(**at, bits_post=3.0))
    assert 0 < loss.argmin() < 59  # from some D on, more tokens raise the loss
    assert (np.diff(law.predict(POST, table.assign(**at, bits_post=40.0))) < 0).all()


def test_optimum_at_given_bits():
    law = Precision()
    fit = law.fit(runs(law, TRUTH, 0.001), bootstrap=30)
    bits = {"bits_weights": 4.0, "bits_activations": 6.0, "bits_kv": 8.0}
    closed = fit.optimal(1e20, **bits)
    N, D, loss = laws.Law.optimum(law, fit.estimate[None], np.array([1e20]), 6.0, **bits)
    np.testing.assert_allclose(closed[["params", "tokens", "loss"]], [N[0, 0], D[0, 0], loss[0, 0]], rtol=1e-4)
    assert closed.params > fit.optimal(1e20, **dict.fromkeys(bits, 16.0)).params
    with pytest.raises(BadInput, match="bits_weights"):
        fit.optimal(1e20)


def test_best_bits_against_a_search():
    law = Precision()
    fit = law.fit(runs(law, TRUTH, 0.001), bootstrap=50)
    best = fit.derive(law.best_bits)
    assert best.lower < best.estimate < best.upper
    bits, N = np.meshgrid(np.linspace(0.5, 1.5, 201) * best.estimate, np.geomspace(1e6, 1e12, 2001), indexing="ij")
    table = {"params": N.ravel(), "tokens": 1e21 / (N * bits).ravel()}
    table |= {f"bits_{x}": bits.ravel() for x in law.parts}
    loss = law.evaluate(fit.estimate[None], table)[0].reshape(bits.shape)
    at = np.unravel_index(loss.argmin(), loss.shape)
    assert bits[at] == pytest.approx(best.estimate, rel=0.02)
    one = types.SimpleNamespace(gamma_weights=np.array([[2.0]]))
    assert np.isnan(Precision("weights").best_bits(one)).all()


# ------------------------------------------------------------------------------------------------ floating point


def test_golden_values():
    table = {"params": 679e6, "tokens": 1e11, "exponent_bits": [4, 2], "mantissa_bits": [3, 1], "block_size": 128}
    table = {name: np.broadcast_to(np.asarray(v, float), 2) for name, v in table.items()}
    np.testing.assert_allclose(FloatPrecision().predict("Sun 2025", table), [2.61225, 2.65039], rtol=1e-5)
    p = types.SimpleNamespace(**SUN)
    assert FloatPrecision.critical_tokens(p, 1e9, 2, 1, 128) == pytest.approx(3.92845e11, rel=1e-5)


def test_critical_tokens_are_where_the_loss_turns():
    law, top = FloatPrecision(), FloatPrecision.critical_tokens(types.SimpleNamespace(**SUN), 1e9, 2, 1, 128)
    tokens = top * np.array([0.9, 1.0, 1.1])
    around = {"tokens": tokens} | {
        name: np.full(3, v)
        for name, v in (("params", 1e9), ("exponent_bits", 2), ("mantissa_bits", 1), ("block_size", 128))
    }
    loss = law.predict(SUN, around)
    assert loss[1] < min(loss[0], loss[2])
    with pytest.raises(BadInput, match="block_size"):
        law.critical_tokens(types.SimpleNamespace(**SUN), 1e9, 2, 1, 1)


def floats(noise=0.0, seed=0, n=150):
    rng = np.random.default_rng(seed)
    formats = np.array([(1, 1), (1, 2), (2, 0), (2, 1), (3, 1), (2, 3), (4, 3), (5, 2), (3, 2)], float)
    chosen = formats[rng.integers(len(formats), size=n)]
    table = pd.DataFrame(
        {
            "params": 10 ** rng.uniform(7.5, 9, n),
            "tokens": 10 ** rng.uniform(10, 11.7, n),
            "exponent_bits": chosen[:, 0],
            "mantissa_bits": chosen[:, 1],
            "block_size": rng.choice([32.0, 64, 128, 256], n),
        }
    )
    return table.assign(loss=FloatPrecision().predict(SUN, table) * np.exp(noise * rng.standard_normal(n)))


def test_planted_floats():
    fit = laws.fit("float-precision", floats(), bootstrap=0)
    np.testing.assert_allclose(fit.params, pd.Series(SUN)[fit.params.index], rtol=1e-5)
    assert fit.record["agreement"] >= 0.5
    fit = laws.fit("float-precision", floats(0.002), bootstrap=100)
    interval, truth = fit.conf_int(0.999), pd.Series(SUN)[fit.params.index]
    assert ((interval.lower <= truth) & (truth <= interval.upper)).all(), interval
    top = fit.derive(lambda p: FloatPrecision.critical_tokens(p, 1e9, 2, 1, 128))
    assert top.lower < 3.92845e11 < top.upper
