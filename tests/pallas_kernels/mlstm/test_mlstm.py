"""The chunked cell against the cell as it is written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm import State, mlstm, reference

pytestmark = pytest.mark.once


def inputs(T, B=2, H=3, dk=4, dv=5, gates="mild", seed=0):
    rng = np.random.default_rng(seed)
    q, k = (jnp.float32(rng.normal(size=(B, T, H, dk))) for _ in range(2))
    v = jnp.float32(rng.normal(size=(B, T, H, dv)))
    (i0, i1), (f0, f1) = {
        "mild": ((-2, 2), (0, 4)),
        "extreme": ((-15, 15), (-15, 15)),
        "start": ((-10, -10), (3, 6)),  # the published initialisation: |n . q| is far below the bound
        "open": ((0, 1), (20, 30)),
        "shut": ((-3, 3), (-60, -30)),
    }[gates]
    i, f = (jnp.float32(rng.uniform(*ends, size=(B, T, H))) for ends in ((i0, i1), (f0, f1)))
    state = State(
        jnp.float32(rng.normal(size=(B, H, dk, dv))),
        jnp.float32(rng.normal(size=(B, H, dk))),
        jnp.float32(rng.normal(size=(B, H))),
    )
    return (q, k, v, i, f), state


def close(a, b, tolerance=3e-5):
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("gates", ["mild", "extreme", "start", "open", "shut"])
@pytest.mark.parametrize(
    ("T", "documents", "carried"), [(1, False, True), (7, True, True), (29, False, True), (21, True, False)]
)
def test_equals_the_reference_in_values_and_all_gradients(gates, T, documents, carried):
    arrays, state = inputs(T, gates=gates)
    rng = np.random.default_rng(3)
    reset = jnp.asarray(rng.random((2, T)) < 0.2) if documents else None
    d_h, d_C, d_n = (jnp.float32(rng.normal(size=a.shape)) for a in (arrays[2], state.C, state.n))
    given = (*arrays, state) if carried else arrays

    def run(f):
        def outputs(*a):  # h does not depend on m
            h, (C, n, m) = f(*a, *([] if carried else [None]), reset)
            return h, C, n, jax.lax.stop_gradient(m)

        out, pull = jax.vjp(outputs, *given)
        return jax.tree.leaves((out, pull((d_h, d_C, d_n, jnp.zeros_like(out[-1])))))

    got = jax.jit(lambda: run(partial(mlstm, chunk=8)))()
    want = jax.jit(lambda: run(reference.mlstm))()
    for a, b in zip(got, want, strict=True):
        assert jnp.isfinite(a).all()
        close(a, b, 2e-4 if gates == "extreme" else 5e-5)


@pytest.mark.parametrize("cut", [1, 8, 11])
def test_any_split_with_the_state_carried_over(cut):
    arrays, state = inputs(13)
    whole, final = mlstm(*arrays, state, chunk=4)
    first, between = mlstm(*(a[:, :cut] for a in arrays), state, chunk=4)
    second, after = mlstm(*(a[:, cut:] for a in arrays), between, chunk=4)
    close(jnp.concatenate([first, second], axis=1), whole)
    close(after.m, final.m)
    close(after.C, final.C)
    close(after.n, final.n)


def test_the_normaliser_is_bounded_in_unstabilised_units():
    """With input gates at -10 the bound is what divides: 1, not the tiny |n . q|."""
    (q, k, v, _, f), _ = inputs(6)
    i = jnp.full(f.shape, -10.0)
    h, _ = mlstm(q, k, v, i, f)
    decay = jnp.cumsum(jax.nn.log_sigmoid(f), axis=1)
    gap = jnp.where(jnp.tril(jnp.ones((6, 6), bool))[None, :, :, None], decay[:, :, None] - decay[:, None], -jnp.inf)
    scores = jnp.einsum("bthk,bshk->btsh", q, k) / 2 * jnp.exp(gap - 10)
    close(h, jnp.einsum("btsh,bshv->bthv", scores, v), 1e-4)


def test_bfloat16_stays_near_float32_and_finite():
    (q, k, v, i, f), state = inputs(50, gates="mild")
    run = jax.jit(partial(mlstm, chunk=16))
    exact, _ = run(q, k, v, i, f, state)
    low, after = run(*(a.astype(jnp.bfloat16) for a in (q, k, v)), i, f, state)
    assert low.dtype == jnp.bfloat16
    assert after.C.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact)) < 3e-2
