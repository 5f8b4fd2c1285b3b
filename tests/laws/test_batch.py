"""Critical batch, noise scale, and how the learning rate follows the batch."""

import numpy as np
import pandas as pd
import pytest

from scalelab import laws
from scalelab.errors import BadInput
from scalelab.laws.forms import CriticalBatchOfLoss
from scalelab.laws.forms.batch import (
    best_sgd_lr,
    critical_batch,
    least_compute,
    least_examples,
    least_steps,
    noise_scale,
    scaled_lr,
)  # fmt: skip

S_MIN, B_CRIT = 4000.0, 3e5


def tradeoff(noise=0.0, seed=0, n=12):
    B = np.geomspace(2e4, 5e6, n)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(n))
    return pd.DataFrame({"batch_tokens": B, "steps": S_MIN * (1 + B_CRIT / B) * scatter})


def test_planted_critical_batch():
    fit = laws.fit("critical-batch", tradeoff(), bootstrap=0)
    np.testing.assert_allclose(fit.params, [S_MIN, B_CRIT], rtol=1e-8)
    noisy = laws.fit("critical-batch", tradeoff(0.02), bootstrap=300)
    interval = noisy.conf_int(0.99)
    assert ((interval.lower < [S_MIN, B_CRIT]) & (interval.upper > [S_MIN, B_CRIT])).all()
    examples = least_examples(noisy, 0.99)
    assert examples.lower < S_MIN * B_CRIT < examples.upper
    assert examples.estimate == pytest.approx(noisy.params.S_min * noisy.params.B_crit)
    with pytest.raises(BadInput, match="critical-batch"):
        least_examples(laws.fit("critical-batch-of-loss", of_loss(), bootstrap=0))


def test_the_hyperbola_of_steps_and_examples():
    fit = laws.fit("critical-batch", tradeoff(), bootstrap=0)
    table = tradeoff()
    S = fit.predict(table)
    examples = S * table.batch_tokens
    product = (S / fit.params.S_min - 1) * (examples / least_examples(fit).estimate - 1)
    np.testing.assert_allclose(product, 1, rtol=1e-6)
    twice = fit.predict({"batch_tokens": [fit.params.B_crit]})  # at the critical batch both cost twice their least
    assert twice[0] == pytest.approx(2 * fit.params.S_min)
    np.testing.assert_allclose(least_steps(S, table.batch_tokens, B_CRIT), S_MIN, rtol=1e-6)
    C = 6e18 * (1 + table.batch_tokens / B_CRIT)
    np.testing.assert_allclose(least_compute(C, table.batch_tokens, B_CRIT), 6e18, rtol=1e-12)


def of_loss(noise=0.0):
    L = np.linspace(2.2, 4.5, 10)
    scatter = np.exp(noise * np.random.default_rng(1).standard_normal(10))
    return pd.DataFrame({"loss": L, "batch_tokens": 1.5e8 * L ** (-1 / 0.25) * scatter})


def test_kaplan():
    np.testing.assert_allclose(critical_batch([3, 2.5]), [1.06911e6, 2.54729e6], rtol=1e-5)  # laws.md section 15
    predicted = CriticalBatchOfLoss().predict("Kaplan 2020", {"loss": [3.0, 2.5]})
    np.testing.assert_allclose(predicted, critical_batch([3, 2.5]), rtol=1e-12)
    fit = laws.fit("critical-batch-of-loss", of_loss(), bootstrap=0)
    np.testing.assert_allclose(fit.params, [1.5e8, 0.25], rtol=1e-8)
    interval = laws.fit("critical-batch-of-loss", of_loss(0.05), bootstrap=300).conf_int(0.99)
    assert ((interval.lower < [1.5e8, 0.25]) & (interval.upper > [1.5e8, 0.25])).all()


def gradients(n, seed=0, dimensions=50, square=2.0, trace=400.0, small=64, big=1024):
    """Squared norms of planted gradients G + noise / sqrt(B)."""
    rng = np.random.default_rng(seed)
    G = np.zeros(dimensions)
    G[0] = np.sqrt(square)
    out = []
    for B in (small, big):
        noise = rng.standard_normal((n, dimensions)) * np.sqrt(trace / dimensions / B)
        out.append(((G + noise) ** 2).sum(1))
    return (*out, small, big)


def test_noise_scale():
    found = noise_scale(*gradients(4000))
    assert found.square == pytest.approx(2.0, rel=0.02)
    assert found.trace == pytest.approx(400.0, rel=0.02)
    assert found.lower < 200.0 < found.upper
    assert found.estimate == pytest.approx(found.trace / found.square)
    # exact expectations give the exact answer: E |G_B|^2 = |G|^2 + tr Sigma / B
    exact = noise_scale(np.array([2 + 400 / 64]), np.array([2 + 400 / 1024]), 64, 1024)
    assert exact.estimate == pytest.approx(200.0)
    assert np.isnan(exact.lower)
    same = noise_scale(*gradients(50), seed=3)
    assert same == noise_scale(*gradients(50), seed=3)


def test_ratios_are_not_averaged():
    """Few gradients: the mean of ratios is far off, the ratio of means is not."""
    small, big, b, B = gradients(400, dimensions=5, square=0.05, trace=40.0)
    found = noise_scale(small, big, b, B)
    square = (B * big - b * small) / (B - b)
    trace = (small - big) / (1 / b - 1 / B)
    assert abs(found.estimate / 800 - 1) < 0.15
    assert abs(np.mean(trace / square) / 800 - 1) > 0.3


def test_noise_without_signal_has_no_scale():
    rng = np.random.default_rng(0)
    small, big = rng.chisquare(20, 30) / 64, rng.chisquare(20, 30) / 2000  # less than noise alone would leave
    found = noise_scale(small, big, 64, 1024)
    assert found.square < 0
    assert np.isnan(found.estimate)
    assert found.upper == np.inf
    for bad in ((small, big, 64, 64), (small, big[:-1], 64, 1024), (-small, big, 64, 1024), ([], [], 64, 1024)):
        with pytest.raises(BadInput):
            noise_scale(*bad)


def test_learning_rate_rules():
    assert scaled_lr(1e-3, 64, 256) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, 64, 256, "linear") == pytest.approx(4e-3)
    assert scaled_lr(1e-3, 256, 64) == pytest.approx(0.5e-3)
    np.testing.assert_allclose(scaled_lr(1e-3, 64, [128, 256, 1e9], "linear", critical=256), [2e-3, 4e-3, 4e-3])
    assert scaled_lr(1e-3, 1000, 4000, critical=500) == 1e-3  # both above the cap
    B = np.array([1e-3, 1.0, 1e6])
    np.testing.assert_allclose(best_sgd_lr(0.1, B, 1.0), [0.1 * 1e-3 / 1.001, 0.05, 0.1], rtol=1e-5)
    with pytest.raises(BadInput, match="rule"):
        scaled_lr(1e-3, 64, 256, "cubic")
    with pytest.raises(BadInput, match="new_batch"):
        scaled_lr(1e-3, 64, 0)
