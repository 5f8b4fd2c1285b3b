"""The stabilised cell in plain JAX against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.slstm import State, slstm


def inputs(B, T, H, d, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.float32(rng.normal(size=shape))

    state = State(normal(B, H, d), normal(B, H, d), jnp.abs(normal(B, H, d)) + 1, normal(B, H, d))
    return normal(B, T, H, 4, d), d**-0.5 * normal(4, H, d, d), state, jnp.asarray(rng.random((B, T)) < 0.3)


@pytest.mark.parametrize(("T", "documents", "given"), [(1, False, True), (9, True, True), (6, False, False)])
def test_equals_the_definition_in_values_and_gradients(T, documents, given):
    gates, R, state, reset = inputs(2, T, 2, 4)
    reset = reset if documents else None
    dh = jnp.float32(np.random.default_rng(1).normal(size=(2, T, 2, 4)))

    def run(kernels):
        def f(gates, R, h, c, n):
            state_ = State(h, c, n, state.m) if given else None
            out, after = slstm(gates, R, state_, reset, kernels=kernels)
            return out, (after.h, after.c * jnp.exp(after.m), after.n * jnp.exp(after.m))

        out, pull = jax.vjp(f, gates, R, *state[:3])
        return jax.tree.leaves((out, pull((dh, jax.tree.map(jnp.zeros_like, out[1])))))

    for a, b in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_two_halves_with_the_state_handed_over():
    gates, R, state, reset = inputs(2, 7, 2, 4)
    whole, last = slstm(gates, R, state, reset)
    first, between = slstm(gates[:, :3], R, state, reset[:, :3])
    second, after = slstm(gates[:, 3:], R, between, reset[:, 3:])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-6, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), after, last)


def test_large_gates_stay_finite():
    gates, R, _, _ = inputs(1, 5, 1, 4)
    out, pull = jax.vjp(lambda g: slstm(g, R)[0], 200.0 * gates)
    assert bool(jnp.isfinite(out).all())
    assert bool(jnp.isfinite(pull(out)[0]).all())
