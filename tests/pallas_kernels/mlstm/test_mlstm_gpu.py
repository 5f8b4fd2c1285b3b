"""The cell by the Mosaic GPU kernel, interpreted, against the cell as it is written; and that it lowers for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.mlstm import State, mlstm, reference

if not compat.MOSAIC_GPU:
    pytest.skip(f"Mosaic GPU needs JAX {compat.MOSAIC_GPU_SINCE}", allow_module_level=True)


def inputs(T, dk=64, dv=64, gates="mild", seed=0):
    """(q, k, v, i, f), the state, cotangents of h, C and n, documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.bfloat16, mean=0.0):
        return jnp.asarray(rng.normal(mean, size=shape), dtype)

    (i0, i1), (f0, f1) = {
        "mild": ((-2, 2), (0, 4)),
        "start": ((-10, -10), (3, 6)),  # |n . q| is far below the bound
        "extreme": ((-15, 15), (-15, 15)),
    }[gates]
    # With a mean, so that the normaliser stays away from 0, where products of rounded numbers would be lost.
    q, k = normal(1, T, 1, dk, mean=0.4), normal(1, T, 1, dk, mean=0.4)
    i, f = (jnp.float32(rng.uniform(*ends, size=(1, T, 1))) for ends in ((i0, i1), (f0, f1)))
    state = State(
        normal(1, 1, dk, dv, dtype=jnp.float32),
        normal(1, 1, dk, dtype=jnp.float32, mean=1.0),
        normal(1, 1, dtype=jnp.float32),
    )
    cotangents = normal(1, T, 1, dv), normal(1, 1, dk, dv, dtype=jnp.float32), normal(1, 1, dk, dtype=jnp.float32)
    arrays = q, k, normal(1, T, 1, dv), i, f
    return arrays, state, cotangents, jnp.asarray(rng.random((1, T)) < 0.05).at[:, T // 2].set(True)


def kernel(*args):
    return mlstm(*args, kernels="mosaic_gpu")


def values_and_gradients(f, arrays, state, cotangents):
    def run(*a):
        h, (C, n, m) = f(*a)
        return h, C, n, m

    out, pull = jax.vjp(run, *arrays, state)
    return *out, *jax.tree.leaves(pull((*cotangents, jnp.zeros_like(out[3]))))


@pytest.mark.parametrize(
    ("shape", "gates", "documents"),
    [
        ({"T": 70}, "mild", True),  # a chunk and 6 tokens
        ({"T": 1, "dv": 192}, "mild", False),  # one token; values in pieces
        ({"T": 20, "dk": 128}, "start", True),
        ({"T": 66}, "extreme", False),
    ],
)
def test_equals_the_reference_in_values_and_all_gradients(shape, gates, documents):
    arrays, state, cotangents, reset = inputs(**shape, gates=gates)
    reset = reset if documents else None
    with dispatch.interpreted():
        got = values_and_gradients(lambda *a: kernel(*a, reset), arrays, state, cotangents)
    exact = tuple(a.astype(jnp.float32) for a in arrays), state, tuple(a.astype(jnp.float32) for a in cotangents)
    want = values_and_gradients(lambda *a: reference.mlstm(*a, reset), *exact)
    rough = 3e-2 if gates == "extreme" else 6e-3  # tokens whose normaliser is near 0 weigh most
    *got, d_m = got
    *want, true_d_m = want
    for a, b, like in zip(got, want, (arrays[2], *state, *arrays, *state[:2]), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
        assert float(jnp.linalg.norm(a.astype(jnp.float32) - b)) <= rough * float(jnp.linalg.norm(b)) + 2e-5
    # a sum of products with the state that cancel
    assert abs(float((d_m - true_d_m).squeeze())) <= 6e-3 * float(jnp.linalg.norm(state.C) * jnp.linalg.norm(got[-2]))


def test_a_population_equals_its_members_without_a_state():
    members = [inputs(8, seed=s) for s in (1, 2)]
    shared = members[0][0][0]  # one q for all
    arrays = [jnp.stack([m[0][i] for m in members]) for i in range(1, 5)]
    d_h = jnp.stack([m[2][0] for m in members])

    def run(d_h, *arrays):
        h, pull = jax.vjp(lambda *a: kernel(shared, *a)[0], *arrays)
        return h, *pull(d_h)

    with dispatch.interpreted():
        together = jax.vmap(run)(d_h, *arrays)
        for m in range(2):
            for a, b in zip(together, run(d_h[m], *(a[m] for a in arrays)), strict=True):
                a, b = (np.asarray(x, np.float32) for x in (a[m], b))
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_lowers_for_cuda_at_training_shapes():
    B, T, H, dk, dv = 4, 8192, 8, 256, 512
    args = [jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16) for d in (dk, dk, dv)]
    args += [jax.ShapeDtypeStruct((B, T, H), jnp.float32)] * 2

    @jax.checkpoint
    def loss(*a):
        return jnp.sum(kernel(*a)[0].astype(jnp.float32))

    text = jax.jit(jax.grad(loss, argnums=range(5))).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") >= 4


def test_refuses_by_name_what_it_does_not_take():
    (q, k, v, i, f), *_ = inputs(8)
    with pytest.raises(dispatch.Unsupported, match="takes bfloat16 values, not float32"):
        kernel(q, k, v.astype(jnp.float32), i, f)
    with pytest.raises(dispatch.Unsupported, match="takes keys of a width of 64, 128, 192 or 256, not 32"):
        kernel(q[..., :32], k[..., :32], v, i, f)
