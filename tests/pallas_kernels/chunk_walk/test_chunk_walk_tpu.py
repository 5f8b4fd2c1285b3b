"""The walk on TPUs, interpreted, against its equations, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.chunk_walk.tpu import FORM, together, vmem


def walked(read, write, erase, values, weights, carried, state, reverse):
    """As the kernel's, of float32."""
    S, found = state, {name: [None] * values.shape[1] for name in ("out", "states", "x")}
    for c in reversed(range(values.shape[1])) if reverse else range(values.shape[1]):
        x, A = values[:, c], weights[:, c]
        if erase is not None and not reverse:
            x = x + erase[:, c] @ S
        out = read[:, c] @ S + (np.swapaxes(A, -1, -2) if reverse else A) @ x
        found["out"][c], found["states"][c], found["x"][c] = out, S, x
        S = carried[:, c][..., None] * S + np.swapaxes(write[:, c], -1, -2) @ x
        if erase is not None and reverse:
            S = S + np.swapaxes(erase[:, c], -1, -2) @ out
    return {name: np.stack(a, axis=1) for name, a in found.items()} | {"final": S}


@pytest.mark.parametrize("reverse", [False, True])
@settings(max_examples=5, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 3, 6, 9, 12))), erases=st.booleans(), keep=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_follows_its_equations(reverse, sizes, erases, keep, seed):
    """Any number of heads, of which some share a step."""
    B, C, H, K, V = sizes
    L, rng = FORM.L, np.random.default_rng(seed)

    def normal(*shape):
        return np.float32(0.1 * rng.normal(size=shape))

    read, write, erase = (normal(B, C, H, L, K) for _ in range(3))
    values, weights, state = normal(B, C, H, L, V), normal(B, C, H, L, L), normal(B, H, K, V)
    carried = np.float32(rng.uniform(size=(B, C, H, K)))
    arrays = read, write, erase if erases else None, values, weights, carried, state
    with dispatch.interpreted():
        got = FORM.sweep(*(None if a is None else jnp.asarray(a) for a in arrays), reverse=reverse, keep=keep)
    want = walked(*arrays, reverse)
    names = {"out", "final"} | ({"states"} if keep else set()) | ({"x"} if keep and erases and not reverse else set())
    assert set(got) == names
    for name, a in got.items():
        np.testing.assert_allclose(a, want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_heads_that_share_a_step():
    """As many as divide their number, up to four, and as VMEM holds."""
    small, large, larger = (vmem(*sides, True) for sides in ((128, 128, 2), (256, 256, 4), (256, 512, 4)))
    assert [together(H, small) for H in (1, 2, 3, 5, 6, 8, 12)] == [1, 2, 3, 1, 3, 4, 4]
    assert [together(8, each) for each in (large, larger)] == [2, 1]
