"""The chunked form against the recurrence as it is written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_recurrence import gated_recurrence, reference

pytestmark = pytest.mark.once


def inputs(T, B=2, G=1, H=4, dk=5, dv=3, gates="mild", seed=0):
    rng = np.random.default_rng(seed)
    q, k = (jnp.float32(rng.normal(size=(B, T, G, dk))) for _ in range(2))
    v = jnp.float32(rng.normal(size=(B, T, H, dv)))
    low, high = {"mild": (-1.0, 0.0), "closed": (-60.0, -20.0), "open": (-1e-6, 0.0), "mixed": (-40.0, 0.0)}[gates]
    g = jnp.float32(rng.uniform(low, high, size=(B, T, H)))
    state = jnp.float32(rng.normal(size=(B, H, dk, dv)))
    return q, k, v, g, state


def resets(T, B=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed + 9).random((B, T)) < 0.2)


CASES = [
    (1, "mild", 1, False), (7, "mild", 2, True), (8, "closed", 4, False), (9, "open", 1, True),
    (29, "mixed", 2, True), (37, "mild", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("T", "gates", "G", "documents"), CASES)
def test_equals_the_reference_in_values_and_all_gradients(T, gates, G, documents):
    *arrays, state = inputs(T, G=G, gates=gates)
    weight = jnp.float32(np.exp(np.random.default_rng(5).uniform(-9, 1, size=arrays[3].shape)))
    reset = resets(T) if documents else None
    rng = np.random.default_rng(3)
    d_out, d_state = jnp.float32(rng.normal(size=arrays[2].shape)), jnp.float32(rng.normal(size=state.shape))

    def run(f):
        out, pull = jax.vjp(f, *arrays, state, weight)
        return *out, *pull((d_out, d_state))

    got = jax.jit(lambda: run(lambda *a: gated_recurrence(*a[:-1], reset, a[-1], chunk=8)))()
    want = jax.jit(lambda: run(lambda *a: reference.gated_recurrence(*a[:-1], reset, a[-1])))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cut", [1, 5, 8, 12])
def test_any_split_with_the_state_carried_over(cut):
    q, k, v, g, state = inputs(13)
    whole, final = gated_recurrence(q, k, v, g, state, chunk=4)
    first, between = gated_recurrence(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], state, chunk=4)
    second, after = gated_recurrence(q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], between, chunk=4)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, final, rtol=1e-5, atol=1e-5)


def test_token_by_token():
    q, k, v, g, state = inputs(11, G=2)
    whole, final = gated_recurrence(q, k, v, g, state, chunk=4)
    for t in range(11):
        out, state = gated_recurrence(*(a[:, t : t + 1] for a in (q, k, v, g)), state)
        np.testing.assert_allclose(out[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_a_document_does_not_see_the_one_before():
    q, k, v, g, state = inputs(20)
    reset = jnp.zeros((2, 20), bool).at[:, 7].set(True)
    together, final = gated_recurrence(q, k, v, g, state, reset, chunk=8)
    alone, after = gated_recurrence(q[:, 7:], k[:, 7:], v[:, 7:], g[:, 7:], chunk=8)
    np.testing.assert_allclose(together[:, 7:], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, after, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32_and_finite():
    q, k, v, g, state = inputs(50, gates="mixed")
    exact, _ = gated_recurrence(q, k, v, g, state, chunk=16)
    low, final = jax.jit(partial(gated_recurrence, chunk=16))(*(a.astype(jnp.bfloat16) for a in (q, k, v)), g, state)
    assert low.dtype == jnp.bfloat16
    assert final.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact)) < 2e-2
