"""The chunked scan against an associative scan over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import reference, selective_scan

pytestmark = pytest.mark.once


def inputs(T, B=2, E=6, N=3, rates="mild", seed=0):
    rng = np.random.default_rng(seed)
    low, high = {"mild": (1e-3, 1.0), "fast": (5.0, 60.0), "still": (0.0, 1e-6)}[rates]
    u, dt = jnp.float32(rng.normal(size=(B, T, E))), jnp.float32(rng.uniform(low, high, size=(B, T, E)))
    A = -jnp.float32(rng.uniform(0.3, 3.0, size=(E, N)))
    Bm, C = (jnp.float32(rng.normal(size=(B, T, N))) for _ in range(2))
    return u, dt, A, Bm, C, jnp.float32(rng.normal(size=(B, E, N)))


@pytest.mark.parametrize(
    ("T", "rates", "documents"), [(1, "mild", False), (7, "fast", True), (8, "still", False), (29, "mild", True)]
)
def test_equals_the_reference_in_values_and_all_gradients(T, rates, documents):
    arrays = inputs(T, rates=rates)
    rng = np.random.default_rng(3)
    reset = jnp.asarray(rng.random((2, T)) < 0.25) if documents else None
    d_y, d_state = jnp.float32(rng.normal(size=arrays[0].shape)), jnp.float32(rng.normal(size=arrays[-1].shape))

    def run(f):
        out, pull = jax.vjp(f, *arrays)
        return *out, *pull((d_y, d_state))

    got = jax.jit(lambda: run(lambda *a: selective_scan(*a, reset, chunk=8)))()
    want = jax.jit(lambda: run(lambda *a: reference.selective_scan(*a, reset)))()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("cut", [1, 8, 11])
def test_any_split_with_the_state_carried_over(cut):
    *arrays, A, Bm, C, state = inputs(13)
    u, dt = arrays

    def part(s, state):
        return selective_scan(u[:, s], dt[:, s], A, Bm[:, s], C[:, s], state, chunk=4)

    whole, final = part(slice(None), state)
    first, between = part(slice(0, cut), state)
    second, after = part(slice(cut, None), between)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, final, rtol=1e-5, atol=1e-5)


def test_no_table_of_all_tokens_is_ever_made():
    """Peak temporaries of the gradient stay far below the (B, T, E, N) table that the scan stands for."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(1024, B=1, E=64, N=16)]

    def loss(*a):
        return jnp.sum(selective_scan(*a, chunk=32)[0])

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*shapes).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend tells nothing of its memory")
    assert memory.temp_size_in_bytes < 0.7 * 1024 * 64 * 16 * 4
