"""The chunked form against the delta rule as it is written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import delta_rule, reference

pytestmark = pytest.mark.once

GATES = {"mild": (-1.0, 0.0), "closed": (-60.0, -20.0), "open": (-1e-6, 0.0), "mixed": (-40.0, 0.0)}


def inputs(T, B=2, G=2, H=4, dk=5, dv=3, gates: str | None = "mild", highest=1.0, seed=0):
    """Keys of length 1, beta up to `highest`."""
    rng = np.random.default_rng(seed)
    q, k = (jnp.float32(rng.normal(size=(B, T, G, dk))) for _ in range(2))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jnp.float32(rng.normal(size=(B, T, H, dv)))
    beta = jnp.float32(rng.uniform(0, highest, size=(B, T, H)))
    g = jnp.float32(rng.uniform(*GATES[gates], size=(B, T, H))) if gates else None
    return q, k, v, beta, g, jnp.float32(rng.normal(size=(B, H, dk, dv)))


CASES = [
    (1, "mild", 1, 1.0, False, 8), (7, "mild", 2, 2.0, True, 8), (8, "closed", 4, 1.0, False, 8),
    (9, "open", 1, 2.0, True, 8), (29, "mixed", 2, 1.0, True, 8), (37, "mild", 4, 1.0, False, 8),
    (37, None, 2, 2.0, False, 8), (19, None, 4, 1.0, True, 8), (70, "mild", 2, 1.0, True, 64),
]  # fmt: skip


@pytest.mark.parametrize(("T", "gates", "G", "highest", "documents", "chunk"), CASES)
def test_equals_the_reference_in_values_and_all_gradients(T, gates, G, highest, documents, chunk):
    arrays = inputs(T, G=G, gates=gates, highest=highest)
    rng = np.random.default_rng(3)
    reset = jnp.asarray(rng.random((2, T)) < 0.2) if documents else None
    d_out, d_state = jnp.float32(rng.normal(size=arrays[2].shape)), jnp.float32(rng.normal(size=arrays[-1].shape))

    def run(f):
        out, pull = jax.vjp(f, *arrays)
        return *out, *(d for d in pull((d_out, d_state)) if d is not None)

    got = jax.jit(lambda: run(lambda *a: delta_rule(*a, reset, chunk=chunk)))()
    want = jax.jit(lambda: run(lambda *a: reference.delta_rule(*a, reset)))()
    assert len(got) == 2 + 5 + (gates is not None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("gates", ["mild", None])
def test_one_key_again_and_again_with_beta_2(gates):
    """The worst case for the triangular system, all of whose entries are 2: powers of it overflow, its solution does
    not. Each token reflects the state in its key: eigenvalue -1."""
    q, k, v, beta, g, state = inputs(128, gates=gates)
    k, beta = jnp.broadcast_to(k[:, :1], k.shape), jnp.full_like(beta, 2.0)
    got = jax.jit(partial(delta_rule, chunk=64))(q, k, v, beta, g, state)
    want = reference.delta_rule(q, k, v, beta, g, state)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cut", [1, 5, 8, 12])
def test_any_split_with_the_state_carried_over(cut):
    *arrays, state = inputs(13)
    whole, final = delta_rule(*arrays, state, chunk=4)
    first, between = delta_rule(*(a[:, :cut] for a in arrays), state, chunk=4)
    second, after = delta_rule(*(a[:, cut:] for a in arrays), between, chunk=4)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", ["mild", None])
def test_token_by_token(gates):
    *arrays, state = inputs(11, gates=gates)
    whole, final = delta_rule(*arrays, state, chunk=4)
    for t in range(11):
        out, state = delta_rule(*(None if a is None else a[:, t : t + 1] for a in arrays), state)
        np.testing.assert_allclose(out[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32_and_finite():
    q, k, v, beta, g, state = inputs(50, gates="mixed")
    exact, _ = delta_rule(q, k, v, beta, g, state, chunk=16)
    low, final = jax.jit(partial(delta_rule, chunk=16))(*(a.astype(jnp.bfloat16) for a in (q, k, v)), beta, g, state)
    assert (low.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    assert float(jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact)) < 2e-2
