"""The chunked form against the recurrence as it is written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gla import gla, reference

pytestmark = pytest.mark.once

GATES = {"mild": (-1.0, 0.0), "closed": (-60.0, -20.0), "open": (-1e-6, 0.0), "mixed": (-40.0, 0.0), "none": (0.0, 0.0)}


def inputs(T, B=2, H=3, dk=5, dv=4, gates="mild", seed=0):
    rng = np.random.default_rng(seed)
    q, k = (jnp.float32(rng.normal(size=(B, T, H, dk))) for _ in range(2))
    v = jnp.float32(rng.normal(size=(B, T, H, dv)))
    g = jnp.float32(rng.uniform(*GATES[gates], size=(B, T, H, dk)))
    return q, k, v, g, jnp.float32(rng.normal(size=(B, H, dk, dv)))


CASES = [
    (1, "mild", False), (7, "mild", True), (8, "closed", False), (9, "open", True), (29, "mixed", True),
    (37, "mild", False), (6, "none", False),
]  # fmt: skip


@pytest.mark.parametrize(("T", "gates", "documents"), CASES)
def test_equals_the_reference_in_values_and_all_gradients(T, gates, documents):
    *arrays, state = inputs(T, gates=gates)
    rng = np.random.default_rng(3)
    reset = jnp.asarray(rng.random((2, T)) < 0.2) if documents else None
    d_out, d_state = jnp.float32(rng.normal(size=arrays[2].shape)), jnp.float32(rng.normal(size=state.shape))

    def run(f):
        out, pull = jax.vjp(f, *arrays, state)
        return *out, *pull((d_out, d_state))

    got = jax.jit(lambda: run(lambda *a: gla(*a, reset, chunk=8)))()
    want = jax.jit(lambda: run(lambda *a: reference.gla(*a, reset)))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_channels_that_close_beside_channels_that_stay_open():
    """Where exp(-b) would overflow: b falls to -3000 in a chunk in some channels and not at all in others."""
    q, k, v, _, state = inputs(40, dk=6)
    g = jnp.zeros((2, 40, 3, 6)).at[..., ::2].set(-100.0)
    got, want = jax.jit(partial(gla, chunk=32))(q, k, v, g, state), reference.gla(q, k, v, g, state)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda g: gla(q, k, v, g, state, chunk=32)[0].sum()))(g)
    np.testing.assert_allclose(
        gradient, jax.grad(lambda g: reference.gla(q, k, v, g, state)[0].sum())(g), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("cut", [1, 5, 8, 12])
def test_any_split_with_the_state_carried_over(cut):
    *arrays, state = inputs(13)
    whole, final = gla(*arrays, state, chunk=4)
    first, between = gla(*(a[:, :cut] for a in arrays), state, chunk=4)
    second, after = gla(*(a[:, cut:] for a in arrays), between, chunk=4)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, final, rtol=1e-5, atol=1e-5)


def test_token_by_token():
    *arrays, state = inputs(11)
    whole, final = gla(*arrays, state, chunk=4)
    for t in range(11):
        out, state = gla(*(a[:, t : t + 1] for a in arrays), state)
        np.testing.assert_allclose(out[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32_and_finite():
    q, k, v, g, state = inputs(50, gates="mixed")
    exact, _ = gla(q, k, v, g, state, chunk=16)
    low, final = jax.jit(partial(gla, chunk=16))(*(a.astype(jnp.bfloat16) for a in (q, k, v)), g, state)
    assert (low.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    assert float(jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact)) < 2e-2
