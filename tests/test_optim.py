import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalelab import optim
from scalelab.config import base, override
from scalelab.parametrization import Rule


def section(**changes):
    return override(base(), {f"optim.{name}": value for name, value in changes.items()}).optim


def rates(steps: int, **changes) -> np.ndarray:
    rate = optim.schedule(section(**changes), steps)
    return np.array([rate(update) for update in range(steps)])


def test_cosine_rises_peaks_and_ends_where_it_says():
    lr = rates(100, lr=1.0, warmup=0.1, final_lr=0.1)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert lr.max() == 1.0
    assert lr[-1] == pytest.approx(0.1)
    middle = 10 + 89 / 2
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (54 - 10) / 89))
    assert lr[54] == pytest.approx(expected, rel=1e-5)
    assert 54 < middle < 55
    assert np.all(np.diff(lr[10:]) <= 0)


def test_wsd_is_flat_then_linear_and_its_trunk_does_not_know_the_cooldown():
    lr = rates(100, lr=1.0, schedule="wsd", warmup=0.1, cooldown=0.2, final_lr=0.0)
    assert np.all(lr[10:80] == 1.0)
    np.testing.assert_allclose(np.diff(lr[80:]), -0.05, atol=1e-6)
    assert lr[-1] == pytest.approx(0.0, abs=1e-7)
    later = rates(100, lr=1.0, schedule="wsd", warmup=0.1, cooldown=0.1, final_lr=0.0)
    assert np.array_equal(lr[:80], later[:80])


def test_constant_and_no_warmup():
    assert np.all(rates(5, lr=0.5, schedule="constant", warmup=0.0) == 0.5)
    assert rates(1, lr=0.5, schedule="cosine", warmup=0.0)[0] == 0.5


def test_one_update_is_adamw_by_hand():
    """Loshchilov & Hutter, algorithm 2, first step: m / (1 - b1) = g and v / (1 - b2) = g^2."""
    conf = section(weight_decay=0.5, clip=0.0, eps=1e-8)
    params = {"w": jnp.array([1.0, -2.0]), "gain": jnp.array([3.0])}
    grads = {"w": jnp.array([0.3, 0.4]), "gain": jnp.array([-5.0])}
    tx = optim.optimizer(conf, {"w": True, "gain": False})
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [1 + 0.5, 1 - 1.0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(updates["gain"], [-1], rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    conf = section(weight_decay=0.0, clip=1.0, eps=1e3)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = optim.optimizer(conf, {"a": False, "b": False})
    updates, _ = tx.update(grads, tx.init(grads), grads)
    # With so large an eps the update is the clipped gradient over eps.
    assert float(updates["a"][0]) == pytest.approx(0.6 / 1000, rel=2e-3)
    assert float(updates["b"][0]) == pytest.approx(0.8 / 1000, rel=2e-3)


def test_one_update_with_rules_by_hand():
    """Each tensor with its own rate, decay and eps; only Adam's eps sees that the gradients were scaled."""
    conf = section(weight_decay=0.5, clip=0.0, eps=0.1)
    params = {"w": jnp.array([1.0, -2.0]), "gain": jnp.array([3.0]), "bias": jnp.array([0.7])}
    grads = {"w": jnp.array([0.3, 0.4]), "gain": jnp.array([-5.0]), "bias": jnp.array([0.0])}
    rules = {"w": Rule(0.25, 4.0, 0.5), "gain": Rule(1.0, 1.0, 0.125), "bias": Rule(0.0, 0.0, 1.0)}
    tx = optim.optimizer(conf, {"w": True, "gain": False, "bias": False}, rules)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = [0.25 * (g / (g + 0.05) + 2.0 * p) for g, p in ((0.3, 1.0), (0.4, -2.0))]
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["gain"], [-5 / (5 + 0.0125)], rtol=1e-5)
    assert float(updates["bias"][0]) == 0.0


def test_rules_of_one_change_no_bit_over_many_updates():
    conf = section(weight_decay=0.1, clip=1.0)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32), "gain": jnp.ones(7)}
    mask, ones = {"w": True, "gain": False}, {"w": Rule(1.0, 1.0, 1.0), "gain": Rule(1.0, 1.0, 1.0)}
    ends = []
    for rules in (None, ones):
        tx, p = optim.optimizer(conf, mask, rules), params
        state, draw = tx.init(p), np.random.default_rng(1)
        update = jax.jit(tx.update)
        for _ in range(20):
            grads = {name: jnp.asarray(draw.normal(size=a.shape), jnp.float32) for name, a in p.items()}
            u, state = update(grads, state, p)
            p = jax.tree.map(lambda a, b: a - 0.01 * b, p, u)
        ends.append(p)
    jax.tree.map(np.testing.assert_array_equal, *ends)
